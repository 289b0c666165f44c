"""Texts to tokens: the tokenizer, and the token ids of every document that is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import TokenizerConfig
from lightbulb.data_prep.documents import Documents, array_hash, batched_by
from lightbulb.data_prep.split import DROPPED, SPLITS, TRAIN, load_split
from lightbulb.data_prep.step import Output, Step, Task
from lightbulb.folder import explained

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"
LENGTHS_NAME = "lengths.npy"
BATCH_CHARS = 1 << 22


@dataclass(frozen=True)
class MakeTokenizer(Step):
    """Loads a tokenizer, or trains one on the first ``train_bytes`` of the training documents."""

    config: TokenizerConfig
    documents: Documents
    split: Output

    name = "tokenizer"
    title = "Tokenizer"

    def settings(self) -> Any:
        return self.config.model_dump(mode="json", exclude={"path"})

    def parts(self) -> Sequence[Any]:
        if self.config.path is not None:
            return [Tokenizer.load(self.config.path.expanduser(), self.config.eos).digest]
        return [{"documents": self.documents.read.keys, "split": self.split.keys}]

    def sizes(self) -> Sequence[int]:
        return [1 if self.config.path is not None else int(self._chosen().sum())]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        if self.config.path is not None:
            tokenizer = Tokenizer.load(self.config.path.expanduser(), self.config.eos)
        else:
            texts = self._texts(self._chosen())
            wanted = self.config
            tokenizer = Tokenizer.train(texts, wanted.vocab_size, lambda _: task.advance(1), wanted.method)
        tokenizer.save(task.out / TOKENIZER_NAME)
        return {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}

    def _chosen(self) -> np.ndarray:
        """``[documents]``: which ones it is trained on, the first always."""
        train = load_split(self.split) == SPLITS.index(TRAIN)
        sizes = self.documents.index["bytes"].astype(np.int64)
        is_first = np.cumsum(train) == 1
        return train & (is_first | (np.cumsum(sizes * train) <= self.config.train_bytes))

    def _texts(self, chosen: np.ndarray) -> Iterator[str]:
        for task in range(len(self.documents.read.folders)):
            if chosen[self.documents.of_task(task)].any():
                yield from (text for _, text in self.documents.texts(task, chosen))


@dataclass(frozen=True)
class Tokenise(Step):
    """The ids of every document kept, each with its end of text, in the order of the documents."""

    documents: Documents
    split: Output
    tokenizer: Output
    eos: str | None

    name = "tokens"
    title = "Tokenising documents"

    def settings(self) -> Any:
        return {"tokenizer": self.tokenizer.reports[0]}

    def parts(self) -> Sequence[Any]:
        kept, keys = self._kept(), self.documents.read.keys
        return [
            {"documents": key, "kept": array_hash(kept[self.documents.of_task(task)])} for task, key in enumerate(keys)
        ]

    def sizes(self) -> Sequence[int]:
        kept = self._kept()
        return [int(kept[self.documents.of_task(task)].sum()) for task in range(len(self.documents.read.folders))]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        tokenizer = Tokenizer.load(self.tokenizer.folders[0] / TOKENIZER_NAME, self.eos)
        dtype = token_dtype(tokenizer.vocab_size)
        lengths: list[int] = []
        with explained(task.out), (task.out / TOKENS_NAME).open("wb") as file:
            texts = (text for _, text in self.documents.texts(rank, self._kept()))
            for batch in batched_by(texts, len, BATCH_CHARS):
                for ids in tokenizer.encode_arrays(batch, task.threads):
                    np.append(ids, tokenizer.eos_id).astype(dtype).tofile(file)
                    lengths.append(len(ids) + 1)
                task.advance(len(batch))
        np.save(task.out / LENGTHS_NAME, np.array(lengths, dtype=np.int64))
        return {"documents": len(lengths), "tokens": sum(lengths), "dtype": dtype}

    def _kept(self) -> np.ndarray:
        return load_split(self.split) != DROPPED


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def token_lengths(documents: Documents, split: np.ndarray, tokens: Output) -> tuple[np.ndarray, np.ndarray]:
    """``[documents]`` each: where a document begins in its task's tokens, and how many it has (0 where dropped)."""
    starts, lengths = np.zeros(len(documents), dtype=np.int64), np.zeros(len(documents), dtype=np.int64)
    for task, folder in enumerate(tokens.folders):
        numbers = int(documents.starts[task]) + np.flatnonzero(split[documents.of_task(task)] != DROPPED)
        lengths[numbers] = np.load(folder / LENGTHS_NAME)
        starts[numbers] = np.cumsum(lengths[numbers]) - lengths[numbers]
    return starts, lengths


def map_tokens(folder: Path, dtype: str, name: str = TOKENS_NAME) -> np.ndarray:
    """All ids of a task, end to end, mapped from disk; or what a file of another name says of each."""
    path = folder / name
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
