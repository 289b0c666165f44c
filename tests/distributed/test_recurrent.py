"""Retention and Mamba-2 on layouts that split heads, positions and layers, against plain PyTorch."""

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

# A document's first result is q k v over its own length: where q k is almost zero, the norm makes much of its rounding.
RETENTION = {"type": "retention", "num_heads": 4, "chunk_size": 4, "norm_eps": 0.1}
SHARED = {"type": "mamba", "state_dim": 4, "head_dim": 8, "chunk_size": 4}  # four heads that share one group
GROUPED = {**SHARED, "num_groups": 2}
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "recompute": "selective"},
    {"pipeline": 2},
    {"data": 2},
    {"ulysses": 2},
]


@pytest.mark.parametrize(
    ("token", "layout"),
    [
        *((token, layout) for token in (RETENTION, SHARED, GROUPED) for layout in LAYOUTS),
        *((token, {"ulysses": 2, "tensor": 2, "sequence": True}) for token in (RETENTION, SHARED, GROUPED)),
    ],
    ids=str,
)
def test_layout_trains_what_one_process_trains(
    ranks: RankPool, referenced: Referenced, token: dict[str, Any], layout: dict[str, Any]
) -> None:
    block = {"token": token, "channel": {"type": "mlp", "hidden_dim": 32}}
    trial, reference, folder = referenced(with_documents=True, block_pattern=[block], num_layers=2)
    trial = replace(trial, parallel=ParallelConfig(**{"data": 1, **layout}), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)
