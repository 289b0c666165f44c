"""Speed of a run and how close it is to what the device can do.

MFU counts the FLOPs the model needs for the tokens it trained on (active parameters, natural routing, no recompute)
over the peak of all ranks' devices. GPU peaks are the makers' dense figures; a CPU's is the fastest of a few matrix
products measured when the run starts, all ranks at once.
"""

import time
from collections import deque

import psutil
import torch
import torch.distributed as dist

from lightbulb.parallel.host import Precision

GPU_PEAKS = {  # dense bfloat16 FLOP/s by a part of the device's name
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Peak FLOP/s of all ranks' devices together (a collective)."""
    known = None
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
    peak = torch.tensor(known or _measure(device, precision), dtype=torch.float64, device=device)
    dist.all_reduce(peak)
    return float(peak)


def _measure(device: torch.device, precision: Precision, size: int = 1024, repeats: int = 4) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Largest memory this rank's tensors took: device memory on CUDA, resident memory now on CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


class Speedometer:
    """Tokens per second over the last steps, time spent outside them left out."""

    def __init__(self, window: int = 20):
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)

    def add(self, tokens: int, seconds: float) -> None:
        """Record one step."""
        self._steps.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second."""
        return sum(tokens for tokens, _ in self._steps) / max(sum(s for _, s in self._steps), 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a step."""
        return sum(s for _, s in self._steps) / max(len(self._steps), 1)
