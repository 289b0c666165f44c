"""Models of transformers as runs of ours: the same logits, the same weights on the way back, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import ATTENTION, MLP, THEIRS, VOCAB, our_config, sample, save_ours, save_theirs, their_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightbulb.experts.hf.convert import Options, export, import_model
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.receipt import read_receipt
from lightbulb.experts.source import open_source
from lightbulb.launcher import generate
from lightbulb.launcher import import_model as command
from lightbulb.train.checkpoint import load_model_for_inference

SMALL = Options(shard_bytes=20_000)
TOLERANCE = 1e-4  # of logits of order 1 in float32; Mamba's differ most, as its sums over time are arranged otherwise


@pytest.mark.parametrize("name", THEIRS)
def test_equality_both_ways(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    folder = save_theirs(theirs, tmp_path / "theirs")
    receipt = import_model(folder, tmp_path / "run", SMALL)
    model, _, config = load_model_for_inference(tmp_path / "run")
    with torch.no_grad():
        wanted = theirs(sample(), use_cache=False).logits
        found = model(sample())
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < TOLERANCE
    assert receipt.parameters_out == config.model.cost().params == sum(p.numel() for p in model.parameters())
    assert receipt == read_receipt(tmp_path / "run" / "receipt.json")

    export(tmp_path / "run", tmp_path / "back", SMALL)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(theirs)
    with torch.no_grad():
        found = again(sample(), use_cache=False).logits
    assert (found - wanted[..., : VOCAB - 20]).abs().max() < TOLERANCE  # rows of no token are gone
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key][: len(value)]), key


def test_an_imported_run_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_theirs(their_model("mixtral"), tmp_path / "theirs")
    assert command.main([str(folder), str(tmp_path / "run")]) == 0
    assert "greatest difference of a logit" in capsys.readouterr().out
    assert generate.main([str(tmp_path / "run"), "--prompt", "def f", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def f")


def test_the_receipt_of_an_import(tmp_path: Path) -> None:
    theirs = their_model("mixtral")
    receipt = import_model(save_theirs(theirs, tmp_path / "theirs"), tmp_path / "run", SMALL)
    assert receipt.tensors_in.keys() == theirs.state_dict().keys()
    assert receipt.parameters_in == receipt.parameters_out == sum(p.numel() for p in theirs.parameters())
    assert list(receipt.routers) == ["blocks.0.channel.router", "blocks.1.channel.router"]
    for router in receipt.routers.values():
        assert 0 < router.entropy < 1 and sum(router.load) == pytest.approx(1) and len(router.load) == 4
    text = receipt.comparison.text
    assert "textwrap" in text.source and len(text.token_ids) == 4 and {len(row) for row in text.token_ids} == {64}
    ids = torch.tensor(text.token_ids)
    with torch.no_grad():
        logits = theirs(ids).logits
        difference = (load_model_for_inference(tmp_path / "run")[0](ids) - logits).abs().max()
    assert receipt.comparison.greatest_difference == pytest.approx(float(difference), abs=1e-6)
    assert receipt.comparison.standard_deviation == pytest.approx(float(logits.std()), rel=1e-4)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in (load_file(path) | changes).items()}, path, {"format": "pt"})


LAYER = "model.layers.0.self_attn."
CASES = {
    "neox": ({"model_type": "gpt_neox"}, {}, "'gpt_neox' cannot be imported: its rotations are partial"),
    "unknown": ({"model_type": "abacus"}, {}, "model_type 'abacus' cannot be imported; known are llama"),
    "scaled": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, "rope_scaling of type 'llama3'"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, {}, "its weights are quantised"),
    "no shape": ({"hidden_size": None}, {}, "has no 'hidden_size'"),
    "heads": ({"num_key_value_heads": 3}, {}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "layers": ({"num_hidden_layers": 3}, {}, r"has no tensor 'model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, {}, r"'model.layers.1.*' is unknown"),
    "width": ({"intermediate_size": 40}, {}, r"has shape \(48, 32\), its config.json means \(40, 32\)"),
    "bias": ({}, {f"{LAYER}q_proj.bias": torch.ones(32)}, "q_proj.bias' is not zero, and by config.json there is none"),
    "whole numbers": ({}, {f"{LAYER}q_proj.weight": torch.ones(32, 32, dtype=torch.int8)}, "is torch.int8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_theirs(their_model("llama"), tmp_path_factory.mktemp("llama") / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_expressed_is_refused(
    case: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors, message = CASES[case]
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    change_config(folder, **config)
    if tensors:
        change_tensors(folder, **tensors)
    with pytest.raises(InteropError, match=message):
        import_model(folder, tmp_path / "run", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert command.main([str(folder), str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


GPT2_CASES = {
    "activation": ({"activation_function": "relu"}, "activation_function is 'relu'; LightBulb has gelu_new, "),
    "layers": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "upcast": ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
    "scale": ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    "heads": ({"n_head": 3}, "dim 32 does not divide into num_heads 3"),
    "positions": ({"n_positions": 32}, r"wpe.weight' has shape \(64, 32\), its config.json means \(32, 32\)"),
    "width": ({"n_inner": 40}, r"c_fc.weight' has shape \(32, 128\), its config.json means \(32, 40\)"),
}


@pytest.mark.parametrize("case", GPT2_CASES)
def test_a_gpt2_that_cannot_be_expressed_is_refused(case: str, tmp_path: Path) -> None:
    config, message = GPT2_CASES[case]
    folder = save_theirs(their_model("gpt2"), tmp_path / "theirs")
    change_config(folder, **config)
    with pytest.raises(InteropError, match=message):
        import_model(folder, tmp_path / "run", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Without the prefix of the model with a head, and with the causal masks."""
    theirs = their_model("gpt2")
    folder = save_theirs(theirs, tmp_path / "theirs")
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): values for name, values in load_file(path).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(64, 64, dtype=torch.uint8).tril()[None, None] for layer in range(2)}
    save_file(tensors | masks, path, {"format": "pt"})
    receipt = import_model(folder, tmp_path / "run", SMALL)
    assert receipt.tensors_in.keys() == tensors.keys()
    with torch.no_grad():
        wanted, found = theirs(sample()).logits, load_model_for_inference(tmp_path / "run")[0](sample())
    assert (found - wanted).abs().max() < 1e-5


