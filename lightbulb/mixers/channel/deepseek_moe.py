"""Many small experts, some of which every token passes.

DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066): each expert of a plain mixture is cut into m smaller ones of which a
token chooses m times as many, and ``num_shared`` of them are taken by all tokens, so that the others need not all learn
what every token needs:

    y = sum over shared s: FFN_s(x)  +  sum over chosen i: g_i FFN_i(x),    g_i = softmax(W x)_i

Gates are not divided by their sum. DeepSeek-V3 (2024, arXiv:2412.19437) scores by sigmoids, divides and scales gates,
and balances by a bias: ``router: {score: sigmoid, normalize_gates: true, gate_scale: 2.5, bias_rate: 1.0e-3}``.
"""

from typing import Literal

from pydantic import Field

from lightbulb.mixers.base import ChannelMixerConfig, Facts
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import RoutedConfig
from lightbulb.registry import register
from lightbulb.routing.router import RouterConfig


class DeepSeekRouterConfig(RouterConfig):
    """How tokens choose; by default as in the first DeepSeekMoE."""

    top_k: int = Field(6, ge=1)
    """Experts per token, besides the shared ones."""
    normalize_gates: bool = False
    """Gates are the scores of the chosen experts divided by their sum; else the scores as they are."""


@register("channel_mixer", "deepseek_moe")
class DeepSeekMoEConfig(RoutedConfig):
    """Many small experts, and shared ones.

    The module is :class:`~lightbulb.mixers.channel.switch.Switch`.
    """

    facts = Facts(
        "DeepSeekMoE, 2024, arXiv:2401.06066; DeepSeek-V3, 2024, arXiv:2412.19437",
        ("tensor", "sequence", "ulysses", "expert"),
        "none",
        "no device-level balance loss and no limit of devices per token",
    )
    type: Literal["deepseek_moe"] = "deepseek_moe"
    num_shared: int = Field(1, ge=0)
    """Experts that every token passes, of the same kind as the routed ones."""
    router: DeepSeekRouterConfig = DeepSeekRouterConfig()
    """How tokens choose."""

    def shared(self) -> list[ChannelMixerConfig]:
        if self.expert is not None:
            return [self.expert] * self.num_shared
        # Side by side, SwiGLU layers that are added up are one layer: fewer and larger products.
        return [MLPConfig(hidden_dim=self.num_shared * (self.hidden_dim or 1))] if self.num_shared else []

    def check_tensor_parallel(self, degree: int) -> None:
        for part in self.shared():
            try:
                part.check_tensor_parallel(degree)
            except ValueError as error:
                raise ValueError(f"num_shared {self.num_shared} makes an expert whose {error}") from None
