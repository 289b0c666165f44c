"""Trained runs exported, and imported models trained, as users do it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import Command
from training_runs import TRAIN, losses, write_run_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.receipt import read_receipt
from lightbulb.experts.source import open_source
from lightbulb.experts.text import held_out_text, tokens_of
from lightbulb.launcher import export, import_model
from lightbulb.train.checkpoint import load_model_for_inference

ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
CHANNELS: dict[str, dict[str, Any]] = {
    "Llama": {"type": "mlp", "hidden_dim": 64},
    "Mixtral": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
}
TOKENS = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))


def train(folder: Path, corpus: Path, ranks: int, channel: dict[str, Any], **changes: Any) -> Path:
    """A run of a few steps."""
    model = {"vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32,
             "block_pattern": [{"token": ATTENTION, "channel": channel}]}  # fmt: skip
    quick = TRAIN | {"steps": 4, "save_every": 4, "eval_every": 4}
    path = write_run_file(folder, corpus, **{"model": model, "train": quick} | changes)
    command = Command("pretrain", [str(path)], ranks, {}, folder / "output.txt")
    assert command.wait() == 0, command.text()
    return folder / "run"


@pytest.mark.parametrize("kind", CHANNELS)
def test_equality_of_a_trained_run_and_its_export(kind: str, tmp_path: Path, corpus: Path) -> None:
    """On two data ranks, so that the optimizer's parts of tensors are put together."""
    run = train(tmp_path, corpus, 2, CHANNELS[kind])
    assert export.main([str(run), str(tmp_path / "out"), "--data", str(corpus), "--shard-size", "30K"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    with torch.no_grad():
        wanted = load_model_for_inference(run)[0](TOKENS)
        found = theirs(TOKENS).logits
    assert (found - wanted[..., : found.shape[-1]]).abs().max() < 1e-4
    receipt = read_receipt(tmp_path / "out" / "receipt.json")
    assert receipt is not None and receipt.comparison.text.source == f"{corpus}, held out"
    text = "3 plus 4 is"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
        == Tokenizer.load(run / "tokenizer.json").encode_batch([text])[0]
    )


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_equality_of_an_imported_model_and_a_run_that_starts_from_it(
    parallel: dict[str, int], tmp_path: Path, corpus: Path
) -> None:
    """The rate is so small that training changes nothing: every layout has read every weight."""
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    imported = tmp_path / "imported"
    assert import_model.main([str(tmp_path / "theirs"), str(imported), "--data", str(corpus)]) == 0
    values = json.loads(open_source(imported).model_config.model_dump_json())
    run = train(
        tmp_path, corpus, 2, {}, model=values, start_from=str(imported), parallel=parallel,
        optimizer={"lr": 1e-20, "weight_decay": 0.0},
    )  # fmt: skip
    with torch.no_grad():
        found, wanted = load_model_for_inference(run)[0](TOKENS), theirs(TOKENS).logits
    assert (found - wanted).abs().max() < 1e-4


def test_an_import_is_trained_in_its_own_folder(tmp_path: Path, corpus: Path) -> None:
    """Data and batch are given then; the model alone is fixed."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    run = tmp_path / "imported"
    assert import_model.main([str(tmp_path / "theirs"), str(run)]) == 0
    settings = [
        f"data.path={corpus}",
        "train.steps=3",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "seed=7",
    ]
    for number, setting in enumerate(("model.norm_eps=0.1", "optimizer.lr=0.01")):
        words = [str(run / "config.yaml"), *settings, setting]
        command = Command("pretrain", words, 1, {}, tmp_path / f"output-{number}.txt")
        if setting.startswith("model."):
            assert command.wait() == 1 and "model.norm_eps = 1e-06, this config has 0.1" in command.text()
        else:
            assert command.wait() == 0, command.text()
    assert sorted(losses(run)) == [1, 2, 3] and losses(run)[3] < losses(run)[1]


def test_the_text_is_held_out_and_of_the_corpus(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    text = held_out_text(tokenizer, corpus, 64)
    assert len(text.token_ids) == 4 and tokens_of(text).shape == (4, 64)
    written = tokenizer.decode(text.token_ids[1])
    assert " plus " in written or " times " in written
    with pytest.raises(DataError, match="no corpus"):
        held_out_text(tokenizer, corpus.parent, 64)
