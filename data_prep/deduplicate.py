"""Exact duplicates: of documents whose texts are equal, the first in the order of the corpus stays.

Texts are compared by 128 bits of XXH3. Documents are dealt to tasks by their hash, so that equal ones meet in one task
and memory holds the numbers of one task only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightbulb.data_prep.documents import DROPPED_NAME, Documents
from lightbulb.data_prep.step import Step, Task

TASK_DOCUMENTS = 1 << 24


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
        np.save(task.out / "kept.npy", stays[by_number])
        return {"documents": len(numbers), "dropped": len(repeated)}
