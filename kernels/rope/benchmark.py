"""Rotary positions against what models write: ``python -m lightbulb.kernels.rope.benchmark``.

The peer is Hugging Face's ``q * cos + rotate_half(q) * sin`` on ``[batch, heads, length, width]``, after the change of
order that ours includes; both end in the order attention reads.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lightbulb.kernels.rope import rotate
from lightbulb.kernels.timing import Run, arguments, memory_bound

Function = Callable[[Tensor], Tensor]


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What models write; the angles ``[length, width]`` in x's dtype, as there."""
    x = x.permute(1, 2, 0, 3)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def functions(length: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Function]:
    """The contenders on this machine; each makes ``[batch, heads, length, width]``."""
    rates = 1e4 ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    wide_cos, wide_sin = (torch.cat((t, t), dim=-1).to(dtype) for t in (angles.cos(), angles.sin()))
    found: dict[str, Function] = {
        "ours": lambda x: rotate(x, cos, sin).permute(1, 2, 0, 3),
        "torch": lambda x: eager(x, wide_cos, wide_sin),
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        apply = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
        # It turns queries and keys together: half of the heads each.
        found["liger"] = lambda x: torch.cat(apply(*x.permute(1, 2, 0, 3).chunk(2, 1), wide_cos[None], wide_sin[None]))
    elif device == "cuda":
        print("liger: not installed, skipped")
    return found


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (4096, 4, 32, 128) if device == "cuda" else (512, 4, 8, 32)
    steps: dict[str, tuple[dict[str, Run], int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device=device).to(dtype)
        grad = torch.randn_like(x.permute(1, 2, 0, 3).contiguous())
        short, size = str(dtype).removeprefix("torch."), x.numel() * x.element_size()
        contenders = functions(shape[0], shape[3], dtype, device)
        steps[f"forward {short}"] = {name: step(f, x, None) for name, f in contenders.items()}, 2 * size
        steps[f"both {short}"] = {name: step(f, x, grad) for name, f in contenders.items()}, 4 * size
    memory_bound("rope", "rope, {} positions, {} samples, {} heads of {}".format(*shape), steps, options.rounds)


def step(function: Function, x: Tensor, grad: Tensor | None) -> Run:
    """One forward, or forward and backward."""
    if grad is None:
        return lambda: function(x)
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, grad.view_as(leaf.permute(1, 2, 0, 3)))


if __name__ == "__main__":
    main()
