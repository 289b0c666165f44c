"""`lightbulb upcycle`: its config, mergekit's shape, runs and Hugging Face folders, errors in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from dense_runs import model_of, tensor
from training_runs import losses

from lightbulb.config import ConfigError
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.proof import load_variants
from lightbulb.experts.hf.convert import Options, import_model
from lightbulb.experts.source import open_source
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import load_upcycle_config
from lightbulb.launcher.upcycle import main
from lightbulb.train.checkpoint import load_model_for_inference
from lightbulb.train.manifest import step_folder
from lightbulb.train.origin import Origin, parent_of, read_origin

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


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2"])
def test_equality_of_mixtures_of_folders_with_biases(tmp_path, llamas, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        shutil.copy(llamas[0] / "tokenizer.json", tmp_path / name)
    ids = torch.tensor([[5, 9, 200, 3, 77]])
    wanted = model(ids).logits
    sources = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    for values in (
        {"method": "btx", "sources": sources},
        {"method": "sparse", "sources": sources[:1], "num_experts": 4},
    ):
        run = tmp_path / values["method"]
        comparison = upcycle(load_upcycle_config(write(tmp_path / "c.yaml", values | {"run": str(run)}))).comparison
        assert comparison.greatest_difference < 1e-5 < comparison.standard_deviation
        assert (load_model_for_inference(run)[0](ids) - wanted).abs().max() < 1e-4 * wanted.std()


def test_a_run_and_a_hugging_face_folder_mix(tmp_path, llamas):
    import_model(llamas[0], tmp_path / "imported", Options())
    sources = [{"path": str(tmp_path / "imported")}, {"path": str(llamas[0])}]
    config = load_upcycle_config(
        write(tmp_path / "c.yaml", {"run": str(tmp_path / "moe"), "method": "btx", "sources": sources})
    )
    comparison = upcycle(config).comparison
    assert comparison.greatest_difference < 1e-4 < comparison.standard_deviation
    assert "all sources are equal" in comparison.reference


def test_mergekit_files_are_read(tmp_path, llamas):
    values = {
        "base_model": str(llamas[0]), "gate_mode": "cheap_embed", "dtype": "float32", "experts_per_token": 2,
        "experts": [
            {"source_model": str(llamas[0]), "positive_prompts": ["aaa bbb abab"]},
            {"source_model": str(llamas[1]), "positive_prompts": ["ppp ooo popo", "o p"]},
        ],
    }  # fmt: skip
    path = write(tmp_path / "mergekit.yaml", values)
    config = load_upcycle_config(path, [f"run={tmp_path / 'moe'}"])
    assert (config.method, config.trunk, config.router_start.kind) == ("btx", "seed_model", "embedding")
    assert [source.prompts for source in config.sources] == [["aaa bbb abab"], ["ppp ooo popo", "o p"]]
    assert main([path, f"run={tmp_path / 'moe'}"]) == 0
    base, other = (open_source(folder) for folder in llamas)
    moe = tmp_path / "moe"
    assert torch.equal(tensor(moe, "embedding.weight"), base.read("embedding.weight"))
    found = tensor(moe, "blocks.1.channel.experts.down.weight")
    assert torch.equal(found[1], other.read("blocks.1.channel.down.weight"))
    assert model_of(moe)(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_mode": "magic"}, "gate_mode 'magic' is none of hidden, random, cheap_embed"),
        ({"merge_method": "slerp"}, "'merge_method' has no meaning here"),
        ({"experts": [{"model": "a"}]}, "experts: expected a list of mappings with source_model"),
        ({"experts": [{"source_model": "a"}]}, r"experts.0.positive_prompts: gate_mode 'hidden' needs some"),
        ({"experts": [{"source_model": "a", "negative_prompts": ["b"]}]}, "negative_prompts are not used"),
        ({"run": None}, "run"),
    ],
)
def test_mergekit_files_that_say_something_else_are_refused(tmp_path, changes, message):
    experts = [{"source_model": name, "positive_prompts": ["x"]} for name in ("a", "b")]
    path = write(tmp_path / "m.yaml", {"base_model": "a", "experts": experts, "run": "x"} | changes)
    with pytest.raises(ConfigError, match=message):
        load_upcycle_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "average"}, "method"),
        ({"method": "sparse"}, "makes experts of one model, sources has 2"),
        ({"num_experts": 3}, "num_experts 3 is not a multiple of the 2 sources"),
        ({"router": {"top_k": 3}}, "router.top_k 3 exceeds the 2 experts"),
        ({"shards": 2}, "virtual-group has 2 or more"),
        ({"trunk": "seed_model"}, "needs a seed_model"),
        ({"shared_expert": True}, "use sparse or drop"),
        ({"attention_router": {}}, "attention_router has no effect"),
        ({"sources": [{"path": "a", "tokens": 3}, {"path": "b"}]}, "some have tokens"),
        ({"clusters": [{"path": "c"}]}, "clusters has 1 for 2 experts"),
        ({"sources": [{"path": "a"}]}, "needs two sources"),
        ({"sources": [{"path": "a"}], "method": "sparse"}, "needs num_experts"),
        (
            {"sources": [{"path": "a"}], "method": "virtual-group", "num_experts": 8, "shards": 4},
            "router.top_k 2 is not a multiple of shards 4",
        ),
        (
            {"sources": [{"path": "a"}], "method": "sparse", "num_experts": 4, "router": {"normalize_gates": False}},
            "only where gates sum to 1",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(tmp_path, changes, message):
    values = {"run": "x", "method": "btx", "sources": [{"path": "a"}, {"path": "b"}]} | changes
    with pytest.raises(ConfigError, match=message):
        load_upcycle_config(write(tmp_path / "c.yaml", values))


def test_errors_are_one_sentence_and_leave_nothing(tmp_path, llamas, capsys):
    values = {"run": str(tmp_path / "moe"), "method": "btx", "sources": [{"path": str(llamas[0])}, {"path": "nowhere"}]}
    assert main([write(tmp_path / "c.yaml", values)]) == 1
    assert capsys.readouterr().err == (
        "error: nowhere: neither a run (config.yaml) nor a Hugging Face folder (config.json); check the path\n"
    )
    assert not (tmp_path / "moe").exists()


def test_another_vocabulary_is_refused(tmp_path, llamas, capsys):
    other = shutil.copytree(llamas[1], tmp_path / "other")
    Tokenizer.train(["xyz xyz xyz qrst"], 260).save(other / "tokenizer.json")
    values = {
        "run": str(tmp_path / "moe"),
        "method": "btx",
        "sources": [{"path": str(llamas[0])}, {"path": str(other)}],
    }
    assert main([write(tmp_path / "c.yaml", values)]) == 1
    assert "its tokenizer has another vocabulary" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_run_goes_on_as_a_mixture(tmp_path, run_file, start):
    """In the mixture's folder as from it: the same losses, the first of which is the dense model's."""
    train = {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"}
    pattern = [{"token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 48}}]
    model = {"vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32, "block_pattern": pattern}
    assert start("pretrain", [str(run_file("dense", model=model, train=train))]).wait() == 0
    values = {"run": str(tmp_path / "moe"), "method": "sparse", "num_experts": 4}
    assert main([write(tmp_path / "c.yaml", values | {"sources": [{"path": str(tmp_path / "dense")}]})]) == 0
    receipt = json.loads((tmp_path / "moe" / "receipt.json").read_text())
    assert receipt["comparison"]["text"]["source"].endswith("held out")
    config = yaml.safe_load((tmp_path / "moe" / "config.yaml").read_text())
    fresh = write(tmp_path / "fresh.yaml", config | {"run": str(tmp_path / "fresh"), "start_from": config["run"]})
    dense = write(tmp_path / "again.yaml", yaml.safe_load((tmp_path / "dense" / "config.yaml").read_text())
                  | {"run": str(tmp_path / "again"), "start_from": str(tmp_path / "dense")})  # fmt: skip
    for path in (fresh, dense, str(tmp_path / "moe" / "config.yaml")):  # last: it then has a newer checkpoint
        command = start("pretrain", [path])
        assert command.wait() == 0, command.text()
    started = read_origin(tmp_path / "again")
    assert started == Origin(kind="start", parents=[parent_of(step_folder(tmp_path / "dense", 2))])
    found = [losses(tmp_path / name) for name in ("moe", "fresh", "again")]
    assert found[0] == found[1]
    assert found[0][1] == pytest.approx(found[2][1], abs=1e-5)


@pytest.mark.slow
def test_two_llamas_train_on_every_layout(tmp_path, llamas, start):
    """The mixture's config under `lightbulb prove`: among the layouts of two ranks are TP2, EP2 and PP2."""
    values = {"run": str(tmp_path / "moe"), "method": "btx+moa", "sources": [{"path": str(path)} for path in llamas]}
    assert main([write(tmp_path / "c.yaml", values)]) == 0
    settings = ["train.global_batch_size=8", "optimizer.eps=1e-5"]
    command = start("prove", [str(tmp_path / "moe" / "config.yaml"), "--ranks", "2", *settings])
    assert command.wait(600) == 0, command.text()
    for layout in ("TP2", "EP2", "PP2"):
        assert layout in command.text()
