"""Token-choice top-k router in float32.

Switch Transformer (Fedus et al. 2021, arXiv:2101.03961) and ST-MoE's z-loss (Zoph et al. 2022, arXiv:2202.08906).
Sigmoid scores and a scale of the gates as in DeepSeek-V3 (2024, arXiv:2412.19437), with its balancing by a bias instead
of a loss (Wang et al. 2024, arXiv:2408.15664). Gates whose divisor has no gradient as in MoA (Zhang et al. 2022,
arXiv:2210.05144).
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from lightbulb.config import Config
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.routing.balance import RouterStatistics, attach_loss


class RouterConfig(Config):
    """How tokens choose experts."""

    top_k: int = Field(2, ge=1)
    """Experts per token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """An expert's score is its share in a softmax over all experts, or a sigmoid of its own (DeepSeek-V3). Balance loss
    and statistics take scores for probabilities, divided by their sum where they are sigmoids."""
    normalize_gates: bool = True
    """Gates are the scores of the chosen experts divided by their sum (for softmax the same as top-k then softmax, as
    Mixtral); else the scores as they are (softmax over all, then top-k)."""
    normalizer_gradient: bool = True
    """False stops the gradient at the sum that normalised gates are divided by (MoA)."""
    gate_scale: float = Field(1.0, gt=0)
    """Factor on all gates (DeepSeek-V3's routed scaling factor)."""
    bias_rate: float = Field(0.0, ge=0)
    """With a rate above 0 (DeepSeek-V3: 1e-3) experts are chosen by score + bias, and after each global batch the bias
    of an expert rises by the rate when it got less than the mean load, and falls when it got more. Gates and gradients
    do not see it."""
    balance_loss: float = Field(0.01, ge=0)
    """Coefficient of the global-batch balance loss."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """In training the router's inputs are multiplied by noise between 1 - jitter and 1 + jitter (Switch)."""
    z_loss: float = Field(1e-3, ge=0)
    """Coefficient of the mean squared log-sum-exp of the router logits."""

    @model_validator(mode="after")
    def _gates_have_gradient(self) -> "RouterConfig":
        if self.top_k == 1 and self.normalize_gates and self.normalizer_gradient:
            raise ValueError(
                "top_k 1 with normalize_gates true gives every gate the value 1 and the router no gradient; "
                "set normalize_gates: false (or normalizer_gradient: false)"
            )
        if not (self.normalize_gates or self.normalizer_gradient):
            raise ValueError(
                "normalizer_gradient false has no effect with normalize_gates false; set normalizer_gradient: true"
            )
        return self


class Routing(NamedTuple):
    """Where each token goes: ``gates [T, k]`` float32 and ``experts [T, k]`` int64."""

    gates: Tensor
    experts: Tensor


def greatest(scores: Tensor, top_k: int) -> Tensor:
    """The experts ``[T, k]`` with the greatest of ``scores [T, E]``, the lower number first where they are equal.

    ``topk`` takes any of equal scores, not always the same, while experts that are parts of one share a router row and
    must be taken together, and every layout must take the same.
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    bits = (scores + 0.0).view(torch.int32).long()  # 0.0: of both zeros one
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    return (ranks * (1 << 16) - torch.arange(scores.shape[-1], device=scores.device)).topk(top_k, dim=-1).indices


class Router(nn.Module):
    """Linear scores, top-k, gates; weight and arithmetic in float32 whatever the model's dtype.

    ``load`` is the share of selections per expert in the previous global batch: part of the training state, because
    the balance gradient uses it (see :mod:`lightbulb.routing.balance`). So is ``bias``, which exists with a
    ``bias_rate`` only.
    """

    load: Tensor
    bias: Tensor

    def __init__(self, config: RouterConfig, num_experts: int, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.weight = make_parameter(Logical((num_experts, dim), init.std, keep_fp32=True, by_position=True))
        self.register_buffer("load", torch.full((num_experts,), 1.0 / num_experts))
        if config.bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))
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
        log_z = logits.logsumexp(-1, keepdim=True)
        log_scores = logits - log_z if self.config.score == "softmax" else logsigmoid(logits)
        # Scores grow with their logits, but round: logits that differ may have one score.
        order = log_scores.exp() + self.bias if self.config.bias_rate else logits
        experts = greatest(order.detach(), self.config.top_k)
        gates = self._gates(log_scores.gather(-1, experts))
        if self.training and torch.is_grad_enabled():
            gates = attach_loss(gates, self._auxiliary_losses(log_z, log_scores, experts))
        return Routing(gates, experts)

    def _gates(self, log_scores: Tensor) -> Tensor:
        """Gates from the logarithms of the chosen experts' scores, both ``[T, k]``."""
        config = self.config
        if config.normalize_gates:
            log_sum = log_scores.logsumexp(-1, keepdim=True)
            log_scores = log_scores - (log_sum if config.normalizer_gradient else log_sum.detach())
        return config.gate_scale * log_scores.exp()

    def _auxiliary_losses(self, log_z: Tensor, log_scores: Tensor, experts: Tensor) -> Tensor:
        """Balance and z-loss, summed over tokens; they are counted in the statistics too."""
        scores_sum_to_one = self.config.score == "softmax"
        probabilities = log_scores.exp() if scores_sum_to_one else log_scores.softmax(-1)
        with torch.no_grad():
            self.statistics.add(experts, probabilities, log_z[:, 0])
        balance = self.config.balance_loss * self.num_experts * (probabilities @ self.load).sum()
        return balance + self.config.z_loss * log_z.square().sum()

    @torch.no_grad()
    def set_load(self, selections: Tensor) -> None:
        """Take the global batch's selections per expert ``[E]`` as the load the next step balances against."""
        self.load.copy_(selections / selections.sum().clamp_min(1.0))
        if self.config.bias_rate and self.weight.requires_grad:
            # From the counts: whether they are above the mean does not depend on how shares are rounded.
            self.bias += self.config.bias_rate * (selections.sum() - self.num_experts * selections).sign()
