"""One small corpus for all tests of reading: two domains, several shards, a partial held-out row."""

import random
import shutil
import string
from pathlib import Path

import pytest

from lightbulb.config import build_config
from lightbulb.data.config import DataConfig
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess

CONTEXT_LENGTH = 16
VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def written_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    generator = random.Random(0)
    for domain in ("plain", "poems"):
        (folder / domain).mkdir()
        for i in range(40):
            words = generator.choices(string.ascii_lowercase + " ", k=60 * (i % 7 + 1))
            (folder / domain / f"{i:02}.txt").write_text(f"{domain} {i}:\n{''.join(words)}\n")
    values = {
        "output": str(folder / "corpus"),
        "context_length": CONTEXT_LENGTH,
        "held_out_fraction": 0.2,
        "shard_bytes": 1 << 12,
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "sources": [{"type": "text", "domain": name, "path": str(folder / name)} for name in ("plain", "poems")],
    }
    preprocess(build_config(CorpusConfig, values))
    return folder / "corpus"


@pytest.fixture
def corpus(written_corpus: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written_corpus, tmp_path / "corpus"))


@pytest.fixture
def data(corpus: Path) -> DataConfig:
    return DataConfig(path=corpus)
