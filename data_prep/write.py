"""Groups of documents to shards: which rows each group has, and the rows themselves.

A group is one domain of one split, or one cluster of one domain of one split; its name is its folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightbulb.data_prep.config import PackConfig
from lightbulb.data_prep.documents import Documents
from lightbulb.data_prep.mds import ShardFormat
from lightbulb.data_prep.pack import PADDING_DOCUMENT, Rows, best_fit, concatenate, shuffled
from lightbulb.data_prep.split import DROPPED, HELD_OUT, SPLITS, TRAIN, load_split
from lightbulb.data_prep.step import Output, Step, Task
from lightbulb.data_prep.tokenise import map_tokens, token_lengths
from lightbulb.data_prep.turns import COUNTED_NAME, counted_lengths

CLUSTERS_NAME = "clusters.npy"
ORDER_NAME = "order.npy"
TASK_TOKENS = 1 << 27

SEGMENT = np.dtype([("document", "<u8"), ("start", "<u8"), ("task", "<u4"), ("length", "<u4")])
"""A segment's document, where its tokens begin in the tokens of its task, the task, and how many there are."""


class Group(NamedTuple):
    """Documents that share a folder; ``number`` is the group's place among all there could be."""

    number: int
    split: str
    domain: str
    cluster: int | None
    documents: np.ndarray

    @property
    def name(self) -> str:
        """Its folder below the split's."""
        return self.domain if self.cluster is None else f"{self.domain}/cluster-{self.cluster:02}"


@dataclass(frozen=True)
class Pack(Step):
    """Decides the rows of every group; writes ``<group>.ends.npy`` and ``<group>.segments.npy``.

    Attributes:
        clusters: a step that wrote ``clusters.npy``, ``[documents]`` the number of each one's cluster, or None.
        conversations: numbers of the sources that hold some; groups with any of theirs are packed by best fit.
        order: a step whose tasks wrote ``order.npy``, together the numbers of all training documents in the order to
            pack, or None.
    """

    documents: Documents
    split: Output
    tokens: Output
    clusters: Output | None
    order: Output | None
    config: PackConfig
    context_length: int
    seed: int
    conversations: tuple[int, ...] = ()

    name = "pack"
    title = "Packing"

    def settings(self) -> Any:
        return [self.config.model_dump(mode="json"), self.context_length, self.seed, self.conversations]

    def parts(self) -> Sequence[Any]:
        outputs = {"split": self.split, "tokens": self.tokens, "clusters": self.clusters, "order": self.order}
        return [{name: output and output.keys for name, output in outputs.items()}]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        starts, lengths = token_lengths(self.documents, load_split(self.split), self.tokens)
        counted = counted_lengths(self.documents, self.split, self.tokens) if self.conversations else None
        reports = []
        for group in self.groups(lengths > 0):
            rows = self._rows(group, lengths[group.documents])
            numbers = group.documents[rows.document]
            segments = np.empty(len(numbers), dtype=SEGMENT)
            segments["document"] = numbers
            segments["task"] = np.searchsorted(self.documents.starts, numbers, side="right") - 1
            segments["start"] = starts[numbers] + rows.start
            segments["length"] = rows.length
            np.save(task.out / f"{group.number:05}.ends.npy", rows.ends)
            np.save(task.out / f"{group.number:05}.segments.npy", segments)
            report = self._report(group, rows, int(lengths[group.documents].sum()))
            if counted is not None:
                report["counted_tokens"] = int(counted[group.documents].sum())
            reports.append(report)
        return {"groups": reports}

    def groups(self, has_tokens: np.ndarray) -> list[Group]:
        """All groups with a document that has tokens: split by split, domain by domain, cluster by cluster."""
        split, domain = load_split(self.split), self.documents.index["domain"]
        cluster = np.load(self.clusters.folders[0] / CLUSTERS_NAME) if self.clusters else np.zeros_like(domain)
        num_clusters = int(cluster.max(initial=0)) + 1
        order = np.arange(len(split))
        if self.order is not None:
            order = np.concatenate(
                [
                    *(np.load(folder / ORDER_NAME) for folder in self.order.folders),
                    np.flatnonzero(split == SPLITS.index(HELD_OUT)),
                ]
            )
        order = order[(split[order] != DROPPED) & has_tokens[order]]
        number_of = (split[order].astype(np.int64) * len(self.documents.domains) + domain[order]) * num_clusters
        number_of += cluster[order]
        by_group = np.argsort(number_of, kind="stable")
        numbers, begins = np.unique(number_of[by_group], return_index=True)
        groups = []
        for number, members in zip(numbers.tolist(), np.split(order[by_group], begins[1:]), strict=True):
            rest, of_cluster = divmod(number, num_clusters)
            of_split, of_domain = divmod(rest, len(self.documents.domains))
            name = of_cluster if self.clusters else None
            groups.append(Group(number, SPLITS[of_split], self.documents.domains[of_domain], name, members))
        return groups

    def _rows(self, group: Group, lengths: np.ndarray) -> Rows:
        """The rows of a group; reorders its documents where packing shuffles them."""
        if self._is_best_fit(group):
            rows = best_fit(lengths, self.context_length)
            return rows if group.split == HELD_OUT else shuffled(rows, (self.seed, group.number))
        if group.split == HELD_OUT:
            return concatenate(lengths, self.context_length, is_padded=True)
        seed = (self.seed, group.number)
        if self.config.method == "ordered":
            return shuffled(concatenate(lengths, self.context_length, is_padded=False), seed)
        order = np.random.default_rng(seed).permutation(len(lengths))
        rows = concatenate(lengths[order], self.context_length, is_padded=False)
        return rows._replace(document=order[rows.document])

    def _is_best_fit(self, group: Group) -> bool:
        """An answer without its prompt is worth little: conversations stay whole, evaluated ones too."""
        if group.split == TRAIN and self.config.method == "best_fit":
            return True
        return bool(np.isin(self.documents.index["source"][group.documents], self.conversations).any())

    def _report(self, group: Group, rows: Rows, tokens: int) -> dict[str, Any]:
        # What rows share, at the token they overlap by, is counted once.
        shared = 0 if self._is_best_fit(group) else max(0, len(rows.ends) - 1)
        return {
            "number": group.number,
            "split": group.split,
            "name": group.name,
            "domain": group.domain,
            "cluster": group.cluster,
            "documents": len(group.documents),
            "bytes": int(self.documents.index["bytes"][group.documents].astype(np.int64).sum()),
            "tokens": tokens,
            "rows": len(rows.ends),
            "segments": len(rows.length),
            "unused_tokens": max(0, tokens - int(rows.length.sum()) + shared) if len(rows.ends) else tokens,
        }


