"""Mixtures of experts beside those of transformers: equal shapes, weights and routing, in float32 on one thread.

Each figure is the peer's time over ours, forward and backward with gradients of weights and input: above 1 ours is the
faster one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.deepseek_moe import DeepSeekMoEConfig
from lightbulb.mixers.channel.switch import Switch, SwitchConfig
from lightbulb.nn.parameter import Init, initialise
from mixer_peers.timing import forward_backward, interleaved

DIM, TOKENS = 256, 2048


def measure(rounds: int) -> dict[str, float]:
    """``switch_vs_mixtral``: 8 experts of width 520, 2 per token; ``deepseek_moe_vs_olmoe``: 64 of width 128, 8 per
    token, gates not normalised."""
    mixtral = MixtralConfig(hidden_size=DIM, intermediate_size=520, num_local_experts=8, num_experts_per_tok=2)
    olmoe = OlmoeConfig(
        hidden_size=DIM, intermediate_size=128, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False
    )
    switch = SwitchConfig.model_validate({"num_experts": 8, "hidden_dim": 520, "router": {"top_k": 2}})
    deepseek = DeepSeekMoEConfig.model_validate(
        {"num_experts": 64, "hidden_dim": 128, "num_shared": 0, "router": {"top_k": 8}}
    )
    return {
        "switch_vs_mixtral": _ratio(
            switch.build(DIM, Init(0.02, 0.02)), MixtralSparseMoeBlock(mixtral), ("w1", "w3", "w2"), rounds
        ),
        "deepseek_moe_vs_olmoe": _ratio(
            deepseek.build(DIM, Init(0.02, 0.02)),
            OlmoeSparseMoeBlock(olmoe),
            ("gate_proj", "up_proj", "down_proj"),
            rounds,
        ),
    }


def _ratio(ours: Switch, peer: nn.Module, names: tuple[str, str, str], rounds: int) -> float:
    """The peer's seconds over ours, once both give the same."""
    initialise(ours, 0)
    _copy_weights(ours, peer, names)
    x = torch.randn(TOKENS, 1, DIM, generator=torch.Generator().manual_seed(0))
    context = Context(torch.arange(TOKENS))
    runs: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "ours": (ours, lambda x: ours(x, context)[0]),
        "peer": (peer, lambda x: peer(x)[0]),
    }
    found, wanted = (run(x).flatten() for _, run in runs.values())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    steps = {
        name: forward_backward(module, lambda run=run: run(x.clone().requires_grad_()))  # type: ignore[misc]
        for name, (module, run) in runs.items()
    }
    seconds = interleaved(steps, rounds)
    return seconds["peer"] / seconds["ours"]


@torch.no_grad()
def _copy_weights(ours: Switch, peer: nn.Module, names: tuple[str, str, str]) -> None:
    gate, up, down = names
    peer.gate.weight.copy_(ours.router.weight)
    for index, expert in enumerate(peer.experts):
        getattr(expert, gate).weight.copy_(ours.experts.gate_up.weight[index, 0])
        getattr(expert, up).weight.copy_(ours.experts.gate_up.weight[index, 1])
        getattr(expert, down).weight.copy_(ours.experts.down.weight[index])
