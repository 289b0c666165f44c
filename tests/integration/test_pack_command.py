"""A ternary run trained, packed and read back as users do it: the same text, a seventh of the bytes, damage named."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command
from training_runs import TRAIN, write_run_file

from lightbulb.launcher import generate, pack
from lightbulb.models.language import LanguageModel
from lightbulb.modifiers.packed import PackedLinear
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.linear import SplitLinear
from lightbulb.train.checkpoint import load_model_for_inference
from lightbulb.train.packed_folder import read_packed

MODEL = {
    "vocab_size": 512, "dim": 64, "num_layers": 2, "context_length": 32, "tie_embeddings": True, "init_std": 0.08,
    "block_pattern": [
        {
            "token": {"type": "retention", "num_heads": 4},
            "channel": {"type": "switch", "num_experts": 4, "expert": {"type": "kan", "hidden_dim": 32},
                        "router": {"top_k": 2, "bias_rate": 1.0e-3}},
        },
        {
            "token": {"type": "attention", "num_heads": 4},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 40, "shared_hidden_dim": 32},
        },
    ],
    "modifiers": [{"type": "bitlinear"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("ternary")
    path = write_run_file(folder, corpus, model=MODEL, train=TRAIN | {"save_every": 12, "eval_every": 12})
    command = Command("pretrain", [str(path)], 1, {}, folder / "output.txt")
    assert command.wait() == 0, command.text()
    return folder / "run"


@pytest.fixture(scope="module", params=["2bit", "base3"])
def packed(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is packed of it."""
    out = tmp_path_factory.mktemp("packed") / "small" / "model"
    assert pack.main([str(run), str(out), "--format", request.param]) == 0
    return out


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert generate.main([*arguments, "--prompt", "7 plus", "--max-new-tokens", "20", "--seed", "3"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--temperature", "1"], ["--num-beams", "3"]], ids=str)
def test_equality_of_the_text(run: Path, packed: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    expected = text(capsys, str(run), *options)
    assert len(expected) > 20
    assert text(capsys, str(packed), *options) == expected
    assert text(capsys, str(run), "--packed", *options) == expected


def test_the_folder_stands_for_itself(run: Path, packed: Path, tmp_path: Path) -> None:
    """Moved away, it gives the logits of the run; no layer has a weight that was unpacked."""
    moved = Path(shutil.copytree(packed, tmp_path / "elsewhere"))
    assert sorted(path.name for path in moved.iterdir()) == [
        "config.yaml", "model.safetensors", "packed.json", "tokenizer.json"
    ]  # fmt: skip
    model, expected = read_packed(moved)[0], load_model_for_inference(run)[0]
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = expected(tokens)
        # An input halfway between two codes may be rounded otherwise, as sums are taken in another order.
        assert (model(tokens) - wanted).abs().max() < 0.05 * wanted.std()
    assert not any(isinstance(layer, SplitLinear | GroupedLinear) for layer in blocks(model))
    assert sum(isinstance(layer, PackedLinear) for layer in blocks(model)) == receipt(packed)["layers"]


def blocks(model: LanguageModel) -> list[Any]:
    """The modules of all blocks."""
    return [module for name, module in model.named_modules() if name.startswith("blocks.")]


def receipt(folder: Path) -> Any:
    return json.loads((folder / "packed.json").read_text())["receipt"]


def test_the_receipt(run: Path, packed: Path) -> None:
    found, model = receipt(packed), load_model_for_inference(run)[0]
    weights = [layer.weight for layer in blocks(model) if isinstance(layer, SplitLinear)]
    assert found["layers"] == len(weights)
    assert found["bytes_before"] == sum(2 * weight.numel() for weight in weights)
    assert found["bytes_after"] <= found["bytes_before"] / 7
    assert found["tokens"] == 32 and found["same_choices"] == 1.0
    assert 0 <= found["greatest_difference"] < 0.05
    assert 0 < found["greatest_rounding"] < 2e-6


def test_a_layer_that_is_not_exact_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousandth too large, which the logits let through."""
    multiply = PackedLinear.multiply

    def careless(self: PackedLinear, x: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
        return multiply(self, x, counts) * 1.001

    monkeypatch.setattr(PackedLinear, "multiply", careless)
    assert pack.main([str(run), str(tmp_path / "out")]) == 1
    assert "more than rounding" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


FILES = "model.safetensors", "config.yaml", "tokenizer.json", "packed.json"
KINDS = "changed", "shorter", "missing", "link"
DAMAGE = set(itertools.product(KINDS, FILES)) - {("missing", "packed.json")}  # without it, the folder is a run's


@pytest.mark.parametrize(("kind", "name"), sorted(DAMAGE))
def test_damage_is_named(
    packed: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    path, content = folder / name, (packed / name).read_bytes()
    if kind == "changed":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "shorter":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to(packed / name)
    assert generate.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and "pack the run again" in error


def test_what_cannot_be_done_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert pack.main([str(run), str(out), "--bound", "-1"]) == 1
    assert "the bound is -1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("kept")
    assert pack.main([str(run), str(out)]) == 1
    assert "there is something already" in capsys.readouterr().err
    assert (out / "mine").read_text() == "kept" and list(tmp_path.iterdir()) == [out]
    assert pack.main([str(tmp_path), str(tmp_path / "other")]) == 1
    assert "not a run folder" in capsys.readouterr().err


def test_packing_what_is_packed_is_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(packed), "--packed"]) == 1
    assert "holds a packed model" in capsys.readouterr().err
