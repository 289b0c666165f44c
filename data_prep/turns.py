"""Conversations to tokens: ids, and which of them count towards the loss.

Prompts and answers are encoded apart, so that a token never holds some of both, and a prompt gives the ids that it
gives by itself when a model is asked.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.conversation import split
from lightbulb.data_prep.documents import DROPPED_NAME, Documents, batched_by
from lightbulb.data_prep.split import DROPPED, load_split
from lightbulb.data_prep.step import Output, Task
from lightbulb.data_prep.tokenise import LENGTHS_NAME, TOKENIZER_NAME, TOKENS_NAME, Tokenise, token_dtype
from lightbulb.folder import explained

COUNTED_NAME = "counted.bin"
COUNTS_NAME = "counts.npy"
CUT = "cut_to_a_context"
TOO_LONG = "longer_than_a_context"


@dataclass(frozen=True)
class TokeniseTurns(Tokenise):
    """As :class:`Tokenise`, with a byte for every token that says whether it counts, and how many of a document do.

    A conversation that does not fit into a row is cut there or dropped; it then has no tokens, and its number stands in
    ``dropped.npy``.

    Attributes:
        too_long: for each source what happens to such conversations; None where it holds documents.
        row_length: tokens of a row.
    """

    too_long: tuple[str | None, ...]
    row_length: int

    name = "turns"
    title = "Tokenising conversations"

    def settings(self) -> Any:
        return [super().settings(), self.too_long, self.row_length]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        tokenizer = Tokenizer.load(self.tokenizer.folders[0] / TOKENIZER_NAME, self.eos)
        dtype = token_dtype(tokenizer.vocab_size)
        sources = self.documents.index["source"]
        lengths: list[int] = []
        counts: list[int] = []
        dropped: list[int] = []
        cut: Counter[int] = Counter()
        with (
            explained(task.out),
            (task.out / TOKENS_NAME).open("wb") as tokens,
            (task.out / COUNTED_NAME).open("wb") as flags,
        ):
            for batch in batched_by(self.documents.conversations(rank, self._kept()), lambda item: len(item[1])):
                for number, ids, counted in self._encoded(batch, tokenizer, task.threads):
                    fitted = self._fitted(ids, counted, self.too_long[sources[number]])
                    if not fitted:
                        dropped.append(number)
                    cut[int(sources[number])] += 0 < fitted < len(ids)
                    ids[:fitted].astype(dtype).tofile(tokens)
                    counted[:fitted].astype(np.uint8).tofile(flags)
                    lengths.append(fitted)
                    counts.append(int(counted[:fitted].sum()))
                task.advance(len(batch))
        for name, values in ((LENGTHS_NAME, lengths), (COUNTS_NAME, counts), (DROPPED_NAME, dropped)):
            np.save(task.out / name, np.array(values, dtype=np.int64))
        found = {"documents": len(lengths) - len(dropped), "tokens": sum(lengths), "counted_tokens": sum(counts)}
        by_source = {str(source): count for source, count in sorted(cut.items())}
        return found | {"dtype": dtype, "cut": by_source, "dropped": len(dropped)}

    def _encoded(
        self, batch: list[tuple[int, str, list[int]]], tokenizer: Tokenizer, threads: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number, ids and whether each counts, of a list of documents."""
        pieces = [list(split(text, answers)) for _, text, answers in batch]
        encoded = iter(tokenizer.encode_arrays([text for each in pieces for text, _ in each], threads))
        for (number, _, _), own in zip(batch, pieces, strict=True):
            parts = [np.append(next(encoded), [tokenizer.eos_id] * is_answer) for _, is_answer in own]
            flags = [np.full(len(part), is_answer) for part, (_, is_answer) in zip(parts, own, strict=True)]
            yield number, np.concatenate(parts), np.concatenate(flags)

    def _fitted(self, ids: np.ndarray, counted: np.ndarray, too_long: str | None) -> int:
        """How many tokens are kept: a row predicts all its tokens but the first."""
        if too_long is None or len(ids) <= self.row_length:
            return len(ids)
        return self.row_length if too_long == "cut" and counted[1 : self.row_length].any() else 0


def counted_lengths(documents: Documents, split_output: Output, tokens: Output) -> np.ndarray:
    """``[documents]``: how many tokens of each count towards the loss."""
    side = load_split(split_output)
    counts = np.zeros(len(documents), dtype=np.int64)
    for task, folder in enumerate(tokens.folders):
        numbers = int(documents.starts[task]) + np.flatnonzero(side[documents.of_task(task)] != DROPPED)
        counts[numbers] = np.load(folder / COUNTS_NAME)
    return counts
