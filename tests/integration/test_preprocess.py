"""`preprocess` as a command: killed, refused, finished, up to date; then read for training and evaluation."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightbulb.data.config import DataConfig
from lightbulb.data.loader import HeldOut, TrainLoader
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.compression import baselines, context_bytes
from lightbulb.launcher.preprocess import main


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preprocess")
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(f"Document {i}.\n" + f"def f{i}(x):\n    return x + {i}\n" * 8)
    (folder / "texts" / "picture.txt").write_bytes(b"\x89PNG\0\0")
    values = {
        "output": str(folder / "corpus"),
        "context_length": 32,
        "held_out_fraction": 0.1,
        "tokenizer": {"vocab_size": 320},
        "sources": [{"type": "text", "domain": "code", "path": str(folder / "texts")}],
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(values))
    return folder / "corpus.yaml"


# Stands still once it holds the folder.
HOLDING = """
import sys, time
from lightbulb.data_prep.work import Work
from lightbulb.launcher.preprocess import main
Work.run = lambda self, step: time.sleep(60)
main(sys.argv[1:])
"""


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_then_finished_then_up_to_date(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, work = config_file.parent / "corpus", config_file.parent / "corpus.work"
    killed = start("-c", HOLDING, str(config_file))
    while not ((work / ".lock").exists() and (work / ".lock").read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    assert main([str(config_file)]) == 1
    assert f"corpus.work: in use by {killed.pid}@" in capsys.readouterr().err
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert work.exists() and not output.exists()

    finished = start("-m", "lightbulb.launcher.preprocess", str(config_file))
    printed, errors = finished.communicate(timeout=120)
    assert finished.returncode == 0, errors
    assert "Tokenizer" in printed and "held_out" in printed
    assert "dropped 1 not_text from text" in printed and "picture.txt" in printed
    assert output.exists() and not work.exists()

    assert main([str(config_file)]) == 0
    assert "up to date" in capsys.readouterr().out

    data = DataConfig(path=output)
    loader = TrainLoader(data, 32, 320, 0, 4, 2)
    assert loader.next_step()[0].tokens.shape == (2, 32)
    contexts = context_bytes(HeldOut(data, 32, 320, 2), Tokenizer.load(output / "tokenizer.json"))
    assert b"def f" in b"".join(contexts)
    assert baselines(contexts)["gzip_all_bpb"] < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "error: none.yaml: no such config file"),
        (["contxt_length=5"], "did you mean 'context_length'"),
        (["sources.0.path=/none"], "error: source text /none: no such file or folder"),
        (["tokenizer.path=none.json"], "error: none.json: cannot be read as a tokenizer.json"),
        (["output=/proc/corpus"], "/proc/corpus"),
    ],
    ids=["config", "key", "source", "tokenizer", "output"],
)
def test_errors_are_one_sentence_and_a_code(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    argv = arguments if arguments[0].endswith(".yaml") else [str(config_file), *arguments]
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and printed.count("\n") == 1


def test_without_a_config_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lightbulb preprocess CONFIG" in capsys.readouterr().err
