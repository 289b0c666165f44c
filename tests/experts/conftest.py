"""Small dense runs to be made mixtures of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_runs import MODEL, make_run

__all__ = ["MODEL"]


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """``dense("name", seed=3, drift=0.1, **changes)``: a run of a small dense model; with ``drift`` the model of
    ``seed`` 0 with noise, as branches of one seed are."""

    def make(name: str, seed: int = 0, drift: float = 0.0, **changes: Any) -> Path:
        return make_run(tmp_path / name, MODEL | changes, seed, drift)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(5))