@dataclass(frozen=True)
class Write(Step):
    """Writes the shards of every group with a row; the report lists them as the index does."""

    pack: Output
    tokens: Output
    context_length: int
    shard_bytes: int
    eos_id: int

    name = "shards"
    title = "Writing rows"

    def settings(self) -> Any:
        return [self.context_length, self.shard_bytes, self.eos_id]

    def parts(self) -> Sequence[Any]:
        return [
            {"pack": self.pack.keys, "rows": [[group["number"], *rows] for group, rows in task]} for task in self.tasks
        ]

    def sizes(self) -> Sequence[int]:
        return [sum(last - first for _, (first, last) in task) for task in self.tasks]

    @cached_property
    def format(self) -> ShardFormat:
        """Of every shard."""
        return ShardFormat(self.context_length + 1, self._dtype, self.shard_bytes, self._has_mask)

    @property
    def _dtype(self) -> str:
        return self.tokens.reports[0]["dtype"]

    @property
    def _has_mask(self) -> bool:
        return (self.tokens.folders[0] / COUNTED_NAME).exists()

    @cached_property
    def tasks(self) -> list[list[tuple[dict[str, Any], tuple[int, int]]]]:
        """Each task's groups and ranges of their rows, whole numbers of shards."""
        per_shard = self.format.rows_per_shard
        most = max(1, TASK_TOKENS // (self.context_length + 1) // per_shard) * per_shard
        tasks: list[list[tuple[dict[str, Any], tuple[int, int]]]] = []
        size = most
        for group in self.pack.reports[0]["groups"]:
            for first in range(0, group["rows"], most):
                if size >= most:
                    tasks.append([])
                    size = 0
                last = min(first + most, group["rows"])
                tasks[-1].append((group, (first, last)))
                size += last - first
        return tasks

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        columns = {"tokens": [map_tokens(folder, self._dtype) for folder in self.tokens.folders]}
        if self._has_mask:
            columns["loss_mask"] = [map_tokens(folder, "uint8", COUNTED_NAME) for folder in self.tokens.folders]
        shards: dict[str, list[dict[str, Any]]] = {}
        for group, rows in self.tasks[rank]:
            name = f"{group['number']:05}"
            folder = task.out / name
            folder.mkdir()
            shards[name] = self._write(folder, name, rows, columns, task.advance)
        return {"shards": shards}

    def _write(
        self,
        folder: Path,
        group: str,
        rows: tuple[int, int],
        columns: Mapping[str, Sequence[np.ndarray]],
        advance: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        """Write a range of a group's rows; gives the shards' entries."""
        ends = np.load(self.pack.folders[0] / f"{group}.ends.npy", mmap_mode="r")
        segments = np.load(self.pack.folders[0] / f"{group}.segments.npy", mmap_mode="r")
        per_shard = self.format.rows_per_shard
        shards = []
        for start in range(*rows, per_shard):
            stop = min(start + per_shard, rows[1])
            begin = int(ends[start - 1]) if start else 0
            content = self.rows(segments[begin : int(ends[stop - 1])], ends[start:stop] - begin, columns)
            shards.append(self.format.write(folder, start // per_shard, content))
            advance(stop - start)
        return shards

    def rows(self, segments: np.ndarray, ends: np.ndarray, columns: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        """``[rows]`` of the shards' dtype from their segments; what a row lacks is padding."""
        counts = np.diff(ends, prepend=0)
        number = np.arange(len(segments)) - np.repeat(ends - counts, counts) + 1
        filled = np.add.reduceat(segments["length"].astype(np.int64), ends - counts)
        rows = np.zeros(len(ends), dtype=self.format.row)
        rows["tokens"], rows["document_ids"] = self.eos_id, PADDING_DOCUMENT
        is_filled = np.arange(self.context_length + 1) < filled[:, None]
        for name, values in columns.items():
            pieces = [values[task][start : start + length] for _, start, task, length in segments.tolist()]
            rows[name][is_filled] = np.concatenate(pieces)
        rows["document_ids"][is_filled] = np.repeat(number, segments["length"])
        return rows
