"""Load balance over the global batch, and the statistics a router keeps.

The balance loss is ``E * sum_e f_e P_e`` (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961; 1 when uniform),
with ``f_e`` the share of all selections that went to expert e and ``P_e`` its mean router probability, both over the
*global* batch: statistics per micro-batch would fight specialisation and change with every batch and data-parallel
size. ``f_e`` carries no gradient, so all the loss needs from outside a micro-batch is one number per expert. The exact
``f_e`` of a global batch is known only when its last micro-batch has run, long after the first was back-propagated
under a pipeline, so the gradient uses the ``f_e`` of the global batch before (uniform at the first step, where the
gradient is zero). It is therefore exactly the same for every micro-batch, data, pipeline and expert degree; the loss
that is reported uses the exact ``f_e`` and ``P_e`` of its own batch.
"""

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return ``x`` unchanged; when gradients flow back through it, ``loss`` (a scalar) is differentiated too.

    This lets a loss live on any pipeline stage. It must be a *sum* over tokens: the engine divides all gradients by
    the number of tokens of the global batch.
    """
    return _AttachLoss.apply(x, loss)


class RouterStatistics:
    """Sums over the tokens a router has seen since the last reset, kept in one float64 vector.

    The vector can be added over micro-batches and ranks: ``[selections per expert, probability per expert,
    entropy, squared log-sum-exp, tokens]``.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.sums: Tensor | None = None

    def add(self, experts: Tensor, probabilities: Tensor, log_z: Tensor) -> None:
        """Count one micro-batch: ``experts [T, k]``, ``probabilities [T, E]``, ``log_z [T]``."""
        entropy = -(probabilities * probabilities.clamp_min(1e-20).log()).sum()
        tail = torch.stack([entropy, log_z.square().sum(), entropy.new_tensor(float(len(log_z)))])
        counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
        sums = torch.cat([counts.double(), probabilities.sum(0).double(), tail.double()])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, device: torch.device) -> Tensor:
        """The sums so far (zeros when nothing was counted); counting starts anew."""
        sums = self.sums
        self.sums = None
        return torch.zeros(2 * self.num_experts + 3, dtype=torch.float64, device=device) if sums is None else sums


def summarise(sums: Tensor, num_experts: int) -> dict[str, Any]:
    """Readable values of globally added sums: load, balance loss, z-loss (both before their coefficients), entropy."""
    load = sums[:num_experts] / sums[:num_experts].sum().clamp_min(1.0)
    tokens = sums[-1].clamp_min(1.0)
    probability = sums[num_experts : 2 * num_experts] / tokens
    return {
        "load": load.tolist(),
        "balance_loss": float(num_experts * (load * probability).sum()),
        "z_loss": float(sums[-2] / tokens),
        "entropy": float(sums[-3] / tokens),
    }
