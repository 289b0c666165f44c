"""Rows of one MDS folder, by number: the one place that reads through mosaicml-streaming.

streaming's own dataset classes end an epoch without a word when a shard is missing, check hashes only after a
download, and keep shared memory. Used here is its reader of single shards alone; around it, every shard must be
present in full when the folder is opened, matches its hash before its first row is given, and every row is checked.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from streaming.base.format import reader_from_json

from lightbulb.data.config import DataError
from lightbulb.data.index import ShardFile, read_index

HASHERS: dict[str, Callable[[], Any]] = {
    "sha256": hashlib.sha256,
    "sha1": hashlib.sha1,
    "xxh3_128": xxhash.xxh3_128,
    "xxh3_64": xxhash.xxh3_64,
    "xxh64": xxhash.xxh64,
}
IGNORED_LABEL = -100
PADDING_DOCUMENT = 0  # as data_prep/pack.py has it


class Row(NamedTuple):
    """``[context_length + 1]`` int64 token ids, the number of each token's document in the row (0: padding), and
    whether each counts towards the loss (None: all do)."""

    tokens: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray | None = None

    def labels(self) -> np.ndarray:
        """``[context_length]``: what each token but the last is to predict; ``IGNORED_LABEL`` where nothing."""
        counts = self.document_ids[1:] != PADDING_DOCUMENT
        if self.loss_mask is not None:
            counts = counts & self.loss_mask[1:]
        return np.where(counts, self.tokens[1:], IGNORED_LABEL)


class Shards:
    """The rows of one folder.

    Args:
        folder: holds index.json and the shards.
        context_length: tokens per row less one.
        vocab_size: every id must be below it.

    Raises:
        DataError: the index is wrong, or a shard is missing or has another size.
    """

    def __init__(self, folder: Path, context_length: int, vocab_size: int):
        self.folder = folder
        self.vocab_size = vocab_size
        index, entries = read_index(folder)
        self._files = [shard.raw_data for shard in index.shards]
        for shard in index.shards:
            self._check_present(shard.raw_data)
            if shard.row_length != context_length + 1:
                raise DataError(
                    f"{folder}: rows hold {shard.row_length} tokens, context_length={context_length} needs "
                    f"{context_length + 1}; set context_length={shard.row_length - 1} or run preprocess with yours"
                )
        self._dtypes = [shard.row for shard in index.shards]
        self._readers = [reader_from_json(str(folder), None, entry) for entry in entries]
        self._ends = np.cumsum([shard.samples for shard in index.shards], dtype=np.int64).tolist()
        self._verified = [False] * len(self._files)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.folder}: row {row} of {len(self)}")
        shard = bisect_right(self._ends, row)
        sample = row - (self._ends[shard - 1] if shard else 0)
        if not self._verified[shard]:
            self._check_hash(self._files[shard])
            self._verified[shard] = True
        try:
            # The columns' types are known from the checked index; the reader would parse their names for every row.
            (columns,) = np.frombuffer(self._readers[shard].get_sample_data(sample), dtype=self._dtypes[shard])
        except (OSError, ValueError, IndexError) as error:
            raise DataError(
                f"{self._path(shard)}: sample {sample} cannot be read ({error}); the file changed after it was "
                "checked, so run `lightbulb preprocess` again or copy the shard again"
            ) from None
        tokens = columns["tokens"].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise DataError(
                f"{self._path(shard)}: sample {sample} holds token {tokens.max()}, the vocabulary has "
                f"{self.vocab_size}; use the vocabulary size of the corpus's tokenizer.json"
            )
        mask = columns["loss_mask"] != 0 if "loss_mask" in (self._dtypes[shard].names or ()) else None
        return Row(tokens, columns["document_ids"].astype(np.int64), mask)

    def verify(self) -> None:
        """Check the hash of every shard now.

        Raises:
            DataError: a shard's content differs from what was written.
        """
        for problem in self.problems():
            raise DataError(problem)
        self._verified = [True] * len(self._files)

    def problems(self) -> list[str]:
        """What is wrong with each shard whose content differs from what was written."""
        found = []
        for file in self._files:
            try:
                self._check_hash(file)
            except DataError as error:
                found.append(str(error))
        return found

    @property
    def num_shards(self) -> int:
        """Files."""
        return len(self._files)

    def _path(self, shard: int) -> Path:
        return self.folder / self._files[shard].basename

    def _check_present(self, file: ShardFile) -> None:
        path = self.folder / file.basename
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the shard again, or run `lightbulb preprocess` again")
        size = path.stat().st_size
        if size != file.bytes:
            raise DataError(
                f"{path}: {size} bytes, index.json says {file.bytes}; copy the shard again, "
                "or run `lightbulb preprocess` again"
            )
        if not HASHERS.keys() & file.hashes.keys():
            raise DataError(f"{path}: hashed with {', '.join(file.hashes)}; known are {', '.join(HASHERS)}")

    def _check_hash(self, file: ShardFile) -> None:
        path = self.folder / file.basename
        name = next(name for name in HASHERS if name in file.hashes)
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, HASHERS[name]).hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); copy the shard again") from None
        if found != file.hashes[name]:
            raise DataError(
                f"{path}: damaged, its {name} is {found} and index.json says {file.hashes[name]}; "
                "copy the shard again, or run `lightbulb preprocess` again"
            )
