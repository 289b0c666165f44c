"""Expert use: counts equal those of each context alone, and the specialisation of known tables."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SWITCH, model_of

from lightbulb.data.loader import IGNORED_LABEL
from lightbulb.evaluation.held_out import HeldOutText
from lightbulb.evaluation.runs import evaluate_model
from lightbulb.evaluation.specialisation import ExpertUse, draw, information
from lightbulb.routing.router import Router


@pytest.mark.parametrize(
    ("shares", "top_k", "bits", "part"),
    [
        (np.eye(4), 1, 2.0, 1.0),  # an expert for each domain
        (np.full((4, 4), 0.25), 1, 0.0, 0.0),
        (np.tile([0.7, 0.1, 0.1, 0.1], (4, 1)), 1, 0.0, 0.0),  # overloaded, but alike for all
        (np.kron(np.eye(2), [[0.5, 0.5]]), 2, 1.0, 1.0),  # two experts for each of two domains
        (np.kron(np.eye(4), np.full((1, 2), 0.5)), 1, 2.0, 1.0),  # more experts than domains
        (np.full((4, 4), 0.25), 4, 0.0, None),  # all experts, always
        (np.full((1, 4), 0.25), 1, 0.0, None),  # one domain
    ],
)
def test_information_of_known_tables(shares: np.ndarray, top_k: int, bits: float, part: float | None) -> None:
    found, normalised = information(shares, top_k)
    assert found == pytest.approx(bits, abs=1e-12)
    assert normalised == (None if part is None else pytest.approx(part, abs=1e-12))


def test_information_is_the_drop_of_entropy() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(6), size=3)

    def entropy(p: np.ndarray) -> float:
        return float(-(p * np.log2(p)).sum())

    found, part = information(shares, 1)
    assert found == pytest.approx(entropy(shares.mean(0)) - np.mean([entropy(row) for row in shares]), rel=1e-9)
    assert part == pytest.approx(found / math.log2(3), rel=1e-9)


def test_equality_of_counts_with_each_context_alone(text: HeldOutText) -> None:
    model = model_of(2)
    expected = {
        name: np.zeros((len(text.groups), router.num_experts))
        for name, router in model.named_modules()
        if isinstance(router, Router)
    }
    group, now = 0, torch.empty(0, dtype=torch.bool)

    def count(name: str):
        def hook(router, inputs, routing):
            for experts in routing.experts[now].tolist():
                expected[name][group, experts] += 1

        return hook

    use = ExpertUse(model, text.groups)
    with use.watching():
        for batch in text:
            model(batch.tokens)
            use.add(batch)
    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in expected]
    for batch in text:
        for row in range(len(batch.tokens)):
            group, now = int(batch.groups[row]), batch.labels[row] != IGNORED_LABEL
            model(batch.tokens[row : row + 1])
    for handle in handles:
        handle.remove()
    assert len(use.layers()) == len(expected) == 3
    for name, layer in use.layers().items():
        assert np.array_equal(layer.counts, expected[f"{name}.router"])
        assert layer.counts.sum() == layer.top_k * sum(int((b.labels != IGNORED_LABEL).sum()) for b in text)


def test_report_says_shares_loads_and_idle_experts(text: HeldOutText, tmp_path: Path) -> None:
    model = model_of(2)
    with torch.no_grad():  # the first layer's router always chooses experts 1 and 2
        x_mean = torch.zeros(4, 32)
        model.blocks["0"].channel.router.weight.copy_(x_mean)
    layers = (report := evaluate_model(model, text).experts)["layers"]
    layer = layers["blocks.0.channel"]
    chosen = [expert for expert, load in enumerate(layer["load"]) if load]  # equal logits: always the same two
    assert len(chosen) == 2 and layer["dead"] == [expert for expert in range(4) if expert not in chosen]
    assert layer["domain"]["specialisation"] == pytest.approx(0.0, abs=1e-12)
    for found in layers.values():
        assert set(found["domain"]["share"]) == {"sums", "tales"}
        assert all(sum(row) == pytest.approx(1.0) for row in found["domain"]["share"].values())
    for kind in ("domain", "cluster"):
        assert draw(report, kind, tmp_path / f"{kind}.png") and (tmp_path / f"{kind}.png").stat().st_size > 10_000


def test_layers_that_cannot_be_shown_say_why(text: HeldOutText, tmp_path: Path) -> None:
    lory = {"type": "lory", "num_experts": 4, "hidden_dim": 16, "segment_length": 8}
    token = {"type": "attention", "num_heads": 4}
    pattern = [{"token": token, "channel": lory}, {"token": token, "channel": SWITCH}]
    model = model_of(0, block_pattern=pattern, modifiers=[{"type": "mixture_of_depths"}])
    report = evaluate_model(model, text).experts
    assert "layers" not in report and not draw(report, "domain", tmp_path / "none.png")
    assert "merges its experts" in report["not_shown"]["blocks.0.channel"]
    assert "mixture of depths" in report["not_shown"]["blocks.1.channel"]
    dense = model_of(0, block_pattern=[{"token": token, "channel": {"type": "mlp", "hidden_dim": 16}}])
    assert evaluate_model(dense, text).experts == {}
