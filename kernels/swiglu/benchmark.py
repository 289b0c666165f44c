"""SwiGLU against PyTorch's two elementwise operations: ``python -m lightbulb.kernels.swiglu.benchmark``."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lightbulb.kernels.swiglu import swiglu
from lightbulb.kernels.timing import Run, arguments, memory_bound

Function = Callable[[Tensor, Tensor], Tensor]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    """What models write."""
    return torch.nn.functional.silu(gate) * up


def functions(device: str) -> dict[str, Function]:
    """The contenders on this machine."""
    found: dict[str, Function] = {"ours": swiglu, "torch": eager}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["liger"] = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    elif device == "cuda":
        print("liger: not installed, skipped")
    return found


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width = (16384, 4096) if device == "cuda" else (2048, 512)
    steps: dict[str, tuple[dict[str, Run], int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, grad = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
        short, size = str(dtype).removeprefix("torch."), gate.numel() * gate.element_size()
        forward = {name: step(f, gate, up, None) for name, f in functions(device).items()}
        both = {name: step(f, gate, up, grad) for name, f in functions(device).items()}
        steps[f"forward {short}"] = forward, 3 * size
        steps[f"forward and backward {short}"] = both, 8 * size
    memory_bound("swiglu", f"swiglu, {rows} x {width}", steps, options.rounds)


def step(function: Function, gate: Tensor, up: Tensor, grad: Tensor | None) -> Run:
    """One forward, or forward and backward."""
    if grad is None:
        return lambda: function(gate, up)
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


if __name__ == "__main__":
    main()
