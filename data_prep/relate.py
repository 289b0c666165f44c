"""The steps that relate documents to each other: vectors, clusters, and an order in which neighbours are similar.

Models are fitted on training documents; held-out documents get the vectors and clusters that new text would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightbulb.data_prep.cluster import BLOCK, Clusters, describe, draw
from lightbulb.data_prep.config import ClusterConfig, EmbedConfig, OrderConfig
from lightbulb.data_prep.documents import Documents, array_hash, batched
from lightbulb.data_prep.embed import Embedder, SentenceEmbedder, TfidfEmbedder, load_embedder, model_digest
from lightbulb.data_prep.order import in_context_order
from lightbulb.data_prep.split import DROPPED, SPLITS, TRAIN, load_split
from lightbulb.data_prep.step import Output, Step, Task
from lightbulb.data_prep.write import CLUSTERS_NAME, ORDER_NAME

VECTORS_NAME = "vectors.npy"
REPORT_DOCUMENTS = 20_000
ORDER_TASK_DOCUMENTS = 50_000
PICTURE_NAME = "clusters.png"


@dataclass(frozen=True)
class FitEmbedder(Step):
    """Fits the model that gives documents their vectors, on a sample of the training documents."""

    documents: Documents
    split: Output
    config: EmbedConfig
    seed: int

    name = "embedder"
    title = "Fitting vectors"

    def settings(self) -> Any:
        return [self.config.model_dump(mode="json", exclude={"path"}), self.seed]

    def parts(self) -> Sequence[Any]:
        if self.config.path is not None:
            return [model_digest(self.config.path)]
        return [{"documents": self.documents.read.keys, "split": self.split.keys}]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        embedder: Embedder
        if self.config.path is not None:
            embedder = SentenceEmbedder(self.config.path.expanduser())
        else:
            numbers = sample(np.flatnonzero(training(self.split)), self.config.fit_documents, self.seed)
            texts = [document.text for document in self.documents.find(numbers.tolist())]
            embedder = TfidfEmbedder.fit(texts, self.config.dimensions, self.config.max_features, self.seed)
        embedder.save(task.out)
        return {"method": self.config.method}


@dataclass(frozen=True)
class Embed(Step):
    """The vector of every document kept; rows of documents that were dropped are zero."""

    documents: Documents
    split: Output
    embedder: Output

    name = "vectors"
    title = "Vectors of documents"

    def settings(self) -> Any:
        return self.embedder.keys

    def parts(self) -> Sequence[Any]:
        keys = self.documents.read.keys
        return [[key, array_hash(self._wanted[self.documents.of_task(task)])] for task, key in enumerate(keys)]

    def sizes(self) -> Sequence[int]:
        return [int(self._wanted[self.documents.of_task(task)].sum()) for task in range(len(self.documents.read.keys))]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        embedder = load_embedder(self.embedder.folders[0])
        first, last = self.documents.of_task(rank).start, self.documents.of_task(rank).stop
        width = embedder.embed([""]).shape[1]
        vectors = np.lib.format.open_memmap(task.out / VECTORS_NAME, "w+", np.float32, (last - first, width))
        for batch in batched(self.documents.texts(rank, self._wanted)):
            vectors[[number - first for number, _ in batch]] = embedder.embed([text for _, text in batch])
            task.advance(len(batch))
        return {"dimensions": width}

    @cached_property
    def _wanted(self) -> np.ndarray:
        return load_split(self.split) != DROPPED


@dataclass(frozen=True)
class Cluster(Step):
    """Centres, the cluster of every document kept (-1 of others), a report and a picture."""

    documents: Documents
    split: Output
    embedder: Output
    vectors: Output
    config: ClusterConfig
    fit_documents: int
    seed: int

    name = "clusters"
    title = "Clusters"

    def settings(self) -> Any:
        return [self.config.model_dump(mode="json"), self.fit_documents, self.seed]

    def parts(self) -> Sequence[Any]:
        return [{"vectors": self.vectors.keys, "split": self.split.keys, "embedder": self.embedder.keys}]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        vectors, train = Vectors(self.documents, self.vectors), np.flatnonzero(training(self.split))
        seen = vectors.of(sample(train, self.fit_documents, self.seed))
        clusters = Clusters.fit(seen, self.config.num_clusters, self.config.capacity_factor, self.seed)
        clusters.save(task.out)
        chosen = np.full(len(self.documents), -1, dtype=np.int32)
        blocks = np.split(train, range(BLOCK, len(train), BLOCK))
        chosen[train] = clusters.assign(vectors.of(block) for block in blocks)
        others = np.flatnonzero((load_split(self.split) != DROPPED) & ~training(self.split))
        chosen[others] = clusters.nearest(vectors.of(others))
        np.save(task.out / CLUSTERS_NAME, chosen)
        numbers = sample(train, REPORT_DOCUMENTS, self.seed)
        shown = vectors.of(numbers)
        names = [document.path for document in self.documents.find(numbers.tolist())]
        found = describe(clusters, load_embedder(self.embedder.folders[0]), shown, chosen[numbers], names)
        for number, entry in enumerate(found):
            entry["documents"] = int((chosen[train] == number).sum())
        labels = [" ".join(entry["words"][:4]) for entry in found]
        draw(clusters, shown, chosen[numbers], labels, task.out / PICTURE_NAME)
        return {"clusters": found}


@dataclass(frozen=True)
class Order(Step):
    """The training documents of each domain and cluster, one behind the most similar one left."""

    documents: Documents
    split: Output
    vectors: Output
    clusters: Output | None
    config: OrderConfig
    seed: int

    name = "order"
    title = "Ordering documents"

    def settings(self) -> Any:
        return [self.config.model_dump(mode="json"), self.seed]

    def parts(self) -> Sequence[Any]:
        return [[self.vectors.keys, *map(array_hash, groups)] for groups in self._tasks]

    def sizes(self) -> Sequence[int]:
        return [sum(map(len, groups)) for groups in self._tasks]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        vectors, parts = Vectors(self.documents, self.vectors), [np.empty(0, dtype=np.int64)]
        for members in self._tasks[rank]:
            parts.append(members[in_context_order(vectors.of(members), self.config.neighbours, self.seed)])
            task.advance(len(members))
        order = np.concatenate(parts)
        np.save(task.out / ORDER_NAME, order)
        shown = [self._sample_of(order), np.random.default_rng(self.seed).permutation(order)[:REPORT_DOCUMENTS]]
        similar, random = (adjacent_similarity(vectors.of(numbers)) for numbers in shown)
        return {"documents": len(order), "adjacent_similarity": similar, "random_similarity": random}

    def _sample_of(self, order: np.ndarray) -> np.ndarray:
        """A stretch from the middle."""
        first = max(0, (len(order) - REPORT_DOCUMENTS) // 2)
        return order[first : first + REPORT_DOCUMENTS]

    @cached_property
    def _tasks(self) -> list[list[np.ndarray]]:
        """Groups, as many to a task as make it worth starting."""
        tasks: list[list[np.ndarray]] = []
        size = ORDER_TASK_DOCUMENTS
        for members in self._groups:
            if size >= ORDER_TASK_DOCUMENTS:
                tasks.append([])
                size = 0
            tasks[-1].append(members)
            size += len(members)
        return tasks

    @cached_property
    def _groups(self) -> list[np.ndarray]:
        train = np.flatnonzero(training(self.split))
        domain = self.documents.index["domain"][train].astype(np.int64)
        if self.clusters is not None:
            chosen = np.load(self.clusters.folders[0] / CLUSTERS_NAME)[train]
            domain = domain * (int(chosen.max(initial=0)) + 1) + chosen
        order = np.argsort(domain, kind="stable")
        _, begins = np.unique(domain[order], return_index=True)
        return [part for part in np.split(train[order], begins[1:]) if len(part)]


class Vectors:
    """The vectors of all documents, read from where the tasks left them."""

    def __init__(self, documents: Documents, output: Output):
        self._starts = documents.starts
        self._parts = [np.load(folder / VECTORS_NAME, mmap_mode="r") for folder in output.folders]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """``[len(numbers), dimensions]`` float32."""
        result = np.empty((len(numbers), self._parts[0].shape[1] if self._parts else 0), dtype=np.float32)
        tasks = np.searchsorted(self._starts, numbers, side="right") - 1
        for task in np.unique(tasks):
            mine = tasks == task
            result[mine] = self._parts[task][numbers[mine] - self._starts[task]]
        return result


def training(split: Output) -> np.ndarray:
    """``[documents]``: which ones are trained on."""
    return load_split(split) == SPLITS.index(TRAIN)


def sample(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of them, drawn by the seed, rising."""
    if len(numbers) <= count:
        return numbers
    return np.sort(np.random.default_rng(seed).choice(numbers, count, replace=False))


def adjacent_similarity(vectors: np.ndarray) -> float:
    """Mean similarity of each document to the next."""
    return round(float((vectors[1:] * vectors[:-1]).sum(1).mean()), 4) if len(vectors) > 1 else 0.0
