"""Token-choice top-k router in float32.

Switch Transformer (Fedus et al. 2021, arXiv:2101.03961) and ST-MoE's z-loss (Zoph et al. 2022, arXiv:2202.08906).
"""

from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from lightbulb.config import Config
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.routing.balance import RouterStatistics, attach_loss


class RouterConfig(Config):
    """How tokens choose experts."""

    top_k: int = Field(2, ge=1)
    """Experts per token."""
    normalize_gates: bool = True
    """Gates of the chosen experts sum to one (top-k then softmax, as Mixtral); else softmax over all, then top-k."""
    balance_loss: float = Field(0.01, ge=0)
    """Coefficient of the global-batch balance loss."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """In training the router's inputs are multiplied by noise between 1 - jitter and 1 + jitter (Switch)."""
    z_loss: float = Field(1e-3, ge=0)
    """Coefficient of the mean squared log-sum-exp of the router logits."""

    @model_validator(mode="after")
    def _gates_have_gradient(self) -> "RouterConfig":
        if self.top_k == 1 and self.normalize_gates:
            raise ValueError(
                "top_k 1 with normalize_gates true gives every gate the value 1 and the router no gradient; "
                "set normalize_gates: false"
            )
        return self


class Routing(NamedTuple):
    """Where each token goes: ``gates [T, k]`` float32 and ``experts [T, k]`` int64."""

    gates: Tensor
    experts: Tensor


class Router(nn.Module):
    """Linear scores, softmax, top-k; weight and arithmetic in float32 whatever the model's dtype.

    ``load`` is the share of selections per expert in the previous global batch: part of the training state, because
    the balance gradient uses it (see :mod:`lightbulb.routing.balance`).
    """

    load: Tensor

    def __init__(self, config: RouterConfig, num_experts: int, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.weight = make_parameter(Logical((num_experts, dim), init.std, keep_fp32=True, by_position=True))
        self.register_buffer("load", torch.full((num_experts,), 1.0 / num_experts))
        self.statistics = RouterStatistics(num_experts)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        """Route ``x [T, dim]``; in training the auxiliary losses hang on the gates.

        Args:
            x: tokens.
            noise: ``[T, dim]`` uniform on [0, 1) for the jitter, or None.
        """
        x = x.to(self.weight.dtype)  # float32, whatever x is
        if noise is not None:
            x = x * (1 + self.config.jitter * (2 * noise - 1))
        logits = linear(x, self.weight)
        probabilities = logits.softmax(-1)
        if self.config.normalize_gates:
            scores, experts = logits.topk(self.config.top_k, dim=-1)
            gates = scores.softmax(-1)
        else:
            gates, experts = probabilities.topk(self.config.top_k, dim=-1)
        if self.training and torch.is_grad_enabled():
            log_z = logits.logsumexp(-1)
            balance = self.config.balance_loss * self.num_experts * (probabilities @ self.load).sum()
            gates = attach_loss(gates, balance + self.config.z_loss * log_z.square().sum())
            with torch.no_grad():
                self.statistics.add(experts, probabilities, log_z)
        return Routing(gates, experts)

    @torch.no_grad()
    def set_load(self, selections: Tensor) -> None:
        """Take the global batch's selections per expert ``[E]`` as the load the next step balances against."""
        self.load.copy_(selections / selections.sum().clamp_min(1.0))
