"""SwiGLU against PyTorch's two elementwise operations: ``python -m lightbulb.kernels.swiglu.benchmark``."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from lightbulb.kernels.swiglu import swiglu
from lightbulb.kernels.timing import copy_bytes_per_second, interleaved, ratio, report

_TENSORS = {"forward": 3, "forward and backward": 8}


def peer(gate: Tensor, up: Tensor) -> Tensor:
    """What models write."""
    return torch.nn.functional.silu(gate) * up


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width = (16384, 4096) if device == "cuda" else (2048, 512)
    limit, table, result = copy_bytes_per_second(), [], {}
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, grad = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
        gate.requires_grad_()
        up.requires_grad_()
        for name, count in _TENSORS.items():
            runs = {
                who: step(f, gate, up, None if name == "forward" else grad)
                for who, f in (("ours", swiglu), ("torch", peer))
            }
            seconds = interleaved(runs, options.rounds)
            mine = statistics.median(seconds["ours"])
            moved = count * gate.numel() * gate.element_size() / mine
            faster = ratio(seconds, "torch")
            short = str(dtype).removeprefix("torch.")
            table.append(
                {"pass": name, "dtype": short, "ms": mine * 1e3, "vs torch": faster, "of copy rate": moved / limit}
            )
            result[f"{name.replace(' ', '_')}_{short}_vs_torch"] = round(faster, 3)
    report(f"swiglu, {rows} x {width}", table, {"op": "swiglu"} | result)


def step(
    function: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor, grad: Tensor | None
) -> Callable[[], object]:
    """One forward, or forward and backward."""
    if grad is None:
        return lambda: function(gate.detach(), up.detach())
    return lambda: torch.autograd.grad(function(gate, up), (gate, up), grad)


if __name__ == "__main__":
    main()
