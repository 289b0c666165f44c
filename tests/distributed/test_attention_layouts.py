"""The options of attention on layouts that split their heads, tables, sinks and sequences."""

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

HEADS = {"type": "attention", "num_heads": 4}
NEAR = HEADS | {"window": 5, "sink": "learned", "qk_norm": True}
RELATIVE = HEADS | {"relative_positions": 4, "rope_theta": None, "sink": "one"}
LAMBDA = HEADS | {"max_distance": 3, "num_global": 2, "sink": "learned"}
PATTERN = [{"token": token, "channel": {"type": "mlp", "hidden_dim": 16}} for token in (NEAR, RELATIVE)]
STRETCHED = [{"token": token, "channel": {"type": "mlp", "hidden_dim": 16}} for token in (LAMBDA, RELATIVE)]

LAYOUTS = [
    {"tensor": 2, "data": 1},
    {"tensor": 2, "sequence": True, "data": 1, "recompute": "selective"},
    {"pipeline": 2, "data": 1},
    {"data": 2},
    {"ulysses": 2, "data": 1},
    {"ulysses": 2, "tensor": 2, "sequence": True, "data": 1, "recompute": "full"},
]


def check(ranks: RankPool, known: tuple[Trial, Reference, Path], options: dict[str, Any]) -> None:
    trial, reference, folder = known
    trial = replace(trial, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: ParallelConfig(**options).label())
def test_windows_sinks_and_relative_positions(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    check(ranks, referenced(with_documents=True, block_pattern=PATTERN), options)


@pytest.mark.parametrize(
    "options",
    [{"tensor": 2, "sequence": True, "data": 1}, {"ulysses": 2, "data": 1}, {"pipeline": 2, "data": 1}],
    ids=lambda options: ParallelConfig(**options).label(),
)
def test_gist_tokens_and_lambda_masks(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    check(ranks, referenced(with_documents=True, block_pattern=STRETCHED, gist_token_id=0), options)
