"""`lightbulb upcycle`: its config, mergekit's shape, runs and Hugging Face folders, errors in one sentence."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from dense_runs import model_of, tensor, tensors

from lightbulb.config import ConfigError, load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.proof import load_variants
from lightbulb.experts.upcycle_config import load_upcycle_config
from lightbulb.launcher.upcycle import main
from lightbulb.train.checkpoint import load_model_for_inference
from lightbulb.train.config import RunConfig

LETTERS = "abcdefghijklmnop "


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> list[Path]:
    """Two small branches of one Llama, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name in ("one", "two"):
        model.save_pretrained(folder / name)
        Tokenizer.train([LETTERS], 257).save(folder / name / "tokenizer.json")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return [folder / "one", folder / "two"]


def write(path: Path, values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_two_llamas_become_a_run_that_loads(tmp_path, llamas, capsys):
    values = {"run": str(tmp_path / "moe"), "method": "btx+moa", "sources": [{"path": str(path)} for path in llamas]}
    assert main([write(tmp_path / "c.yaml", values)]) == 0
    shown = capsys.readouterr().out
    assert "entropy" in shown and "next: lightbulb pretrain" in shown
    model, tokenizer, config = load_model_for_inference(tmp_path / "moe")
    assert tokenizer.vocab_size <= config.model.vocab_size == 288
    assert model(torch.tensor([tokenizer.encode_batch(["abc"])[0]])).isfinite().all()
    receipt = json.loads((tmp_path / "moe" / "receipt.json").read_text())
    assert receipt["conversion"] == "upcycle" and len(receipt["sources"]) == 2
    assert load_variants(str(tmp_path / "moe" / "config.yaml"))[""].model.layer(0).token.num_experts == 4


def test_a_run_and_a_hugging_face_folder_mix(tmp_path, llamas):
    values = {"method": "sparse", "num_experts": 2, "sources": [{"path": str(llamas[0])}], "layers": []}
    with pytest.raises(ConfigError, match="no layer has a dense channel mixer"):
        _ = [main_config(tmp_path, values)]
    del values["layers"]
    out = main_config(tmp_path, values)
    # the mixture's trunk is a Llama's: a run with one dense model of the same values mixes with the folder
    assert tensors(out)["norm.weight"].shape == (32,)


def main_config(tmp_path, values) -> Path:
    """Run the library on a config, and give the folder."""
    from lightbulb.experts.upcycle import upcycle

    config = load_upcycle_config(write(tmp_path / "c.yaml", values | {"run": str(tmp_path / "out")}))
    upcycle(config)
    return config.run
