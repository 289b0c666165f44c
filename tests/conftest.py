"""Fixtures for all tests: commands as real processes, and a small prepared corpus."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: test shapes are tiny and the ranks share cores
if "--device=cuda" not in sys.argv and "cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run on the CPU, step by step

from processes import Command  # noqa: E402
from training_runs import write_run_file  # noqa: E402

pytest_plugins = ["session_end"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests of kernels run")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a command: ``start("pretrain", argv, world_size=2, LIGHTBULB_FAULT=...)``."""
    running: list[Command] = []

    def run(
        name: str, argv: list[str], world_size: int = 1, own_arguments: Sequence[list[str]] = (), **environment: str
    ) -> Command:
        output = tmp_path / f"output-{len(running)}.txt"
        running.append(Command(name, argv, world_size, environment, output, own_arguments))
        return running[-1]

    yield run
    for command in running:
        command.kill()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus: contexts of 32 tokens, 512 token ids."""
    root = tmp_path_factory.mktemp("corpus")
    text = root / "text"
    text.mkdir()
    for number in range(40):
        lines = [f"{number} plus {i} is {number + i}, and {number} times {i} is {number * i}." for i in range(60)]
        (text / f"sums-{number:02d}.txt").write_text("\n".join(lines))
    config = root / "corpus.yaml"
    config.write_text(
        f"output: {root / 'data'}\ncontext_length: 32\nheld_out_fraction: 0.1\nexecutor: {{workers: 1}}\n"
        f"sources:\n  - {{type: text, domain: sums, path: {text}}}\ntokenizer: {{vocab_size: 512}}\n"
    )
    command = Command("preprocess", [str(config)], 1, {}, root / "output.txt")
    assert command.wait() == 0, command.text()
    return root / "data"


@pytest.fixture
def run_file(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    """Write a run file: ``run_file("name", optimizer={...})`` gives its path; the run goes to ``tmp_path/name``."""
    return lambda name="run", **changes: write_run_file(tmp_path, corpus, name, **changes)
