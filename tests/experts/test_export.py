"""Runs of ours as Hugging Face folders: which architecture, the same logits, the same text, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ATTENTION, MLP, SWITCH, our_config, sample, save_ours, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightbulb.experts.hf.convert import Options, export, import_model
from lightbulb.experts.hf.families import family_of
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.receipt import read_receipt
from lightbulb.inference.generate import SamplingConfig, generate
from lightbulb.launcher import export as command
from lightbulb.train.checkpoint import load_model_for_inference

NORMED = ATTENTION | {"qk_norm": True}
MAMBA = {"type": "mamba", "head_dim": 8, "state_dim": 8, "chunk_size": 16}
RAW = {"router": {"top_k": 1, "normalize_gates": False}}
DEEPSEEK = {"type": "deepseek_moe", "num_experts": 4, "hidden_dim": 24, "num_shared": 2, "router": {"top_k": 2}}
SIGMOID = {"score": "sigmoid", "normalize_gates": True, "bias_rate": 1e-3, "gate_scale": 2.5, "top_k": 2}


def block(token: dict[str, Any], channel: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"token": token, "channel": channel}


LEARNED = {"norm": "layer", "learned_positions": True}
GPT2_ATTENTION = {"type": "attention", "num_heads": 4, "rope_theta": None, "bias": "all"}
GPT2_MLP = {"type": "mlp", "hidden_dim": 40, "activation": "gelu_tanh", "bias": True}
GPT2_SWITCH = {"type": "switch", "num_experts": 4, "expert": GPT2_MLP}
BIASES = ATTENTION | {"bias": "all"}
QKV = ATTENTION | {"bias": "qkv"}

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "dense": ("Llama", [block(ATTENTION, MLP)], {}),
    "tied": ("Llama", [block(ATTENTION | {"head_dim": 12}, MLP)], {"tie_embeddings": True}),
    "window": ("Mistral", [block(ATTENTION | {"window": 8}, MLP)], {}),
    "windows": ("Qwen2", [block(ATTENTION | {"window": 8}, MLP), block(ATTENTION, MLP)], {}),
    "normed": ("Qwen3", [block(NORMED, MLP)], {}),
    "normed-windows": ("Qwen3", [block(NORMED, MLP), block(NORMED | {"window": 8}, MLP)], {}),
    "experts": ("Mixtral", [block(ATTENTION, SWITCH)], {}),
    "experts-window": ("Mixtral", [block(ATTENTION | {"window": 8}, SWITCH)], {}),
    "raw-gates": ("Qwen2Moe", [block(ATTENTION, SWITCH | RAW)], {"tie_embeddings": True}),
    "shared": ("Qwen2Moe", [block(ATTENTION, SWITCH | {"shared_hidden_dim": 20})], {}),
    "deepseek": ("Qwen2Moe", [block(ATTENTION, MLP), block(ATTENTION, DEEPSEEK)], {}),
    "normed-experts": ("Qwen3Moe", [block(NORMED, SWITCH)], {}),
    "some-experts": ("Qwen3Moe", [block(NORMED, SWITCH | RAW), block(NORMED, MLP)], {}),
    "wide-norm": ("Olmoe", [block(NORMED | {"qk_norm_over": "all_heads"}, SWITCH | RAW)], {}),
    "mamba": ("Mamba2", [block(MAMBA)], {"norm_eps": 1e-5}),
    "gpt2": ("GPT2", [block(GPT2_ATTENTION, GPT2_MLP)], LEARNED | {"tie_embeddings": True}),
    "gpt2-untied": ("GPT2", [block(GPT2_ATTENTION, GPT2_MLP | {"activation": "gelu"})], LEARNED | {"dropout": 0.1}),
    "biases": ("Llama", [block(BIASES, MLP | {"bias": True})], {}),
    "qkv": ("Qwen2", [block(QKV, MLP)], {}),
    "normed-biases": ("Qwen3", [block(NORMED | BIASES, MLP)], {}),
    "wide-norm-biases": ("Olmoe", [block(NORMED | BIASES | {"qk_norm_over": "all_heads"}, SWITCH)], {}),
    "normed-experts-biases": ("Qwen3Moe", [block(NORMED | BIASES, SWITCH), block(NORMED | BIASES, MLP)], {}),
    "shared-qkv": ("Qwen2Moe", [block(QKV, SWITCH | {"shared_hidden_dim": 20})], {}),
}
"""Name to the stock architecture, blocks and further settings."""

OWN: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "sigmoid": ("score sigmoid", [block(ATTENTION, DEEPSEEK | {"router": SIGMOID})], {}),
    "retention": ("token mixer 'retention'", [block({"type": "retention", "num_heads": 4}, MLP), block(ATTENTION, MLP)],
                  {"tie_embeddings": True}),
    "kan": ("channel mixer 'kan'", [block(ATTENTION, {"type": "kan", "hidden_dim": 16})], {}),
    "ternary": ("the modifiers bitlinear, denseformer", [block(ATTENTION, SWITCH)],
                {"modifiers": [{"type": "bitlinear"}, {"type": "denseformer"}]}),
    "lora": ("the modifiers lora", [block(ATTENTION, SWITCH)], {"modifiers": [{"type": "lora", "rank": 2}]}),
    "depths": ("the modifiers mixture_of_depths", [block(ATTENTION, MLP)],
               {"modifiers": [{"type": "mixture_of_depths"}]}),
    "no-rotation": ("rope_theta None", [block(ATTENTION | {"rope_theta": None}, MLP)], {}),
    "sink": ("sink 'learned'", [block(ATTENTION | {"sink": "learned"}, MLP)], {}),
    "gelu": ("activation 'gelu'", [block(ATTENTION, MLP | {"activation": "gelu"})], {}),
    "hybrid": ("token mixer 'mamba'", [block(ATTENTION, MLP), block(MAMBA, MLP)], {}),
    "groups": ("num_groups 1", [block(MAMBA | {"num_groups": 2})], {"norm_eps": 1e-5}),
    "experts-gpt2": ("'attention' and 'switch' are not GPT-2's", [block(GPT2_ATTENTION, GPT2_SWITCH)], LEARNED),
    "window-gpt2": ("attention with window 8 is not", [block(GPT2_ATTENTION | {"window": 8}, GPT2_MLP)], LEARNED),
    "groups-gpt2": ("num_kv_heads 2 is not", [block(GPT2_ATTENTION | {"num_kv_heads": 2}, GPT2_MLP)], LEARNED),
    "width-gpt2": ("head_dim 16 is not", [block(GPT2_ATTENTION | {"head_dim": 16}, GPT2_MLP)], LEARNED),
    "qkv-gpt2": ("bias 'qkv' is not", [block(GPT2_ATTENTION | {"bias": "qkv"}, GPT2_MLP)], LEARNED),
    "swiglu-gpt2": ("activation 'swiglu' is not", [block(GPT2_ATTENTION, MLP)], LEARNED),
    "no-mlp-bias-gpt2": ("set bias: true", [block(GPT2_ATTENTION, GPT2_MLP | {"bias": False})], LEARNED),
    "two-gpt2": ("layers with learned positions that differ",
                 [block(GPT2_ATTENTION, GPT2_MLP), block(GPT2_ATTENTION, GPT2_MLP | {"hidden_dim": 20})], LEARNED),
    "layer-norm": ("norm 'layer' with learned_positions false", [block(ATTENTION, MLP)], {"norm": "layer"}),
    "layer-norm-mamba": ("norm 'layer' with learned_positions false", [block(MAMBA)], {"norm": "layer"}),
    "positions": ("norm 'rms' with learned_positions true", [block(ATTENTION, MLP)], {"learned_positions": True}),
    "some-biases": ("of which some have biases", [block(BIASES, MLP), block(BIASES, MLP | {"bias": True})], {}),
    "normed-mlp-biases": ("no stock architecture has all of mlp_bias, qk_norm", [block(NORMED, MLP | {"bias": True})],
                          {}),
    "experts-biases": ("no stock architecture has all of all_bias, experts", [block(BIASES, SWITCH)], {}),
    "gist": ("gist tokens", [block(ATTENTION, MLP)], {"gist_token_id": 1}),
}  # fmt: skip
"""Name to the reason that it is not stock, blocks and further settings."""


@pytest.mark.parametrize("name", CASES)
def test_equality_with_transformers(name: str, tmp_path: Path) -> None:
    architecture, pattern, changes = CASES[name]
    run = save_ours(our_config(pattern, **changes), tmp_path / "run")
    receipt = export(run, tmp_path / "out", Options(shard_bytes=30_000))
    assert receipt.architecture == ("GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM")
    assert receipt == read_receipt(tmp_path / "out" / "receipt.json")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ours = load_model_for_inference(run)[0]
    with torch.no_grad():
        wanted = ours(sample())[..., : tokenizer().vocab_size]
        found = theirs.eval()(sample(), use_cache=False).logits
    assert found.shape == wanted.shape and wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4
    import_model(tmp_path / "out", tmp_path / "again", Options())
    again = load_model_for_inference(tmp_path / "again")[0].state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(again[key], value[: len(again[key])]), key
    # Qwen2-MoE always has a shared expert: one feature of zeros where ours has none. Qwen2 always has biases.
    rest = again.keys() - ours.state_dict().keys()
    added = {"raw-gates": "shared", "windows": ".bias"}
    assert all(added[name] in key and not again[key].any() for key in rest) and bool(rest) == (name in added)


@pytest.mark.parametrize("name", OWN)
def test_why_a_model_is_not_stock(name: str) -> None:
    reason, pattern, changes = OWN[name]
    with pytest.raises(InteropError, match=reason):
        family_of(our_config(pattern, **changes))


@pytest.mark.parametrize("name", ["sigmoid", "retention", "ternary", "lora", "depths", "hybrid", "experts-gpt2"])
def test_equality_behind_a_modelling_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason, pattern, changes = OWN[name]
    run = save_ours(our_config(pattern, **changes), tmp_path / "run")
    assert command.main([str(run), str(tmp_path / "out"), "--shard-size", "30K"]) == 0
    output = capsys.readouterr().out
    assert "not a stock architecture" in output and reason in output
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs.__module__.startswith("transformers_modules.")
    ours = load_model_for_inference(run)[0]
    tokens = sample() + 2  # no gist tokens
    with torch.no_grad():
        wanted, found = ours(tokens), theirs(tokens).logits
    assert torch.equal(found, wanted[..., : tokenizer().vocab_size])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MoE in a stock architecture, ``out``, and a model that is none, ``own``; their runs beside them."""
    folder = tmp_path_factory.mktemp("exported")
    for name, pattern in {"out": [block(ATTENTION, SWITCH)], "own": OWN["sigmoid"][1]}.items():
        export(save_ours(our_config(pattern), folder / f"run-{name}"), folder / name, Options())
    return folder


