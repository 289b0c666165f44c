"""Documents on disk, divided into training and held-out ones.

The texts are kept in one file while a corpus is built, so that every later step sees the same documents even when
the inputs change meanwhile, and memory holds a few numbers per document only.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from lightbulb.data_prep.read import CorpusError, Document
from lightbulb.folder import explained

TRAIN = "train"
HELD_OUT = "held_out"
SPLITS = (TRAIN, HELD_OUT)


class Spool:
    """Append documents, close, divide; then read them back in the order they came."""

    def __init__(self, path: Path):
        self._path = path
        with explained(path):
            self._file = path.open("wb")
        self._sizes = array("Q")
        self._hashes = array("Q")
        self._domains = array("H")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explained(self._path):
            self._file.close()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, domain: int, document: Document) -> int:
        """Append one document of the domain with this number; gives its size in bytes."""
        content = document.text.encode("utf-8")
        with explained(self._path, len(content)):
            self._file.write(content)
        self._sizes.append(len(content))
        self._hashes.append(path_hash(document.path))
        self._domains.append(domain)
        return len(content)

    def domains(self) -> np.ndarray:
        """Number of the domain of each document."""
        return np.frombuffer(self._domains, dtype=np.uint16)

    def sizes(self) -> np.ndarray:
        """Bytes of each document."""
        return np.frombuffer(self._sizes, dtype=np.uint64).astype(np.int64)

    def held_out(self, fraction: float, names: Sequence[str]) -> np.ndarray:
        """Which documents are held out: those whose path hashes below the fraction.

        The choice for a document depends on its path alone, so adding documents moves none from one side to the
        other. A domain whose hashes all fall on one side gives one document to the other. ``names`` are the
        domains', for messages.

        Raises:
            CorpusError: a domain has a single document, which cannot be on both sides.
        """
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        if fraction == 0.0:
            return np.zeros(len(hashes), dtype=bool)
        chosen = hashes.astype(np.float64) / 2.0**64 < fraction
        for domain in np.unique(self.domains()):
            members = np.flatnonzero(self.domains() == domain)
            if len(members) == 1:
                raise CorpusError(
                    f"held_out_fraction: domain {names[domain]!r} has one document, which cannot be divided; add "
                    "documents, give a text source a delimiter ('' for blank lines), or set held_out_fraction=0"
                )
            lowest = members[np.argsort(hashes[members], kind="stable")]
            if not chosen[members].any():
                chosen[lowest[0]] = True
            if chosen[members].all():
                chosen[lowest[-1]] = False
        return chosen

    def texts(self, wanted: np.ndarray | None = None) -> Iterator[str]:
        """Texts in the order they came, all or where the mask is set."""
        with self._path.open("rb") as file:
            for i, size in enumerate(self._sizes):
                if wanted is None or wanted[i]:
                    yield file.read(size).decode("utf-8")
                else:
                    file.seek(size, 1)


def path_hash(path: str) -> int:
    """64 bits of a hash of the path, the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode("utf-8")).digest()[:8], "big")
