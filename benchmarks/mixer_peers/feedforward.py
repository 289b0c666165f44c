"""Feed-forward layers: a KAN layer against pykan's, and what merging experts adds to a dense layer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lightbulb.mixers.base import ChannelMixer, Context
from lightbulb.mixers.channel.lory import LoryConfig
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.linear import ColumnParallelLinear
from lightbulb.nn.parameter import Init, initialise
from lightbulb.nn.splines import SplineLinear, cubic_basis
from mixer_peers.timing import forward_backward, interleaved

_INIT = Init(0.05, 0.05)


def measure(rounds: int) -> dict[str, float]:
    """Ratios of CPU seconds, forward and backward."""
    return _kan(rounds) | _lory(rounds)


class _KANLayer(nn.Module):
    """One of our layers of edges, with pykan's basis and grid."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.base = ColumnParallelLinear(in_features, out_features, 0.05)
        self.spline = SplineLinear(in_features, out_features, cubic_basis(), 0.05, SINGLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.base.multiply(silu(x)).add_(self.spline(x))


def _kan(rounds: int) -> dict[str, float]:
    from kan.KANLayer import KANLayer  # takes seconds, and pandas and scikit-learn

    # An edge has 10 numbers there and 9 here, so 1800 and 2000 outputs are equally many.
    theirs, ours = KANLayer(128, 1800, num=5, k=3), _KANLayer(128, 2000)
    initialise(ours, 0)
    sizes = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in (theirs, ours)]
    assert sizes[0] == sizes[1], sizes
    x = torch.rand(512, 128).mul_(2).sub_(1).requires_grad_()
    contenders = {
        "theirs": forward_backward(theirs, lambda: theirs(x)[0]),
        "ours": forward_backward(ours, lambda: ours(x)),
    }
    seconds = interleaved(contenders, rounds)
    return {"kan_vs_pykan": seconds["theirs"] / seconds["ours"]}


def _lory(rounds: int, experts: int = 8, segment: int = 256, length: int = 4096, dim: int = 256) -> dict[str, float]:
    """The paper's segments and contexts. In shorter contexts the gradient of all experts, which is as large for one
    token as for many, weighs more: 0.27 at 1,024 tokens."""
    dense = MLPConfig(hidden_dim=704).build(dim, _INIT)
    merged = LoryConfig(num_experts=experts, hidden_dim=704, segment_length=segment).build(dim, _INIT)
    x, context = torch.randn(length, 2, dim).requires_grad_(), Context(torch.arange(length))

    def step(module: ChannelMixer) -> object:
        initialise(module, 0)
        return forward_backward(module, lambda: module(x, context)[0])

    seconds = interleaved({"dense": step(dense), "merged": step(merged)}, rounds)
    return {
        "lory_overhead": seconds["merged"] / seconds["dense"] - 1,
        "lory_overhead_bound": experts / segment + 0.20,
    }
