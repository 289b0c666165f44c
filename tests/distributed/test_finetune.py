"""Runs that go on from another run's weights: what is frozen stays, what is tuned is tuned right, on any ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from training_runs import TRAIN, final_hashes, losses

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts.receipt import RECEIPT, read_receipt
from lightbulb.experts.run_folder import whole, write_run
from lightbulb.experts.source import RunSource, build_model
from lightbulb.inference.generate import SamplingConfig, generate
from lightbulb.launcher.finetune import finish
from lightbulb.models.trainable import trained_names
from lightbulb.parallel.workers import RankPool
from lightbulb.routing.router import Router
from lightbulb.train.checkpoint import Checkpoint, load_model_for_inference
from lightbulb.train.config import RunConfig
from lightbulb.train.finetune import load_finetune_config
from lightbulb.train.loop import open_trainer
from lightbulb.train.manifest import step_folder
from lightbulb.train.origin import read_origin

CPU = torch.device("cpu")
STEPS = 4
SHORT = TRAIN | {"steps": STEPS, "save_every": 2, "eval_every": 0, "keep_checkpoints": 9}
BLOCK = {
    "token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2},
    "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
}
MODEL = {"vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32, "block_pattern": [BLOCK]}


def pretrain(rank: int, path: Path, *overrides: str) -> None:
    with open_trainer(load_config(RunConfig, path, overrides), CPU) as trainer:
        assert trainer.run()


def finetune(rank: int, path: Path, *overrides: str) -> dict[str, Any]:
    """Train, and evaluate on everything held out."""
    with open_trainer(load_finetune_config(path, overrides).run, CPU) as trainer:
        assert trainer.run()
        return trainer.evaluate()


def tensors(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    checkpoint = Checkpoint(step_folder(run, step))
    records = checkpoint.manifest.tensors
    return {n: checkpoint.read(n, tuple(slice(0, s) for s in r.shape), tuple(r.shape)) for n, r in records.items()}


@pytest.fixture(scope="module")
def base(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small mixture."""
    folder = tmp_path_factory.mktemp("base")
    config = {"run": str(folder / "base"), "model": MODEL, "data": {"path": str(corpus)}, "optimizer": {"lr": 5e-4}}
    (folder / "base.yaml").write_text(yaml.safe_dump(config | {"train": SHORT}))
    ranks.run(1, pretrain, folder / "base.yaml")
    return folder / "base"


@pytest.fixture
def tuning(base: Path, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """``tuning("name", trainable="routers", lora={...})``: a fine-tuning file that starts from the base."""

    def make(name: str, trainable: Any = "all", **changes: Any) -> Path:
        config: dict[str, Any] = {
            "run": str(tmp_path / name), "start_from": str(base), "data": {"path": str(corpus)},
            "train": SHORT | {"trainable": trainable}, "schedule": {"warmup": 0.0},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | changes))
        return path

    return make


@pytest.mark.parametrize("trainable", ["routers", "routers+experts", ["blocks.*.token.*"]], ids=str)
def test_what_is_frozen_keeps_its_bits_and_has_no_moments(
    ranks: RankPool, tuning: Callable[..., Path], base: Path, trainable: Any
) -> None:
    path = tuning("tuned", trainable)
    ranks.run(1, finetune, path, "train.steps=2")
    ranks.run(1, finetune, path)  # goes on
    before, after = tensors(base), tensors(path.with_suffix(""))
    trained = trained_names(load_config(RunConfig, base / "config.yaml").model, trainable)
    for name, values in after.items():
        if name.endswith(":exp_avg"):
            assert name.removesuffix(":exp_avg") in trained
        elif not name.endswith((":exp_avg_sq", ".load")):
            assert torch.equal(values, before[name]) == (name not in trained), name
    assert sorted(losses(path.with_suffix(""))) == [1, 2, 3, 4]
    assert f"{min(trained)}:exp_avg_sq" in after and len(trained) < len(before)


