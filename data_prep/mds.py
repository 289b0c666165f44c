"""Rows to MDS shards, as mosaicml-streaming's ``MDSWriter`` writes them, byte for byte.

The writer itself is not used: importing it takes ten seconds of every worker, and it takes rows one at a time, at a
quarter of the rate at which rows of one size can be laid out in an array. A shard is the number of rows, the offset
of each row and of the end, the description of the columns as JSON, and the rows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lightbulb.folder import explained

SHARD_HASH = "xxh64"
"""What each shard is hashed with; streaming and xxhash know it by this name."""

INDEX_NAME = "index.json"


class ShardFormat:
    """Shards of rows with ``length`` tokens each, and the number of each token's document.

    Args:
        length: tokens per row.
        token_dtype: uint16 or uint32.
        shard_bytes: a shard holds as many rows as fit, and at least one.
        with_mask: rows also say of each token whether it counts towards the loss.
    """

    def __init__(self, length: int, token_dtype: str, shard_bytes: int, with_mask: bool = False):
        number_dtype = "uint16" if length < 1 << 16 else "uint32"
        dtypes = (
            {"document_ids": number_dtype} | ({"loss_mask": "uint8"} if with_mask else {}) | {"tokens": token_dtype}
        )
        self.row = np.dtype([(name, dtype, length) for name, dtype in dtypes.items()])
        """Columns in the order of their names, as MDS lays them out."""

        self._config = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [SHARD_HASH],
            "size_limit": shard_bytes,
            "column_names": list(self.row.names or ()),
            "column_encodings": [f"ndarray:{dtype}:{length}" for dtype in dtypes.values()],
            "column_sizes": [self.row[name].itemsize for name in self.row.names or ()],
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        room = shard_bytes - 8 - len(self._header)
        self.rows_per_shard = max(1, room // (self.row.itemsize + 4))

    def write(self, folder: Path, number: int, rows: np.ndarray) -> dict[str, Any]:
        """Write rows of dtype ``row`` as the shard with this number; gives its entry in the index.

        Raises:
            FolderError: the disk is full or not writable.
        """
        offsets = 4 * (len(rows) + 2) + len(self._header) + np.arange(len(rows) + 1) * self.row.itemsize
        path = folder / f"shard.{number:05}.mds"
        hasher = xxhash.xxh64()
        size = 0
        with explained(path, rows.nbytes), path.open("wb") as file:
            for piece in (np.uint32(len(rows)).tobytes(), offsets.astype(np.uint32).tobytes(), self._header, rows.data):
                hasher.update(piece)
                size += memoryview(piece).nbytes
                file.write(piece)
        raw = {"basename": path.name, "bytes": size, "hashes": {SHARD_HASH: hasher.hexdigest()}}
        return {**self._config, "raw_data": raw, "samples": len(rows), "zip_data": None}

    def read(self, path: Path, row: int) -> np.void:
        """One row of a shard that was written in this format."""
        with path.open("rb") as file:
            file.seek(4 * (row + 1))
            offset = int.from_bytes(file.read(4), "little")
            file.seek(offset)
            return np.frombuffer(file.read(self.row.itemsize), dtype=self.row)[0]


def write_index(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Write the index of a folder of shards.

    Raises:
        FolderError: the disk is full or not writable.
    """
    path = folder / INDEX_NAME
    with explained(path):
        path.write_text(json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True))
