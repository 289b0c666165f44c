"""Mixers with and without rotary positions."""

import pytest
import torch

from lightbulb.config import build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.mixers.token.block_sparse import BlockSparseConfig
from lightbulb.mixers.token.infini import InfiniConfig
from lightbulb.nn.parameter import Init, initialise

CONFIGS = {
    "attention": (AttentionConfig, {}),
    "infini": (InfiniConfig, {"segment_length": 4}),
    "block_sparse": (BlockSparseConfig, {"block_size": 4, "window": 8}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("theta", [None, 100.0])
def test_only_the_rotation_reads_distances(name: str, theta: float | None) -> None:
    kind, options = CONFIGS[name]
    config = build_config(kind, {"type": name, "num_heads": 2, "rope_theta": theta, **options})
    mixer = config.build(16, 12, Init(0.5, 0.5))
    initialise(mixer, 0)
    x = torch.randn(12, 1, 16, generator=torch.Generator().manual_seed(0))
    near, far = (mixer(x, Context(torch.arange(12) * scale))[0] for scale in (1, 3))
    assert torch.equal(near, far) == (theta is None)