def test_biases_of_zero_and_forgotten_tensors_are_let_through(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    extra = {f"{LAYER}q_proj.bias": torch.zeros(32), f"{LAYER}rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(folder, **extra)
    assert torch.equal(open_source(folder).read("head"), open_source(llama).read("head"))


def test_a_gate_of_the_shared_expert_is_refused(tmp_path: Path) -> None:
    switch = {"type": "switch", "num_experts": 4, "hidden_dim": 24, "shared_hidden_dim": 16}
    run = save_ours(our_config([{"token": ATTENTION, "channel": switch}]), tmp_path / "run")
    export(run, tmp_path / "out", Options())
    (tmp_path / "out" / "receipt.json").unlink()
    change_tensors(tmp_path / "out", **{"model.layers.1.mlp.shared_expert_gate.weight": torch.ones(1, 32)})
    with pytest.raises(InteropError, match="layers.1.mlp.shared_expert_gate.weight' is not zero"):
        open_source(tmp_path / "out")


def test_mamba_with_groups_is_refused(tmp_path: Path) -> None:
    folder = save_theirs(their_model("mamba2", n_groups=2), tmp_path / "theirs")
    with pytest.raises(InteropError, match="n_groups is 2"):
        open_source(folder)


def test_a_folder_of_links_is_read(llama: Path, tmp_path: Path) -> None:
    """As in the cache that downloads go to."""
    for path in llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert open_source(tmp_path).model_config == open_source(llama).model_config


def test_what_a_config_does_not_say(tmp_path: Path) -> None:
    """The window of Mistral is 4096 then; null is none."""
    folder = save_theirs(their_model("mistral"), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    for window, wanted in (({}, 4096), ({"sliding_window": None}, None)):
        rest = {key: value for key, value in config.items() if key != "sliding_window"}
        (folder / "config.json").write_text(json.dumps(rest | window))
        assert open_source(folder).model_config.layer(0).token.window == wanted


def test_pickles_are_never_read(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InteropError, match=r"a pickle \(pytorch_model.bin\), which can run code"):
        open_source(folder)


@pytest.mark.parametrize("table", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, ["a"], {"a": 3}], ids=str)
def test_an_index_that_leads_elsewhere_is_refused(table: object, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(InteropError, match="no table of tensors and their files"):
        open_source(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 200_000], ids=range(5))
def test_a_damaged_config_is_named(content: bytes, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InteropError, match=r"config.json: .*download or export the folder again"):
        open_source(folder)


def test_a_damaged_file_is_named(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InteropError, match="model.safetensors: cannot be read"):
        open_source(folder)


def test_without_a_tokenizer_there_is_no_run(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InteropError, match=r"has no tokenizer.json; write one with AutoTokenizer"):
        import_model(folder, tmp_path / "run", SMALL)


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="neither a run .* nor a Hugging Face folder"):
        open_source(tmp_path / "meta-llama" / "Llama-3.2-1B")


def test_sources_of_both_kinds_give_the_same(llama: Path, tmp_path: Path) -> None:
    import_model(llama, tmp_path / "run", SMALL)
    theirs, ours = open_source(llama), open_source(tmp_path / "run")
    assert theirs.model_config == ours.model_config and sorted(theirs.names()) == sorted(ours.names())
    for name in theirs.names():
        assert torch.equal(theirs.read(name), ours.read(name)), name
    assert ours.tokenizer_path.read_bytes() == theirs.tokenizer_path.read_bytes()
    with pytest.raises(InteropError, match="has no tensor 'abacus'"):
        theirs.read("abacus")
    assert MLP["type"] == ours.model_config.layer(0).channel.type
