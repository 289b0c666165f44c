"""Duplicates: of documents that are equal, or nearly, the first in the order of the corpus stays.

Equal texts are found by 128 bits of XXH3. Documents are dealt to tasks by their hash, so that equal ones meet in one
task and memory holds the numbers of one task only. Near-duplicates are found by their MinHash signatures
(:mod:`lightbulb.data_prep.minhash`), which tasks compute and one task compares, from a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightbulb.data_prep.config import NearConfig
from lightbulb.data_prep.documents import DROPPED_NAME, Documents, array_hash, batched
from lightbulb.data_prep.minhash import PERMUTATIONS, first_of_group, signatures
from lightbulb.data_prep.step import Output, Step, Task

TASK_DOCUMENTS = 1 << 24
KEPT_NAME = "kept.npy"
SIGNATURES_NAME, NUMBERS_NAME = "signatures.npy", "numbers.npy"


@dataclass(frozen=True)
class ExactDuplicates(Step):
    """Drops every document whose text stood before; ``kept.npy`` holds, for each, the number of the one that stays."""

    documents: Documents

    name = "exact"
    title = "Exact duplicates"

    def settings(self) -> Any:
        return None

    def parts(self) -> Sequence[Any]:
        tasks = -(-len(self.documents) // TASK_DOCUMENTS) or 1
        return [{"documents": self.documents.read.keys, "task": [rank, tasks]} for rank in range(tasks)]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        content = self.documents.index["content"]
        numbers = np.flatnonzero(content[:, 0] % len(self.parts()) == rank)
        # A stable sort: the first of equal ones comes first.
        order = numbers[np.lexsort((content[numbers, 1], content[numbers, 0]))]
        is_same = np.zeros(len(order), dtype=bool)
        is_same[1:] = (content[order[1:]] == content[order[:-1]]).all(axis=1)
        first = order[np.maximum.accumulate(np.where(is_same, 0, np.arange(len(order))))] if len(order) else order
        repeated, stays = order[is_same], first[is_same]
        by_number = np.argsort(repeated)
        np.save(task.out / DROPPED_NAME, repeated[by_number])
        np.save(task.out / KEPT_NAME, stays[by_number])
        return {"documents": len(numbers), "dropped": len(repeated)}


@dataclass(frozen=True)
class Signatures(Step):
    """MinHash signatures of the documents that are still wanted and have a word, and those documents' numbers.

    Attributes:
        wanted: ``[documents]`` bool.
    """

    documents: Documents
    wanted: np.ndarray
    ngram: int

    name = "signatures"
    title = "Signing documents"

    def settings(self) -> Any:
        return self.ngram

    def parts(self) -> Sequence[Any]:
        keys = self.documents.read.keys
        return [[key, array_hash(self.wanted[self.documents.of_task(task)])] for task, key in enumerate(keys)]

    def sizes(self) -> Sequence[int]:
        return [int(self.wanted[self.documents.of_task(task)].sum()) for task in range(len(self.documents.read.keys))]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        rows, numbers = [np.empty((0, PERMUTATIONS), np.uint32)], [np.empty(0, np.int64)]
        for batch in batched(self.documents.texts(rank, self.wanted)):
            found, has_words = signatures([text for _, text in batch], self.ngram)
            rows.append(found[has_words])
            numbers.append(np.array([number for number, _ in batch])[has_words])
            task.advance(len(batch))
        np.save(task.out / SIGNATURES_NAME, np.concatenate(rows))
        np.save(task.out / NUMBERS_NAME, np.concatenate(numbers))
        return {"documents": sum(map(len, numbers))}


@dataclass(frozen=True)
class NearDuplicates(Step):
    """Drops every document that is nearly one that stood before; ``kept.npy`` says which one stays."""

    signatures: Output
    config: NearConfig

    name = "near"
    title = "Near-duplicates"

    def settings(self) -> Any:
        return self.config.threshold

    def parts(self) -> Sequence[Any]:
        return [self.signatures.keys]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        numbers = np.concatenate([np.load(folder / NUMBERS_NAME) for folder in self.signatures.folders])
        together = task.out / "together.npy"
        shape = (len(numbers), PERMUTATIONS)
        rows = np.lib.format.open_memmap(together, mode="w+", dtype=np.uint32, shape=shape) if len(numbers) else None
        place = 0
        for folder in self.signatures.folders:
            part = np.load(folder / SIGNATURES_NAME, mmap_mode="r")
            if rows is not None:
                rows[place : place + len(part)] = part
            place += len(part)
        first = np.arange(0) if rows is None else first_of_group(rows, self.config.threshold)
        del rows
        together.unlink(missing_ok=True)
        repeated = np.flatnonzero(first != np.arange(len(first)))
        np.save(task.out / DROPPED_NAME, numbers[repeated])
        np.save(task.out / KEPT_NAME, numbers[first[repeated]])
        return {"documents": len(numbers), "dropped": len(repeated)}
