"""Mixtures of experts and of attention heads on layouts, against plain PyTorch."""

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

ATTENTION = {"type": "attention", "num_heads": 4}
MLP = {"type": "mlp", "hidden_dim": 16}
NOISY = {"balance_loss": 0.1, "jitter": 0.1}


def check(ranks: RankPool, referenced: Referenced, options: dict[str, Any], token: Any, channel: Any) -> None:
    block = {"token": token, "channel": channel}
    trial, reference, folder = referenced(with_documents=True, num_layers=2, block_pattern=[block])
    trial = replace(trial, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


LAYOUTS = [
    {"tensor": 2, "data": 1},
    {"tensor": 2, "sequence": True, "data": 1, "recompute": "selective"},
    {"pipeline": 2, "data": 1, "recompute": "full"},
    {"data": 2},
    {"ulysses": 2, "data": 1},
    {"ulysses": 2, "tensor": 2, "sequence": True, "data": 1},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: ParallelConfig(**options).label())
def test_mixture_of_attention_heads(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    token = {"type": "moa", "num_experts": 3, "num_kv_heads": 4, "head_dim": 4, "qk_norm": True, "router": NOISY}
    check(ranks, referenced, options, token, MLP)


@pytest.mark.parametrize("options", [{"pipeline": 2, "data": 2}, {"data": 4}], ids=str)
def test_original_mixture_of_attention_heads(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    router = NOISY | {"normalizer_gradient": False}
    token = {"type": "moa", "num_experts": 4, "num_kv_heads": 1, "head_dim": 8, "router": router}
    check(ranks, referenced, options, token, MLP)


SPREAD = [
    {"tensor": 2, "data": 1},
    {"expert": 2, "data": 2},
    {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
    {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2, "data": 1, "recompute": "full"},
    {"ulysses": 2, "expert": 2, "data": 1},
    {"pipeline": 2, "data": 1},
]
ROUTERS = {
    "v1": NOISY | {"top_k": 3},
    "v3": {"top_k": 3, "score": "sigmoid", "normalize_gates": True, "gate_scale": 2.5, "bias_rate": 0.01},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("options", SPREAD, ids=lambda options: ParallelConfig(**options).label())
def test_fine_grained_and_shared_experts(
    ranks: RankPool, referenced: Referenced, options: dict[str, Any], router: str
) -> None:
    channel = {"type": "deepseek_moe", "num_experts": 8, "num_shared": 2, "hidden_dim": 8, "router": ROUTERS[router]}
    check(ranks, referenced, options, ATTENTION, channel)


@pytest.mark.parametrize("options", SPREAD, ids=lambda options: ParallelConfig(**options).label())
def test_expert_dropout_is_the_same_on_every_layout(
    ranks: RankPool, referenced: Referenced, options: dict[str, Any]
) -> None:
    channel = {"type": "switch", "num_experts": 4, "hidden_dim": 16, "expert_dropout": 0.4}
    check(ranks, referenced, options, ATTENTION, channel)
