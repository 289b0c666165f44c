"""Recompute keeps less and changes nothing."""

from typing import Any

import pytest
import torch

from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise
from lightbulb.nn.recompute import Recompute

MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 16,
    "num_layers": 4,
    "context_length": 64,
    "dropout": 0.1,
    "block_pattern": [
        {
            # With a sink a mixer keeps its probabilities; plain causal attention keeps next to nothing anyway.
            "token": {"type": "attention", "num_heads": 4, "sink": "learned"},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32, "router": {"jitter": 0.1}},
        }
    ],
}


def train(mode: Recompute) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept for the backward, and the gradients."""
    model = build_config(LanguageConfig, MODEL).build()
    initialise(model, 0)
    model.recompute = mode
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(0, 64, (2, 65), generator=torch.Generator().manual_seed(0))
    noise = Noise(5, torch.tensor([10, 11]), 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:], None, noise).sum()
        total = sum(kept.values())
    loss.backward()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("mode", "share"), [("selective", 0.8), ("full", 0.4)])
def test_less_is_kept_and_the_gradients_are_the_same(mode: Recompute, share: float) -> None:
    all_bytes, expected = train("none")
    some_bytes, gradients = train(mode)
    assert some_bytes < share * all_bytes
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))
