"""A corpus of two domains in two clusters, and a run on it that was really trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from small_models import MODEL, text_of
from training_runs import write_run_file

from lightbulb.config import load_config
from lightbulb.evaluation.held_out import HeldOutText
from lightbulb.launcher import preprocess
from lightbulb.parallel.host import process_group
from lightbulb.train.config import RunConfig
from lightbulb.train.loop import open_trainer

WORDS = {"sums": "plus minus times equals number total", "tales": "wolf forest river night king castle"}


@pytest.fixture(scope="session")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus: contexts of 32 tokens."""
    root = tmp_path_factory.mktemp("clustered")
    for domain, text in WORDS.items():
        (root / domain).mkdir()
        words = text.split()
        for n in range(20):
            lines = [f"{n} {words[(n + i) % 6]} {i} {words[(i * 7 + n) % 6]} {words[i * 5 % 6]}." for i in range(30)]
            (root / domain / f"{n:02d}.txt").write_text("\n".join(lines))
    config = {
        "output": str(root / "data"), "context_length": 32, "held_out_fraction": 0.2, "executor": {"workers": 1},
        "sources": [{"type": "text", "domain": name, "path": str(root / name)} for name in WORDS],
        "tokenizer": {"vocab_size": 512}, "embed": {}, "cluster": {"num_clusters": 2},
    }  # fmt: skip
    (root / "corpus.yaml").write_text(yaml.safe_dump(config))
    assert preprocess.main([str(root / "corpus.yaml")]) == 0
    return root / "data"


@pytest.fixture(scope="session")
def trained(clustered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with its summary; tests that change it take a :func:`copy_of`."""
    root = tmp_path_factory.mktemp("runs")
    train = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"}
    file = write_run_file(root, clustered, "trained", model=MODEL, train=train)
    device = torch.device("cpu")
    with process_group(device), open_trainer(load_config(RunConfig, file), device) as trainer:
        assert trainer.run()
        (root / "trained" / "summary.json").write_text(json.dumps(trainer.evaluate()))
    return root / "trained"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """``copy_of(run, "name")`` is a copy that may be changed."""
    return lambda run, name="copy": Path(shutil.copytree(run, tmp_path / name))


@pytest.fixture
def text(clustered: Path) -> HeldOutText:
    """The corpus' held-out text for :data:`MODEL`."""
    return text_of(clustered)
