"""`preprocess` killed with SIGKILL at random points: the runs after it go on, the corpus is the same to the byte."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightbulb.launcher.preprocess import main

KILLS = 5


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(work: Path) -> set[str]:
    return {str(path.relative_to(work)) for path in work.glob("*/*/report.json") if path.parent.name[0] != "."}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_points(tmp_path: Path, workers: int) -> None:
    generator = random.Random(workers)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(120):
        (texts / f"{i:03}.txt").write_text(f"Document {i}.\n" + f"def f{i}(x):\n    return x + {i}\n" * 300)
    values = {
        "output": str(tmp_path / "whole"),
        "context_length": 64,
        "shard_bytes": 1 << 14,
        "task_bytes": 40_000,
        "tokenizer": {"vocab_size": 400},
        "deduplicate": {},
        "sources": [{"type": "text", "path": str(texts)}],
        "executor": {"workers": workers},
    }
    config = tmp_path / "corpus.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main([str(config), "keep_work=true"]) == 0
    total = len(finished(tmp_path / "whole.work"))
    assert total > 40

    work = tmp_path / "killed.work"
    command = [sys.executable, "-m", "lightbulb.launcher.preprocess", str(config), f"output={tmp_path / 'killed'}"]
    for point in sorted(generator.sample(range(total - 1), KILLS)):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = finished(work)
        while len(finished(work)) < point:
            assert running.poll() is None, running.stderr
            time.sleep(0.001)
        time.sleep(generator.random() * 0.02)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert not (tmp_path / "killed").exists() and before <= finished(work)
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert not work.exists()
