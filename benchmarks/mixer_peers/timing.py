"""Timing in turns: what is compared runs in the same loop, so that a slow minute of the machine hits both sides."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 2) -> dict[str, float]:
    """Median CPU seconds of one thread for each contender, all of them run in every round."""
    torch.set_num_threads(1)
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward_backward(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One forward and backward, gradients of the parameters included."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        run().sum().backward()

    return step
