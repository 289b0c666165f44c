"""Four gloo ranks for the whole session, and models small enough to train on all their layouts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightbulb.config import build_config
from lightbulb.evaluation.trial import Reference, Trial, train_reference
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.workers import RankPool

MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 16,
    "num_layers": 4,
    "context_length": 12,
    "block_pattern": [
        {
            "token": {"type": "attention", "num_heads": 8, "num_kv_heads": 4, "qk_norm": True},
            "channel": {"type": "mlp", "hidden_dim": 32},
        },
        {
            "token": {"type": "attention", "num_heads": 4},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 16, "router": {"top_k": 2}},
        },
    ],
}


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4, timeout_seconds=120.0, preload=None) as pool:  # the session's conftest has chosen what to preload
        yield pool


@pytest.fixture(scope="session")
def referenced(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Trial, Reference, Path]]:
    """``referenced(with_documents=True, tie_embeddings=True)``: a trial with its reference, trained once."""
    known: dict[str, tuple[Trial, Reference, Path]] = {}

    def get(with_documents: bool = False, **changes: Any) -> tuple[Trial, Reference, Path]:
        key = json.dumps([with_documents, changes], sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            model = build_config(LanguageConfig, MODEL | changes)
            # with this seed bfloat16 routes tokens as float32 does; where it does not, gradients have little in common
            trial = Trial(model, OptimizerConfig(lr=1e-3, eps=1e-5), 8, 3, 8, with_documents)
            (reference,) = ranks.run(1, train_reference, trial, folder)
            known[key] = trial, reference, folder
        return known[key]

    return get
