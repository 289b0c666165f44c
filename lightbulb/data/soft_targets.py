"""Targets beside the rows of a corpus: for every position the likeliest next tokens and their probabilities.

A folder has a manifest and shards of safetensors, each with ``ids [rows, length, k]`` (int32) and ``probabilities``
(float32) of consecutive training rows. The row's number in the corpus connects them, so order, mixture and layout of a
run do not matter. Shards are compared with their hash on first use. `lightbulb upcycle` with ``method: fuse`` writes
them.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import torch
import xxhash
from pydantic import BaseModel, Field, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open

from lightbulb.config import Config, describe
from lightbulb.data.config import DataError
from lightbulb.data.corpus import Corpus
from lightbulb.nn.soft_targets import SoftTargets

MANIFEST = "targets.json"
AGAIN = "run `lightbulb upcycle` with method: fuse again"


class DistilConfig(Config):
    """Learning from other models' distributions besides the text (Wan et al. 2024, arXiv:2401.10491)."""

    targets: Path
    """Folder that `lightbulb upcycle` with ``method: fuse`` wrote for this corpus."""
    language_share: float = Field(0.9, ge=0, le=1)
    """Weight of the language-modelling loss; the divergence from the targets has the rest."""


class TargetShard(BaseModel):
    """A file of consecutive rows."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    rows: StrictInt = Field(ge=1)
    bytes: StrictInt
    xxh3_128: str


class TargetManifest(BaseModel):
    """What a folder of targets holds."""

    format: Literal[1] = 1
    corpus_digest: str
    """Of the training split."""
    tokenizer_digest: str
    context_length: StrictInt
    top_k: StrictInt
    shards: list[TargetShard]
    about: dict[str, Any]
    """How they were made, for people."""


class SoftTargetFolder:
    """The targets of a corpus's training rows.

    Raises:
        DataError: no such folder, or of another corpus.
    """

    def __init__(self, config: DistilConfig, corpus: Corpus):
        self.config, self.folder = config, config.targets.expanduser()
        self.manifest = read_target_manifest(self.folder)
        for name, ours in (("corpus_digest", corpus.digest), ("tokenizer_digest", corpus.tokenizer_digest)):
            theirs = getattr(self.manifest, name)
            if theirs != ours:
                raise DataError(
                    f"{self.folder}: written for another corpus ({name} {theirs[:12]}, {corpus.path} has {ours[:12]}); "
                    f"set distil.targets to the folder of this one, or {AGAIN}"
                )
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._open: dict[int, Any] = {}
        if self._ends[-1:] != [len(corpus)]:
            raise DataError(f"{self.folder}: has targets for {self._ends[-1:]} rows of {len(corpus)}; {AGAIN}")

    def batch(self, rows: Sequence[int] | np.ndarray, size: int) -> SoftTargets:
        """Targets of a batch of ``size``; what is missing to it has none."""
        shape = (size, self.manifest.context_length, self.manifest.top_k)
        ids, probabilities = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        for place, row in enumerate(rows):
            shard = bisect_right(self._ends, int(row))
            here = int(row) - (self._ends[shard - 1] if shard else 0)
            file = self._file(shard)
            try:
                ids[place] = file.get_slice("ids")[here]
                probabilities[place] = file.get_slice("probabilities")[here]
            except (SafetensorError, RuntimeError) as error:
                raise DataError(f"{self._path(shard)}: row {here} cannot be read ({error}); {AGAIN}") from None
        return SoftTargets(ids, probabilities, self.config.language_share)

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].file

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            path, wanted = self._path(shard), self.manifest.shards[shard]
            if hash_of(path) != wanted.xxh3_128:
                raise DataError(f"{path}: damaged: its hash is not the one that was written; {AGAIN}")
            self._open[shard] = safe_open(path, framework="pt")
        return self._open[shard]


def read_target_manifest(folder: Path) -> TargetManifest:
    """The manifest of a folder of targets.

    Raises:
        DataError: missing or of another version.
    """
    file = folder / MANIFEST
    try:
        return TargetManifest.model_validate(orjson.loads(file.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{file}: missing; set distil.targets to a folder of targets, or {AGAIN}") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {AGAIN}") from None
    except ValidationError as error:
        raise DataError(f"{file}: {describe(error)[0]}; {AGAIN}") from None


def hash_of(path: Path) -> str:
    """The xxh3-128 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
