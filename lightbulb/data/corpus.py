"""One split of a corpus: the rows of all its domains under one numbering, checked against the manifest."""

import hashlib
from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import orjson
from pydantic import BaseModel, Field, StrictInt, ValidationError

from lightbulb.config import describe
from lightbulb.data.config import DataError
from lightbulb.data.mixture import Group
from lightbulb.data.shards import Row, Shards

Split = Literal["train", "held_out"]

GROUP = r"^[a-z0-9][a-z0-9_-]{0,63}(/cluster-[0-9]{2,4})?$"
"""A domain, or one cluster of it: a folder below the split's."""


class _Domain(BaseModel):
    rows: StrictInt
    tokens: StrictInt
    counted_tokens: StrictInt | None = None
    index_sha256: str


class _Tokenizer(BaseModel):
    file: Literal["tokenizer.json"]
    digest: str
    vocab_size: StrictInt


class _Manifest(BaseModel):
    """What training needs of manifest.json; the rest is for people."""

    format: Literal[1, 2]
    context_length: StrictInt
    tokenizer: _Tokenizer
    splits: dict[Split, dict[Annotated[str, Field(pattern=GROUP)], _Domain]]


class Corpus:
    """Rows of one split, domain after domain in the order of their names.

    Attributes:
        domains: the rows of each domain by themselves, or of each cluster of one.
        groups: rows and tokens of the same.
        digest: changes with any row of the split.
        tokenizer_digest: hash of the tokenizer the rows were written with.
        num_tokens: tokens of the documents in the split.

    Raises:
        DataError: missing or changed files, another context length, or a vocabulary larger than the model's.
    """

    def __init__(self, path: Path, split: Split, context_length: int, vocab_size: int):
        self.path = path
        self.split = split
        self.context_length = context_length
        manifest = _read_manifest(path)
        _check_fit(path, manifest, context_length, vocab_size)
        domains = sorted(manifest.splits.get(split, {}).items())
        for name, domain in domains:
            _check_digest(path / split / name / "index.json", domain.index_sha256)
        self.domains = {name: Shards(path / split / name, context_length, vocab_size) for name, _ in domains}
        for name, domain in domains:
            if len(self.domains[name]) != domain.rows:
                raise DataError(
                    f"{path / split / name}: {len(self.domains[name])} rows, manifest.json says {domain.rows}; "
                    "run `lightbulb preprocess` again"
                )
        self.groups = {name: Group(domain.rows, domain.tokens) for name, domain in domains}
        self._shards = list(self.domains.values())
        self._ends = np.cumsum([domain.rows for _, domain in domains], dtype=np.int64).tolist()
        self.num_tokens = sum(domain.tokens for _, domain in domains)
        self.tokenizer_digest = manifest.tokenizer.digest
        listing = [(name, domain.index_sha256) for name, domain in domains]
        self.digest = hashlib.sha256(repr(listing).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Row:
        domain = bisect_right(self._ends, row)
        return self._shards[domain][row - (self._ends[domain - 1] if domain else 0)]


def context_length_of(path: Path) -> int:
    """The context length a corpus was written for.

    Raises:
        DataError: no corpus in the folder, or a damaged manifest.
    """
    return _read_manifest(path).context_length


def tokenizer_of(path: Path) -> str:
    """The digest of a corpus's tokenizer.

    Raises:
        DataError: no corpus in the folder, or a damaged manifest.
    """
    return _read_manifest(path).tokenizer.digest


def holds_conversations(path: Path) -> bool:
    """Whether a corpus says which tokens count towards the loss; not if it cannot be read, which its user will find."""
    try:
        manifest = _read_manifest(path)
    except DataError:
        return False
    return any(group.counted_tokens is not None for groups in manifest.splits.values() for group in groups.values())


def _read_manifest(path: Path) -> _Manifest:
    file = path / "manifest.json"
    try:
        return _Manifest.model_validate(orjson.loads(file.read_bytes()))
    except FileNotFoundError:
        raise DataError(
            f"{file}: missing; set data.path to a corpus folder, or write one with `lightbulb preprocess CONFIG`"
        ) from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); run `lightbulb preprocess` again") from None
    except ValidationError as error:
        raise DataError(f"{file}: {describe(error)[0]}; run `lightbulb preprocess` again") from None


def _check_fit(path: Path, manifest: _Manifest, context_length: int, vocab_size: int) -> None:
    if manifest.context_length != context_length:
        raise DataError(
            f"{path}: written for context_length={manifest.context_length}, the model has {context_length}; "
            f"set the model's to {manifest.context_length} or run preprocess with context_length={context_length}"
        )
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: its tokenizer has {manifest.tokenizer.vocab_size} entries, the model's vocab_size is "
            f"{vocab_size}; set vocab_size to at least {manifest.tokenizer.vocab_size}"
        )
    _check_digest(path / manifest.tokenizer.file, manifest.tokenizer.digest)


def _check_digest(file: Path, digest: str) -> None:
    """The file is the one the manifest was written with."""
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); run `lightbulb preprocess` again") from None
    if found != digest:
        raise DataError(
            f"{file}: not the file manifest.json lists (sha256 {found[:12]}, expected {digest[:12]}): it was changed "
            "or belongs to another corpus; run `lightbulb preprocess` again"
        )
