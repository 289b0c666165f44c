"""Which layouts a proof tries, what it refuses, and what its files say. No process is started here."""

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.evaluation.certificate import as_json, as_markdown, summary
from lightbulb.evaluation.proof import MAX_LR, MIN_EPS, LayoutResult, Proof, Skipped, load_variants, plan, trial_of
from lightbulb.evaluation.trial import Difference, RankReport, Reference, global_batch
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.parallel.engine import StepResult
from lightbulb.train.config import RunConfig

CONFIG = "configs/debug/moe.yaml"


def run_config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, CONFIG, overrides)


def test_four_ranks_have_every_choice_of_degrees() -> None:
    trials, skipped = plan([trial_of(run_config(), 3)], 4)
    degrees = {trial.parallel.label().split()[0] for trial in trials}
    assert len(trials) == 1 + 6 + 20 and not skipped
    assert {"TP2xPP2xEP2xDP1", "TP1xPP2xEP2xDP2", "TP1xPP1xEP1xDP4", "TP1xPP2xUL2xEP1xDP1"} <= degrees
    assert {trial.micro_batch_size for trial in trials} == {1, 2, 4, 8}
    assert all(trial.global_batch_size % (trial.micro_batch_size * (trial.parallel.data or 1)) == 0 for trial in trials)


def test_options_and_variants_take_turns() -> None:
    configs = load_variants("configs/debug/proof.yaml")
    trials, skipped = plan([trial_of(config, 3, name) for name, config in configs.items()], 8)
    assert len(trials) == 77 and not skipped
    assert Counter(trial.variant for trial in trials).keys() == configs.keys()
    uses = Counter(option for trial in trials for option in trial.parallel.label().split()[1:])
    assert min(uses.values()) >= 5
    assert uses.keys() == {
        "sequence", "interleave-2", "expert-tensor-1", "recompute-full", "recompute-selective", "plain-optimizer"
    }  # fmt: skip
    assert configs["moe-dropout"].model.dropout == 0.1 and configs["moe"].model.dropout == 0.0


def test_only_divisors_of_the_ranks() -> None:
    trials, _ = plan([trial_of(run_config("train.global_batch_size=12", "model.vocab_size=258"), 1)], 6)
    assert {trial.parallel.copies * (trial.parallel.data or 1) for trial in trials} == {1, 2, 3, 6}


def test_skipped_layouts_give_the_models_reason() -> None:
    _, skipped = plan([trial_of(run_config("model.num_layers=2", "train.global_batch_size=2"), 1)], 4)
    reasons = {entry.label: entry.reason for entry in skipped}
    assert "makes 4 stages, more than model.num_layers 2; lower one" in reasons["TP1xPP4xEP1xDP1"]
    assert reasons["TP1xPP1xEP1xDP4"] == "train.global_batch_size 2 is not a multiple of parallel.data 4"


def test_capacity_is_refused_with_the_fix() -> None:
    config = run_config("model.block_pattern.1.channel.capacity_factor=1.25")
    with pytest.raises(ConfigError, match=r"block_pattern.1.channel.capacity_factor=null"):
        trial_of(config, 3)


def test_adam_is_kept_away_from_rounding_noise() -> None:
    trial = trial_of(run_config("optimizer.lr=0.01", "optimizer.eps=1e-8"), 3)
    assert (trial.optimizer.lr, trial.optimizer.eps) == (MAX_LR, MIN_EPS)


def test_batches_are_skewed_ragged_and_repeatable() -> None:
    trial = trial_of(run_config("data.document_mask=true"), 3)
    first, again, other = global_batch(trial, 0), global_batch(trial, 0), global_batch(trial, 1)
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert first.tokens.float().mean() < 0.35 * trial.model.vocab_size
    assert first.document_ids is not None and first.document_ids.max() >= 1
    predicted = (first.labels != IGNORE).sum(1)
    assert len(set(predicted.tolist())) > 3
    kept = first.labels[:, :-1] != IGNORE
    assert torch.equal(first.labels[:, :-1][kept], first.tokens[:, 1:][kept])


def test_largest_difference_and_not_a_number() -> None:
    report = RankReport()
    report.compare("weight", 1, "a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    report.compare("weight", 1, "b", torch.tensor([1.0]), torch.tensor([1.1]))
    assert report.worst()["weight"] == Difference(0.5, "a", 2.0, 2.5)
    report.compare("weight", 2, "c", torch.tensor([math.nan]), torch.tensor([0.0]))
    report.compare("weight", 2, "d", torch.tensor([9.0]), torch.tensor([0.0]))
    assert report.worst()["weight"].value == math.inf and report.worst()["weight"].where == "c"
    assert report.found["weight", 1].where == "a"
    report.compare("gradient", 1, "zero", torch.zeros(2), torch.zeros(2), scale=0.0)
    assert report.worst()["gradient"].value == 0.0
    report.compare("gradient", 1, "not zero", torch.ones(2), torch.zeros(2), scale=0.0)
    assert report.worst()["gradient"].value == math.inf


def make_proof(worst: dict[str, Difference], failures: list[str]) -> Proof:
    trial = trial_of(run_config(), 1)
    result = LayoutResult(trial, 1.5, worst, failures)
    reference = Reference([StepResult(5.0, 100, 2.0, 0.5, applied=True)], 1.0, {})
    return Proof({"": trial}, {"": reference}, [result], [Skipped("TP9xPP1xEP1xDP1", "too many")], 2.0)


def test_certificate_of_a_proof_that_holds() -> None:
    proof = make_proof({"loss": Difference(1e-7, "loss at step 1", 5.0, 5.0)}, [])
    line = summary({"": proof})
    assert line["ok"] and line["layouts"] == 1 and line["skipped"] == 1 and line["worst_loss_diff"] == 1e-7
    written: dict[str, Any] = json.loads(json.dumps(as_json(proof, {"": run_config()}), allow_nan=False))
    assert written["compared"][0]["worst"]["loss"]["where"] == "loss at step 1"
    assert written["variants"][""]["config"]["model"]["dim"] == 32 and "torch" in written["versions"]
    assert "**Passed**: 1 layouts" in as_markdown(proof) and "TP9xPP1xEP1xDP1: too many" in as_markdown(proof)


def test_certificate_of_a_layout_that_crashed() -> None:
    proof = make_proof({}, ["TP1xPP1xEP1xDP1 micro-batch 1: rank 0 died\nmore"])
    line = summary({"": proof})
    assert not line["ok"] and line["worst_loss_diff"] is None
    assert json.dumps(as_json(proof, {"": run_config()}), allow_nan=False)
    assert "**FAILED**" in as_markdown(proof) and "- TP1xPP1xEP1xDP1 micro-batch 1: rank 0 died\n" in as_markdown(proof)


def test_nothing_compared_is_not_a_proof() -> None:
    proof = make_proof({}, [])
    assert not Proof(proof.variants, proof.references, [], [], 0.0).ok


def test_dense_model_has_no_expert_layouts() -> None:
    block = {"token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 64}}
    values = run_config().model_dump() | {"model": {**run_config().model.model_dump(), "block_pattern": [block]}}
    _, skipped = plan([trial_of(build_config(RunConfig, values), 1)], 2)
    assert [entry.label for entry in skipped] == ["TP1xPP1xEP2xDP2", "TP1xPP1xUL2xEP2xDP1"]
    assert "no block has experts" in skipped[0].reason
