"""The command line: the table of commands, and the commands that need no training."""

import importlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lightbulb.launcher
from lightbulb.launcher import cli, report
from lightbulb.train.metrics import MetricsWriter

EOS = 256


def test_help_is_instant_because_it_imports_no_command():
    code = (
        "import sys; from lightbulb.launcher.cli import main; main(['--help']);"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, (_, about) in cli.COMMANDS.items():
        assert name in done.stdout
        assert about in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module(name: str):
    assert importlib.util.find_spec(cli.COMMANDS[name][0]) is not None


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture):
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: no command 'pretrian', did you mean 'pretrain'?; see lightbulb --help\n"
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: lightbulb COMMAND")


def add_command(monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int]) -> None:
    module = ModuleType("lightbulb_test_command")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "test", (module.__name__, "a command of this test"))


def test_a_command_gets_its_arguments_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch):
    add_command(monkeypatch, lambda argv: len(argv))
    assert cli.main(["test", "--some", "thing", "else"]) == 3


def test_a_missing_package_is_one_line_and_a_missing_module_of_ours_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    add_command(monkeypatch, lambda argv: importlib.import_module(argv[0]) and 0)
    assert cli.main(["test", "no_such_package.part"]) == 1
    error = capsys.readouterr().err
    assert error == "error: lightbulb test needs the package 'no_such_package'; see lightbulb doctor\n"
    with pytest.raises(ModuleNotFoundError):
        cli.main(["test", "lightbulb.no_such_module"])


def test_verify_says_when_there_is_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["verify", str(tmp_path)]) == 1
    # torch may say something of its own when it is imported
    message = f"error: {tmp_path}: has no checkpoint; name the folder of a run that has saved one\n"
    assert capsys.readouterr().err.endswith(message)


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    add_command(monkeypatch, interrupted)
    assert cli.main(["test"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


class ScriptModel(nn.Module):
    """Says a script byte by byte, whatever the prompt; ``spread`` adds the same odds to every byte."""

    context_length = 64

    def __init__(self, script: bytes, prompt_length: int, spread: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokens = [*[0] * (prompt_length - 1), *script, EOS]
        self.spread = spread

    def init_state(self, batch_size: int, max_length: int) -> dict:
        return {"layer": {"h": torch.zeros(batch_size, 1)}, "position": 0}

    def decode(self, tokens: Tensor, state: dict) -> tuple[Tensor, dict]:
        start = state["position"]
        logits = torch.full((*tokens.shape, 257), self.spread)
        for i in range(tokens.shape[1]):
            logits[:, i, self.tokens[start + i]] = 10.0
        return logits, state | {"position": start + tokens.shape[1]}


class ByteTokenizer:
    eos_id = EOS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i != EOS)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


@pytest.fixture
def generate_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The command with a run folder of one model; ``model`` and ``calls`` can be read and set."""

    class CheckpointError(RuntimeError):
        pass

    def load_model_for_inference(run: Path) -> tuple[nn.Module, ByteTokenizer, SimpleNamespace]:
        held.calls.append(run)
        if not run.is_dir():
            raise CheckpointError(f"{run}: not a run folder (it has no config.yaml); name one that pretrain wrote")
        return held.model, ByteTokenizer(), SimpleNamespace(train=SimpleNamespace(kernels="auto"))

    checkpoint = ModuleType("lightbulb.train.checkpoint")
    checkpoint.CheckpointError = CheckpointError  # type: ignore[attr-defined]
    checkpoint.load_model_for_inference = load_model_for_inference  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, checkpoint.__name__, checkpoint)
    name = "lightbulb.launcher.generate"
    sys.modules.pop(name, None)
    held = SimpleNamespace(main=importlib.import_module(name).main, model=None, calls=[])
    yield held
    # bound to the stand-in: nobody else may get it
    del sys.modules[name], lightbulb.launcher.generate  # type: ignore[attr-defined]


class Recorder(io.StringIO):
    """Keeps what is written piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_generate_streams_the_text_in_whole_characters(
    generate_command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    generate_command.model = ScriptModel("é💡.".encode(), prompt_length=3)
    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    assert generate_command.main([str(tmp_path), "--prompt", "a: ", "--temperature", "0"]) == 0
    assert [piece for piece in out.pieces if piece] == ["a: ", "é", "💡", ".", "\n"]
    assert generate_command.calls == [tmp_path]


def test_generate_starts_from_the_end_of_text_without_a_prompt(
    generate_command: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
):
    generate_command.model = ScriptModel(b"new", prompt_length=1)
    assert generate_command.main([str(tmp_path), "--top-k", "1"]) == 0
    assert capsys.readouterr().out == "new\n"


def test_generate_gives_several_samples_that_one_seed_repeats(
    generate_command: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
):
    generate_command.model = ScriptModel(b"xxxxxxxx", prompt_length=1, spread=9.0)
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--num-samples", "2", "--max-new-tokens", "5", "--seed", seed]
        assert generate_command.main([str(tmp_path), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    _, first, second = texts[0].split("--- ")
    assert first.removeprefix("1 of 2\n") != second.removeprefix("2 of 2\n")


def test_generate_with_beams_prints_the_best_first(
    generate_command: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
):
    generate_command.model = ScriptModel(b"best", prompt_length=2, spread=1.0)
    options = [str(tmp_path), "--prompt", "a ", "--num-beams", "3", "--num-samples", "2", "--length-penalty", "0"]
    assert generate_command.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["--- 1 of 2", "a best", "--- 2 of 2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "0"], "options: top_p: Input should be greater than 0 (got 0.0)"),
        (["--num-beams", "2", "--top-k", "3"], "options: config: num_beams=2 does not sample, so top_k would have no"),
        (["--num-samples", "0"], "options: num_samples: 0 is below 1"),
        (["--num-samples", "3", "--num-beams", "2"], "num_samples: 3 is above num_beams (2)"),
        (["--num-samples", "3", "--temperature", "0"], "temperature 0 gives one text every time"),
    ],
)
def test_generate_refuses_bad_options_before_loading(
    generate_command: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path, options: list[str], words: str
):
    assert generate_command.main([str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert generate_command.calls == []


def test_generate_says_what_is_wrong_with_the_run_or_prompt_in_one_line(
    generate_command: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
):
    assert generate_command.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: not a run folder")
    generate_command.model = ScriptModel(b"", prompt_length=70)
    assert generate_command.main([str(tmp_path), "--prompt", "x" * 70]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the prompt has 70 tokens but the model's context_length is 64; shorten")
    assert error.count("\n") == 1


def test_report_prints_the_page_or_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert report.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no metrics.jsonl there")
    with MetricsWriter(tmp_path, 1) as writer:
        writer.write({"kind": "train", "step": 1, "loss": 1.0})
    capsys.readouterr()
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


@pytest.mark.parametrize(
    ("name", "nested"), [("run", "ScheduleConfig"), ("corpus", "TokenizerConfig"), ("upcycle", "RouterStart")]
)
def test_schema_is_json_with_all_nested_configs_and_base(name: str, nested: str, capsys: pytest.CaptureFixture):
    assert cli.main(["schema", name]) == 0
    text = capsys.readouterr().out
    schema = json.loads(text)
    assert nested in schema["$defs"]
    assert schema["properties"]["base"]["type"] == "string"
    references = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert references <= set(schema["$defs"])
