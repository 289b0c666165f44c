"""Sources of token ids: Megatron's own builder and streaming's own writer are read back id by id."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from streaming import MDSWriter

from lightbulb.config import ConfigError, build_config
from lightbulb.data.config import DataConfig
from lightbulb.data.corpus import Corpus
from lightbulb.data.loader import TrainLoader
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.data_prep.verify import verify_corpus

LENGTH, VOCAB = 16, 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(["some words, some other words and some more words"] * 9, VOCAB).save(path)
    loaded = Tokenizer.load(path)
    loaded.path = path  # type: ignore[attr-defined]
    return loaded


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[list[int]]:
    generator = random.Random(3)
    texts = ["".join(generator.choices("some wrds,", k=generator.randrange(1, 400))) for _ in range(60)]
    return [tokenizer.encode_batch([text])[0] for text in texts]


def write_megatron(folder: Path, documents: list[list[int]], eos: int | None, dtype: Any = np.uint16) -> None:
    folder.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(str(folder / "some.bin"), dtype=dtype)
    for number, ids in enumerate(documents):
        ids = ids if eos is None else [*ids, eos]
        half = len(ids) // 2 if number % 3 == 0 else 0  # some documents of two sequences
        for part in (ids[:half], ids[half:]) if half else (ids,):
            builder.add_item(torch.tensor(part, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(folder / "some.idx"))


def write_mds(folder: Path, samples: list[np.ndarray], encoding: str, **options: Any) -> None:
    columns = {"note": "str", "tokens": encoding, "weight": "float32"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 12, **options) as writer:
        for number, ids in enumerate(samples):
            value = ids.tobytes() if encoding == "bytes" else ids
            writer.write({"note": "n" * (number % 5), "tokens": value, "weight": np.float32(1)})


def config(folder: Path, tokenizer: Any, source: dict, changes: dict | None = None) -> CorpusConfig:
    values = {
        "output": str(folder / "corpus"),
        "context_length": LENGTH,
        "held_out_fraction": 0.2,
        "shard_bytes": 1 << 12,
        "tokenizer": {"path": str(tokenizer.path)},
        "sources": [{"path": str(folder / "source"), **source}],
        "executor": {"workers": 1},
    }
    return build_config(CorpusConfig, values | (changes or {}))


def restored(corpus: Path) -> list[list[int]]:
    """Documents of both splits from the rows by lineage."""
    found: dict[int, dict[int, list[int]]] = {}
    for split in ("train", "held_out"):
        rows = Corpus(corpus, split, LENGTH, VOCAB)
        for name, shards in rows.domains.items():
            at: dict[int, int] = {}
            for piece in pq.read_table(corpus / "lineage" / "rows" / split / f"{name}.parquet").to_pylist():
                begin = at.get(piece["row"], 0)
                tokens = shards[piece["row"]].tokens[begin : begin + piece["length"]].tolist()
                at[piece["row"]] = begin + piece["length"]
                ids = found.setdefault(piece["document"], {})
                ids |= {piece["start"] + i: [token] for i, token in enumerate(tokens)}
    return [[token for i in sorted(ids) for token in ids[i]] for _, ids in sorted(found.items())]


def check_same(corpus: Path, documents: list[list[int]], eos: int) -> None:
    """All ids are in the rows, but for the last training row, which is not full and left out."""
    assert not verify_corpus(corpus).problems
    wanted = [[*ids, eos] for ids in documents if ids]
    found = restored(corpus)
    missing = [ids for ids in wanted if ids not in found]
    assert len(missing) <= 2 and sum(map(len, wanted)) - sum(map(len, found)) <= LENGTH
    loader = TrainLoader(DataConfig(path=corpus), LENGTH, VOCAB, 0, 4, 2)
    assert loader.next_step()[0].tokens.shape == (2, LENGTH)
    loader.close()


@pytest.mark.parametrize(("ends", "dtype"), [(True, np.uint16), (False, np.int32)])
def test_megatron_documents_are_restored(tmp_path: Path, tokenizer: Any, documents: list, ends: bool, dtype) -> None:
    write_megatron(tmp_path / "source", documents, tokenizer.eos_id if ends else None, dtype)
    built = preprocess(config(tmp_path, tokenizer, {"type": "megatron"}))
    assert not built.is_up_to_date
    check_same(tmp_path / "corpus", documents, tokenizer.eos_id)
    assert preprocess(config(tmp_path, tokenizer, {"type": "megatron"})).is_up_to_date
    (source,) = built.manifest["sources"]
    assert source["documents"] == len([ids for ids in documents if ids])
    assert source["bytes"] == sum(len(tokenizer.decode_bytes(ids)) for ids in documents)


ENCODINGS = [("ndarray:uint16:32", np.uint16), ("ndarray:int32", np.int32), ("ndarray", np.uint32), ("bytes", np.int64)]


@pytest.mark.parametrize(("encoding", "dtype"), ENCODINGS, ids=[name for name, _ in ENCODINGS])
def test_a_stream_of_mds_samples_is_cut_into_its_documents(
    tmp_path: Path, tokenizer: Any, documents: list, encoding: str, dtype: Any
) -> None:
    stream = np.array([token for ids in documents for token in (*ids, tokenizer.eos_id)])
    whole = len(stream) // 32 * 32
    write_mds(tmp_path / "source", list(stream[:whole].astype(dtype).reshape(-1, 32)), encoding)
    preprocess(config(tmp_path, tokenizer, {"type": "mds"}))
    ends = np.flatnonzero(stream[:whole] == tokenizer.eos_id)
    kept = [ids for ids in documents[: len(ends)] if ids]
    rest = stream[ends[-1] + 1 : whole].tolist()
    check_same(tmp_path / "corpus", kept + ([rest] if rest else []), tokenizer.eos_id)


def test_mds_samples_can_be_documents(tmp_path: Path, tokenizer: Any, documents: list) -> None:
    write_mds(tmp_path / "source", [np.array(ids, dtype=np.int64) for ids in documents if ids], "ndarray:int64")
    preprocess(config(tmp_path, tokenizer, {"type": "mds", "stream": False}))
    check_same(tmp_path / "corpus", documents, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deduplicate": {}}, "deduplicate: works on text, and the sources are token ids"),
        ({"embed": {}, "cluster": {"num_clusters": 2}}, "embed: works on text"),
        ({"clean": {"min_chars": 9}}, "clean: works on text"),
        ({"tokenizer": {"vocab_size": 300}}, "tokenizer.path: sources of token ids need"),
        ({"sources": [{"type": "megatron", "path": "x"}, {"type": "text", "path": "y"}]}, "text and token ids in one"),
    ],
)
def test_what_needs_text_is_refused(tmp_path: Path, tokenizer: Any, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, tokenizer, {"type": "megatron"}, changes)
    assert words in str(caught.value)


def overwrite(path: Path, at: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda source: overwrite(source / "some.idx", 0, b"X"), "not an index of Megatron"),
        (lambda source: overwrite(source / "some.idx", 9, b"\2"), "not an index of Megatron"),
        (lambda source: overwrite(source / "some.idx", 17, b"\7"), "which is none of token ids"),
        (lambda source: overwrite(source / "some.idx", 18, b"\xff" * 8), "bytes for 18446744073709551615 sequences"),
        (lambda source: overwrite(source / "some.idx", 34, b"\xff\xff\xff\x7f"), "sequence 0 is 2147483647 values"),
        (lambda source: overwrite(source / "some.idx", 34, b"\xff\xff\xff\xff"), "sequence 0 is -1 values"),
        (lambda source: (source / "some.bin").write_bytes(b"\0" * 10), "some.bin has 10 bytes"),
        (lambda source: (source / "some.bin").unlink(), "its .bin is not beside it"),
        (lambda source: overwrite(source / "some.idx", -8, b"\1" + b"\0" * 7), "do not cover"),
        (lambda source: overwrite(source / "some.bin", 0, b"\xff\xff"), "the tokenizer has"),
    ],
)
def test_a_megatron_index_that_cannot_be_true_is_refused(
    tmp_path: Path, tokenizer: Any, documents: list, damage, words: str
) -> None:
    write_megatron(tmp_path / "source", documents, None)
    damage(tmp_path / "source")
    with pytest.raises(CorpusError, match=words):
        preprocess(config(tmp_path, tokenizer, {"type": "megatron"}))
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"raw_data": {"basename": "../shard.00000.mds", "bytes": 9, "hashes": {}}}, "not a plain file name"),
        ({"compression": "zstd"}, "compressed by zstd"),
        ({"samples": 3}, "index.json says 3"),
        ({"column_names": ["a", "b", "c"]}, "no column 'tokens'; it has a, b, c"),
        ({"column_encodings": ["str", "pkl", "float32"]}, "holds no token ids"),
        ({"column_sizes": [None, 99999, 4]}, "cut short"),
        ({"column_sizes": [None]}, "differ in number"),
    ],
)
def test_an_mds_index_that_cannot_be_true_is_refused(
    tmp_path: Path, tokenizer: Any, documents: list, change: dict, words: str
) -> None:
    write_mds(tmp_path / "source", [np.array(ids, dtype=np.uint16) for ids in documents if ids], "ndarray:uint16")
    index = json.loads((tmp_path / "source" / "index.json").read_text())
    index["shards"][0] |= change
    (tmp_path / "source" / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorpusError, match=words):
        preprocess(config(tmp_path, tokenizer, {"type": "mds"}))


def test_lineage_names_the_index_and_the_document(tmp_path: Path, tokenizer: Any, documents: list) -> None:
    write_megatron(tmp_path / "source", documents, None)
    shutil.copytree(tmp_path / "source", tmp_path / "source" / "deep")
    preprocess(config(tmp_path, tokenizer, {"type": "megatron", "domain": "books"}))
    paths = pq.read_table(tmp_path / "corpus" / "lineage" / "documents.parquet")["path"].to_pylist()
    assert {"some.idx/1", "deep/some.idx/1"} <= set(paths) and len(paths) == len(set(paths))
