"""Shards: the bytes that mosaicml-streaming's own writer gives."""

from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from lightbulb.data_prep.mds import ShardFormat, write_index
from lightbulb.folder import FolderError


@pytest.mark.parametrize("shard_bytes", [1 << 12, 10_007, 1 << 20])
@pytest.mark.parametrize(("length", "dtype"), [(9, "uint16"), (33, "uint32")])
def test_shards_are_those_of_the_streaming_library(tmp_path: Path, length: int, dtype: str, shard_bytes: int) -> None:
    shards = ShardFormat(length, dtype, shard_bytes)
    rows = np.zeros(301, dtype=shards.row)
    rows["tokens"] = np.random.default_rng(0).integers(0, 60_000, (301, length))
    rows["document_ids"] = np.arange(301)[:, None] % 7
    (tmp_path / "ours").mkdir()
    starts = range(0, len(rows), shards.rows_per_shard)
    entries = [
        shards.write(tmp_path / "ours", number, rows[start : start + shards.rows_per_shard])
        for number, start in enumerate(starts)
    ]
    write_index(tmp_path / "ours", entries)
    columns = {"tokens": f"ndarray:{dtype}:{length}", "document_ids": f"ndarray:uint16:{length}"}
    with MDSWriter(out=str(tmp_path / "theirs"), columns=columns, hashes=["xxh64"], size_limit=shard_bytes) as writer:
        for row in rows:
            writer.write({"tokens": row["tokens"], "document_ids": row["document_ids"]})
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / side).iterdir()} for side in ("ours", "theirs"))
    assert ours == theirs and len(ours) == len(entries) + 1


def test_a_row_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    shards = ShardFormat(5000, "uint32", 1 << 12)
    assert shards.rows_per_shard == 1
    assert shards.write(tmp_path, 3, np.zeros(1, dtype=shards.row))["raw_data"]["basename"] == "shard.00003.mds"


def test_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shards = ShardFormat(9, "uint16", 1 << 12)
    with pytest.raises(FolderError, match="a file stands where a folder is needed"):
        shards.write(tmp_path / "file", 0, np.zeros(1, dtype=shards.row))
