"""Every way a folder of shards can be wrong is found and named, before or at the first row it would spoil."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from lightbulb.data.config import DataError
from lightbulb.data.shards import Shards

LENGTH, VOCAB = 16, 300


@pytest.fixture
def folder(corpus: Path) -> Path:
    return corpus / "train" / "plain"


def change_index(folder: Path, change: Callable[[Any], Any]) -> None:
    index = orjson.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_bytes(orjson.dumps(change(index) or index))


def change_shard(**values: Any) -> Callable[[Any], None]:
    return lambda index: index["shards"][1].update(values)


def change_file(**values: Any) -> Callable[[Any], None]:
    return lambda index: index["shards"][1]["raw_data"].update(values)


def test_rows_come_in_order_across_shards(folder: Path) -> None:
    shards = Shards(folder, LENGTH, VOCAB)
    assert len(list(folder.glob("*.mds"))) > 2
    rows = [shards[i] for i in range(len(shards))]
    assert all(row.tokens.dtype == np.int64 and row.tokens.shape == (LENGTH + 1,) for row in rows)
    assert all(a.tokens[-1] == b.tokens[0] for a, b in zip(rows, rows[1:], strict=False))
    for outside in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards[outside]


def test_missing_shard_is_named_when_opened(folder: Path) -> None:
    (folder / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00001\.mds: missing; copy the shard again"):
        Shards(folder, LENGTH, VOCAB)


@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "truncated"])
def test_shard_of_another_size_is_named_when_opened(folder: Path, size: int) -> None:
    os.truncate(folder / "shard.00001.mds", size)
    with pytest.raises(DataError, match=rf"shard\.00001\.mds: {size} bytes, index\.json says \d+"):
        Shards(folder, LENGTH, VOCAB)


@pytest.mark.parametrize("place", [0, 300, -1], ids=["head", "middle", "last"])
def test_flipped_bit_is_found_before_a_row_is_given(folder: Path, place: int) -> None:
    path = folder / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    shards = Shards(folder, LENGTH, VOCAB)
    assert shards[0].tokens.shape == (LENGTH + 1,)
    first_bad = next(i for i in range(len(shards)) if i >= shards._ends[0])
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard\.00001\.mds: damaged, its xxh64 is"):
            shards[first_bad]
    with pytest.raises(DataError, match=r"shard\.00001\.mds: damaged"):
        shards.verify()


def test_sound_folder_verifies(folder: Path) -> None:
    Shards(folder, LENGTH, VOCAB).verify()


def test_shard_cut_after_its_check_is_named_with_the_sample(folder: Path) -> None:
    shards = Shards(folder, LENGTH, VOCAB)
    shards.verify()
    os.truncate(folder / "shard.00000.mds", 1000)
    with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 40 cannot be read"):
        shards[40]
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 0 cannot be read"):
        shards[0]


def test_token_outside_the_vocabulary_names_shard_and_sample(folder: Path) -> None:
    shards = Shards(folder, LENGTH, vocab_size=2)
    with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 3 holds token \d+, the vocabulary has 2"):
        shards[3]


def test_another_context_length_is_refused_with_both(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows hold 17 tokens, context_length=32 needs 33; set context_length=16"):
        Shards(folder, 32, VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_file(basename="../secret/x.mds"), "basename"),
        (change_file(basename="/etc/passwd"), "basename"),
        (change_file(basename=".."), "basename"),
        (change_file(basename="a\\b.mds"), "basename"),
        (change_file(basename="C:x.mds"), "basename"),
        (change_file(basename="shard\0.mds"), "basename"),
        (change_file(basename="shard.mds\n"), "basename"),
        (change_file(basename="shard.00000.mds"), r"shard\.00000\.mds is listed 2 times"),
        (change_file(bytes=-1), r"bytes: .*\(got -1\)"),
        (change_file(bytes=1e9), "bytes"),
        (change_file(bytes=1 << 40), "bytes"),
        (change_file(hashes={}), "no hash for shard"),
        (change_file(hashes={"crc32": "00"}), r"hashed with crc32; known are sha256"),
        (change_shard(samples=10_000), r"10000 samples need \d+ bytes, shard\.00001\.mds has less"),
        (change_shard(samples=True), "samples"),
        (change_shard(column_encodings=["pkl", "ndarray:uint16:17"]), "do not match column sizes"),
        (change_shard(column_names=["document_ids", "text"]), r"columns are .* expected \['document_ids', 'tokens'\]"),
        (change_shard(compression="zstd"), "compression"),
        (change_shard(format="json"), "format"),
        (change_shard(surprise=1), "unknown key 'surprise'"),
        (lambda index: index.update(version=3), "version"),
        (lambda index: [1], "expected an object"),
        (lambda index: {"version": 2}, "shards: Field required"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_index_is_refused_before_anything_is_opened(
    folder: Path, change: Callable[[Any], Any], message: str
) -> None:
    change_index(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        Shards(folder, LENGTH, VOCAB)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff"], ids=["empty", "cut", "deep", "binary"])
def test_unreadable_index_is_named(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: cannot be read"):
        Shards(folder, LENGTH, VOCAB)


def test_missing_index_is_named(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json: missing; check data\.path"):
        Shards(folder, LENGTH, VOCAB)


def test_shard_without_samples_is_passed_over(folder: Path) -> None:
    expected = [row.tokens.tolist() for row in map(Shards(folder, LENGTH, VOCAB).__getitem__, range(200))]

    def add_empty(index: Any) -> None:
        empty = orjson.loads(orjson.dumps(index["shards"][0]))
        empty["samples"] = 0
        empty["raw_data"]["basename"] = "shard.empty.mds"
        index["shards"].insert(1, empty)

    (folder / "shard.empty.mds").write_bytes((folder / "shard.00000.mds").read_bytes())
    change_index(folder, add_empty)
    shards = Shards(folder, LENGTH, VOCAB)
    assert [shards[i].tokens.tolist() for i in range(200)] == expected