def test_training_everything_is_pretraining(
    ranks: RankPool, tuning: Callable[..., Path], base: Path, corpus: Path, tmp_path: Path
) -> None:
    path = tuning("tuned", "all", optimizer={"lr": 1e-3})
    ranks.run(1, finetune, path)
    run = load_finetune_config(path).run.model_dump(mode="json") | {"run": str(tmp_path / "plain")}
    del run["train"]["trainable"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(run))
    ranks.run(1, pretrain, tmp_path / "plain.yaml")
    assert final_hashes(tmp_path / "tuned", STEPS) == final_hashes(tmp_path / "plain", STEPS)
    assert losses(tmp_path / "tuned") == losses(tmp_path / "plain")


def test_the_choice_cannot_change_on_the_way(ranks: RankPool, tuning: Callable[..., Path]) -> None:
    path = tuning("tuned", "routers")
    ranks.run(1, finetune, path, "train.steps=2")
    with pytest.raises(Exception, match=r"train\.trainable = routers, this config has all"):
        ranks.run(1, finetune, path, "train.trainable=all")


def write_pairs(folder: Path, corpus: Path) -> Path:
    """Pairs with answers of very different lengths, tokenised as the corpus is."""
    pairs = [{"prompt": f"{i} plus {i} is?", "answer": f"{2 * i}" + ", as said" * (i % 5)} for i in range(300)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"type": "jsonl", "domain": "sums", "path": str(folder / "pairs.jsonl"), "conversation": {}}
    values = {
        "output": str(folder / "pairs"), "context_length": 32, "held_out_fraction": 0.1, "sources": [source],
        "tokenizer": {"path": str(corpus / "tokenizer.json")}, "executor": {"workers": 1},
    }  # fmt: skip
    preprocess(build_config(CorpusConfig, values))
    return folder / "pairs"


def test_equality_of_answers_on_two_data_ranks(
    ranks: RankPool, tuning: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    data = {"path": str(write_pairs(tmp_path, corpus))}
    one, two = tuning("one", data=data), tuning("two", data=data)
    assert load_finetune_config(one).run.data.document_mask
    assert not load_finetune_config(one, ["data.document_mask=false"]).run.data.document_mask
    (alone,) = ranks.run(1, finetune, one, "train.micro_batch_size=8")
    together = ranks.run(2, finetune, two, "train.micro_batch_size=1")
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(loss, abs=1e-5)
    assert together[0]["held_out_bpb"] == pytest.approx(alone["held_out_bpb"], rel=1e-5)
    first, then = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert max(float((first[name] - then[name]).abs().max()) for name in first) < 1e-5
    counted = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    tokens = [record["tokens"] for record in counted if record["kind"] == "train"]
    assert tokens[-1] < STEPS * 8 * 32 / 2 and len({b - a for a, b in zip(tokens, tokens[1:], strict=False)}) > 1


def test_updates_are_merged_into_plain_weights(
    ranks: RankPool, tuning: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    path = tuning("tuned", lora={"rank": 4, "alpha": 64}, merge=True)
    ranks.run(1, finetune, path)
    plan = load_finetune_config(path)
    written = [finish(plan) or (tmp_path / "tuned" / "merged" / RECEIPT).stat().st_mtime_ns for _ in range(2)]
    assert written[0] == written[1]  # once is enough
    ranks.run(1, finetune, path, "train.steps=6")
    assert finish(load_finetune_config(path, ["train.steps=6"])) == 0
    merged = read_origin(tmp_path / "tuned" / "merged")
    assert merged is not None and merged.parents[0].step == 6
    origin = read_origin(tmp_path / "tuned")
    assert origin is not None and origin.kind == "finetune" and Path(origin.parents[0].run) == base
    receipt = read_receipt(tmp_path / "tuned" / "merged" / RECEIPT)
    assert receipt is not None and receipt.comparison is not None
    assert receipt.comparison.greatest_difference < 1e-4
    model, tokenizer, config = load_model_for_inference(tmp_path / "tuned" / "merged")
    assert config.model == load_config(RunConfig, base / "config.yaml").model
    name = "blocks.0.token.query.weight"
    assert not torch.equal(model.state_dict()[name], tensors(base)[name])
    ids = tokenizer.encode_batch(["1 plus"])[0]
    assert len(list(generate(model, ids, SamplingConfig(temperature=0, max_new_tokens=3), None))) == 3


def skewed(base: Path, corpus: Path, out: Path) -> Path:
    """The base with routers that send nearly every token to the same experts."""
    source = RunSource(base)
    model, seen = build_model(source), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].mean(0)}))
    ids = Tokenizer.load(corpus / "tokenizer.json").encode_batch([(corpus / "tokenizer.json").read_text()])[0][:512]
    with torch.no_grad():
        model(torch.tensor(ids).view(16, 32))
    values = {name: source.read(name).clone() for name in source.names()}
    generator = torch.Generator().manual_seed(0)
    for name, mean in seen.items():
        values[f"{name}.weight"] = torch.empty_like(values[f"{name}.weight"]).normal_(0, 0.02, generator=generator)
        values[f"{name}.weight"][0] += 0.5 * mean / mean.norm()
        values[f"{name}.load"] = torch.full((4,), 0.25)
    pieces = [whole(name, tuple(v.shape), v.clone) for name, v in values.items()]
    out.mkdir()
    write_run(out, source.config, pieces, (base / "tokenizer.json").read_text())
    return out