@pytest.mark.parametrize("name", ["out", "own"])
def test_equality_of_generated_text(name: str, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(exported / name, trust_remote_code=True)
    their_tokenizer = AutoTokenizer.from_pretrained(exported / name)
    ours, our_tokenizer, _ = load_model_for_inference(exported / f"run-{name}")
    text = "def fill(text, width=70):\n    naïve"
    ids = their_tokenizer(text)["input_ids"]
    assert ids == our_tokenizer.encode_batch([text])[0]
    assert their_tokenizer.eos_token_id == our_tokenizer.eos_id
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    wanted = list(generate(ours, ids, SamplingConfig(max_new_tokens=12, temperature=0.0), our_tokenizer.eos_id))
    assert found[: len(ids) + len(wanted)] == ids + wanted
    assert their_tokenizer.decode(ids) == text


def test_a_model_behind_a_modelling_file_comes_back(exported: Path, tmp_path: Path) -> None:
    import_model(exported / "own", tmp_path / "again", Options())
    again, first = (load_model_for_inference(run)[0] for run in (tmp_path / "again", exported / "run-own"))
    with torch.no_grad():
        assert torch.equal(again(sample()), first(sample())[..., : tokenizer().vocab_size])
    assert again.blocks["0"].channel.router.bias.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_behind_a_modelling_file(
    side: str, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(exported / "own", trust_remote_code=True)
    tokens, padding = sample(), torch.zeros(2, 5, dtype=torch.long)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    masks = [torch.zeros_like(padding), torch.ones_like(tokens)]
    mask = torch.cat(masks if side == "left" else masks[::-1], 1)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        found = theirs(torch.cat(parts, 1), attention_mask=mask).logits
    found = found[:, 5:] if side == "left" else found[:, :-5]
    assert (found - wanted).abs().max() < 1e-5  # rotations of other positions round otherwise


def test_padding_before_learned_positions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    _, pattern, changes = OWN["experts-gpt2"]
    export(save_ours(our_config(pattern, **changes), tmp_path / "run"), tmp_path / "out", Options())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens, mask = sample(), torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:] = 0
    with torch.no_grad():
        found = theirs(tokens, attention_mask=mask).logits
        assert (found[0, :30] - theirs(tokens[:1, :30]).logits[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="padding_side: right"):
        theirs(tokens, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="a sequence of 80 tokens: learned_positions end at context_length 64"):
        theirs(torch.cat([tokens, tokens], 1))


def test_loss_of_labels_behind_a_modelling_file(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(exported / "own", trust_remote_code=True)
    tokens = sample()
    with torch.no_grad():
        loss, logits = theirs(tokens, labels=tokens, return_dict=False)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["out", "own"])
def test_bfloat16_rounds_the_weights_and_nothing_else(name: str, exported: Path, tmp_path: Path) -> None:
    receipt = export(exported / f"run-{name}", tmp_path / "half", Options(dtype=torch.bfloat16))
    assert receipt.comparison.greatest_difference < 1e-4
    values = load_file(tmp_path / "half" / "model.safetensors")
    for key, value in load_file(exported / name / "model.safetensors").items():
        assert torch.equal(values[key], value.bfloat16()), key
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_run_in_bfloat16_behind_a_modelling_file_keeps_its_routers(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(exported / "own", trust_remote_code=True, dtype=torch.bfloat16)
    for key, value in theirs.named_parameters():
        assert value.dtype == (torch.float32 if "router" in key else torch.bfloat16), key
    with torch.no_grad():
        assert theirs(sample()).logits.isfinite().all()


def test_shards_hold_each_tensor_once(exported: Path, tmp_path: Path) -> None:
    export(exported / "run-out", tmp_path / "out", Options(shard_bytes=20_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(exported / "out" / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        values = load_file(path)
        assert all(index["weight_map"][key] == path.name for key in values) and not values.keys() & found.keys()
        assert len(values) == 1 or sum(value.nbytes for value in values.values()) <= 20_000
        found |= values
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_the_small_files(exported: Path) -> None:
    names = {path.name for path in (exported / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "receipt.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(exported / "out").eos_token_id == tokenizer().eos_id
    assert {path.name for path in (exported / "own").iterdir()} == names | {"modeling_lightbulb.py"}


def test_padding_of_the_vocabulary_is_cut(exported: Path) -> None:
    values = load_file(exported / "out" / "model.safetensors")
    assert len(values["lm_head.weight"]) == len(values["model.embed_tokens.weight"]) == tokenizer().vocab_size < 320
    receipt = read_receipt(exported / "out" / "receipt.json")
    assert receipt is not None and "20 unused rows of the vocabulary were cut off" in receipt.notes
    assert receipt.parameters_in - receipt.parameters_out == 2 * 20 * 32


def test_a_model_with_fewer_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    run = save_ours(our_config([block(ATTENTION, MLP)], vocab_size=100), tmp_path / "run")
    with pytest.raises(InteropError, match="its tokenizer has 300 entries, its model rows for 100"):
        export(run, tmp_path / "out", Options())


def test_frozen_weights_in_four_bits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {"type": "lora", "rank": 2, "quantize": "nf4"}
    config = our_config([block(ATTENTION | {"head_dim": 64}, MLP | {"hidden_dim": 64})], dim=64, modifiers=[lora])
    run = save_ours(config, tmp_path / "run")
    assert command.main([str(run), str(tmp_path / "out")]) == 1
    assert "four bits cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("kept")
    assert command.main([str(exported / "run-out"), str(tmp_path)]) == 1
    assert "there is something already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("size", ["", "0", "12Q", "-3", "1.5G"])
def test_sizes_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "out", f"--shard-size={size}"])
    assert "is no size" in capsys.readouterr().err
