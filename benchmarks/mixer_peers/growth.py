"""How the time of a token mixer grows with the length of its sequences: seconds per token at each length."""

from collections.abc import Callable, Sequence

import torch

from lightbulb.mixers.base import Context, TokenMixerConfig
from lightbulb.nn.parameter import Init, initialise
from mixer_peers.timing import forward_backward, interleaved

LENGTHS = (512, 1024, 2048, 4096, 8192)


def seconds_per_token(
    config: TokenMixerConfig, dim: int, lengths: Sequence[int] = LENGTHS, rounds: int = 3
) -> dict[int, float]:
    """CPU seconds of one thread per token, forward and backward in float32, for each length.

    Every length mixes as many tokens, in more or fewer sequences, so that all lengths find the caches equally full.

    Args:
        config: of the mixer, built once for the longest context.
        dim: model width.
        lengths: each a divisor of the largest.
        rounds: the lengths take turns this often; medians are returned.
    """
    longest = max(lengths)
    module = config.build(dim, longest, Init(0.02, 0.02))
    initialise(module, 0)
    runs = {str(length): _pass(module, length, longest // length, dim) for length in lengths}
    seconds = interleaved(runs, rounds, warmup=1)
    return {length: seconds[str(length)] / longest for length in lengths}


def ratio(seconds: dict[int, float]) -> float:
    """Time of a token at the longest length over that at the shortest: 1.0 is linear time."""
    return seconds[max(seconds)] / seconds[min(seconds)]


def _pass(module: torch.nn.Module, length: int, batch: int, dim: int) -> Callable[[], None]:
    torch.manual_seed(0)
    x = torch.randn(length, batch, dim, requires_grad=True)
    context = Context(torch.arange(length))
    return forward_backward(module, lambda: module(x, context)[0])