def greatest_loads(run: Path) -> list[float]:
    """Of each step, the share of the busiest expert of any layer."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [max(max(load) for load in r["expert_load"].values()) for r in records if r["kind"] == "train"]


def test_the_balance_loss_evens_the_loads_of_tuned_routers(
    ranks: RankPool, tuning: Callable[..., Path], base: Path, corpus: Path, tmp_path: Path
) -> None:
    start = str(skewed(base, corpus, tmp_path / "skewed"))
    ends = {}
    for alpha in (0.0, 1.0):
        path = tuning(f"alpha-{alpha}", "routers", start_from=start, optimizer={"lr": 5e-3})
        setting = f"model.block_pattern.0.channel.router.balance_loss={alpha}"
        ranks.run(1, finetune, path, "train.steps=60", "train.save_every=0", setting)
        loads = greatest_loads(path.with_suffix(""))
        assert loads[0] > 0.45  # with two experts of each token 0.5 is the most
        ends[alpha] = sum(loads[-10:]) / 10
    assert ends[1.0] < 0.38 < 0.42 < ends[0.0], ends


def test_wrong_files_are_errors(tuning: Callable[..., Path], tmp_path: Path, base: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"start_from": None}, "start_from: missing"),
        ({"start_from": str(tmp_path)}, "is not a run folder"),
        ({"trainable": ["blocks.*.chanel.*"]}, "train.trainable: 'blocks.*.chanel.*' names no parameter"),
        ({"trainable": ["blocks.0.token.qery.weight"]}, "did you mean 'blocks.0.token.query.weight'"),
        ({"merge": True}, "merge: there are no updates to merge"),
        ({"merge": 1}, "merge: 1 is neither true nor false"),
        ({"lora": {"rank": 4}, "merge": True, "model": {"modifiers": [{"type": "bitlinear"}]}}, "quantised in every"),
        ({"lora": 8}, "lora: 8 is no mapping"),
        ({"lora": {"rang": 8}}, "unknown key 'rang', did you mean 'rank'"),
        ({"lora": {"rank": 4}, "model": {"modifiers": [{"type": "lora"}]}}, "has low-rank updates already"),
    ]
    for number, (changes, message) in enumerate(cases):
        path = tuning(f"wrong-{number}", **changes)
        with pytest.raises(ConfigError) as caught:
            load_finetune_config(path)
        assert message in str(caught.value)


def test_the_decay_begins_where_the_warmup_ends(tuning: Callable[..., Path]) -> None:
    for schedule, wanted in (({}, (0.03, 0.97)), ({"warmup": 0.1}, (0.1, 0.9)), ({"decay": 0.5}, (0.03, 0.5))):
        found = load_finetune_config(tuning("tuned", schedule=schedule)).run.schedule
        assert (found.warmup, found.decay) == wanted
    with pytest.raises(ConfigError, match=r"schedule\.warmup: .*less than 1"):
        load_finetune_config(tuning("tuned", schedule={"warmup": 3}))


def test_another_tokenizer_is_an_error(tuning: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    Tokenizer.train(["other words"], 300).save(tmp_path / "other" / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"written with another tokenizer than .*tokenizer\.path="):
        load_finetune_config(tuning("tuned", data={"path": str(tmp_path / "other")}))
