"""Feed-forward parts on split models: KAN layers and experts, ungated experts, biases, Lory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

pytestmark = pytest.mark.slow  # quick: one layout of each part, in test_parts.py

Referenced = Callable[..., tuple[Trial, Reference, Path]]


def assert_equal(ranks: RankPool, known: tuple[Trial, Reference, Path], options: dict[str, Any]) -> None:
    trial, reference, folder = known
    trial = replace(trial, parallel=ParallelConfig(**{"data": 1} | options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def pattern(*channels: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"token": {"type": "attention", "num_heads": 4}, "channel": channel} for channel in channels]


def experts(expert: dict[str, Any]) -> dict[str, Any]:
    return {"type": "switch", "num_experts": 4, "expert": expert}


FASTKAN = {"type": "kan", "hidden_dim": 8}
BSPLINE = FASTKAN | {"basis": "bspline"}


@pytest.mark.parametrize("options", [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"ulysses": 2}], ids=str)
def test_kan_layers(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    assert_equal(ranks, referenced(block_pattern=pattern(FASTKAN, BSPLINE)), options)


@pytest.mark.parametrize(
    "options",
    [{"expert": 2, "data": 2}, {"tensor": 2}, {"tensor": 2, "sequence": True, "expert": 2, "data": 2}],
    ids=str,
)
def test_kan_experts(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    assert_equal(ranks, referenced(block_pattern=pattern(experts(FASTKAN), experts(BSPLINE))), options)


@pytest.mark.parametrize("options", [{"tensor": 2, "sequence": True}, {"tensor": 2, "expert": 2, "data": 2}], ids=str)
def test_ungated_layers_and_experts(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    gelu = {"type": "mlp", "hidden_dim": 16, "activation": "gelu"}
    known = referenced(block_pattern=pattern(gelu, experts(gelu | {"activation": "squared_relu"})))
    assert_equal(ranks, known, options)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor": 2, "sequence": True},
        {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2},
        {"tensor": 2, "expert": 2, "data": 2},
        {"expert": 2, "data": 2},
    ],
    ids=str,
)
def test_biases_of_layers_and_experts(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    gelu = {"type": "mlp", "hidden_dim": 16, "activation": "gelu_tanh", "bias": True}
    known = referenced(block_pattern=pattern(gelu, experts(gelu | {"activation": "swiglu"})), norm="layer")
    assert_equal(ranks, known, options)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"data": 2},
        {"tensor": 2, "sequence": True, "data": 2, "recompute": "full"},
    ],
    ids=str,
)
def test_lory_in_segments_cut_by_documents(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    lory = {"type": "lory", "num_experts": 4, "hidden_dim": 16, "segment_length": 4}
    channels = pattern(lory, lory | {"first_segment": "uniform"})
    assert_equal(ranks, referenced(with_documents=True, block_pattern=channels), options)
