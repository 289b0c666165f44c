"""Layouts of block-sparse attention and Infini-attention against plain PyTorch."""

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

SPARSE = {"type": "block_sparse", "num_heads": 4, "block_size": 2}
BAND = SPARSE | {"num_kv_heads": 2, "qk_norm": True, "window": 3, "num_global": 1, "stride": 2}
HASH = SPARSE | {"pattern": "hash", "num_buckets": 4, "qk_norm": True}
QK = SPARSE | {"num_kv_heads": 2, "pattern": "qk", "drop": 0.4}
INFINI = {"type": "infini", "num_heads": 4, "num_kv_heads": 2, "segment_length": 4}

MODELS = {
    "band": [BAND],
    "chosen": [HASH, QK],
    "infini": [INFINI, INFINI | {"update": "delta", "segment_length": 5}],
}

LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "recompute": "selective"},
    {"pipeline": 2},
    {"ulysses": 2, "recompute": "full"},
    {"data": 2},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: ParallelConfig(**options).label())
@pytest.mark.parametrize("name", MODELS)
def test_layout_trains_what_one_process_trains(
    ranks: RankPool, referenced: Callable[..., tuple[Trial, Reference, Path]], name: str, options: dict[str, Any]
) -> None:
    blocks = [{"token": token, "channel": {"type": "mlp", "hidden_dim": 32}} for token in MODELS[name]]
    trial, reference, folder = referenced(with_documents=True, block_pattern=blocks)
    trial = replace(trial, parallel=ParallelConfig(**{"data": 1} | options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def test_tensor_and_ulysses_together_split_the_noise_of_heads(
    ranks: RankPool, referenced: Callable[..., tuple[Trial, Reference, Path]]
) -> None:
    token = QK | {"num_kv_heads": 4}
    blocks = [{"token": part, "channel": {"type": "mlp", "hidden_dim": 32}} for part in (HASH, token)]
    trial, reference, folder = referenced(block_pattern=blocks, dropout=0.1)
    parallel = ParallelConfig(tensor=2, ulysses=2, sequence=True, data=1)
    result = compare_layout(replace(trial, parallel=parallel, micro_batch_size=4), reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)
