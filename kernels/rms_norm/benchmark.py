"""RMSNorm, alone and with the residual, against ``F.rms_norm``: ``python -m lightbulb.kernels.rms_norm.benchmark``."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lightbulb.kernels.rms_norm import add_rms_norm, rms_norm
from lightbulb.kernels.timing import Run, arguments, memory_bound

EPS = 1e-6

Norm = Callable[[Tensor, Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, fused on CUDA."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def torch_add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What models write."""
    total = x + delta
    return torch_norm(total, weight), total


def liger(device: str) -> tuple[Norm, AddNorm] | None:
    """Liger's kernels, where they can run."""
    if device == "cpu" or not importlib.util.find_spec("liger_kernel"):
        if device == "cuda":
            print("liger: not installed, skipped")
        return None
    norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return (
        lambda x, weight: norm.apply(x, weight, EPS, 0.0, "llama", False),
        lambda x, delta, weight: fused.apply(x, delta, weight, EPS, 0.0, "llama", False),
    )


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, dim = (16384, 4096) if device == "cuda" else (2048, 256)
    peer, steps = liger(device), {}
    norms: dict[str, Norm] = {"ours": lambda x, weight: rms_norm(x, weight, EPS), "torch": torch_norm}
    adds: dict[str, AddNorm] = {"ours": lambda x, d, weight: add_rms_norm(x, d, weight, EPS), "torch": torch_add_norm}
    if peer is not None:
        norms["liger"], adds["liger"] = peer
    for dtype in (torch.float32, torch.bfloat16):
        x, delta, grad, more = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(4))
        weight = torch.rand(dim, device=device).to(dtype)
        short, size = str(dtype).removeprefix("torch."), x.numel() * x.element_size()
        for name, functions, inputs, grads, count in (
            ("norm", norms, (x, weight), (grad,), 2 + 3),
            ("residual", adds, (x, delta, weight), (grad, more), 4 + 4),
        ):
            forward = {who: step(f, inputs, None) for who, f in functions.items()}
            both = {who: step(f, inputs, grads) for who, f in functions.items()}
            steps[f"{name} forward {short}"] = forward, (2 * len(inputs) - 2) * size
            steps[f"{name} both {short}"] = both, count * size
    memory_bound("rms_norm", f"rms_norm, {rows} x {dim}", steps, options.rounds)


def step(function: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...] | None) -> Run:
    """One forward, or forward and backward."""
    if grads is None:
        return lambda: function(*inputs)
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both() -> None:
        results = function(*leaves)
        torch.autograd.grad(results if len(grads) > 1 else [results], leaves, grads)

    return both


if __name__ == "__main__":
    main()
