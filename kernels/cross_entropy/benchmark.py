"""Linear cross-entropy, forward and backward, against PyTorch and Liger: ``python -m
lightbulb.kernels.cross_entropy.benchmark``.

The roof is the three products alone. Peers that are not installed, or do not run here, are named.
"""

import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightbulb.kernels.cross_entropy import linear_cross_entropy
from lightbulb.kernels.timing import Run, arguments, interleaved, named, ratio, report

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """On CPUs bfloat16 is multiplied in float32, as models do where there are no matrix units."""
    dtype = hidden.dtype if hidden.is_cuda else torch.float32
    return linear_cross_entropy(hidden, weight, labels, dtype=dtype).mean()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What models write."""
    return functional.cross_entropy((hidden @ weight.t()).float(), labels)


def _liger(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss(weight, hidden, labels)


def peers() -> tuple[dict[str, Loss], list[str]]:
    """What to compare with, and what is missing."""
    found: dict[str, Loss] = {"torch": plain}
    missing = []
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch chunked"] = partial(functional.linear_cross_entropy, options=options)
    else:
        missing.append("torch chunked: this PyTorch has none")
    if importlib.util.find_spec("liger_kernel") is None:
        missing.append("Liger: not installed (pip install liger-kernel)")
    elif not torch.cuda.is_available():
        missing.append("Liger: needs a GPU")
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for name, accumulated in (("Liger", None), ("Liger float32", torch.float32)):
            found[name] = partial(_liger, LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulated))
    return found, missing


def step(function: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(hidden, weight, labels), (hidden, weight))


def products(hidden: Tensor, weight: Tensor) -> Run:
    """The three products with nothing between them, in the dtype ours multiplies in."""
    dtype = hidden.dtype if hidden.is_cuda else torch.float32
    h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
    rows = min(len(h), 2048)
    logits, h = torch.empty(rows, len(w), dtype=dtype, device=h.device), h[:rows]

    def run() -> None:
        for _ in range(len(hidden) // rows):
            torch.mm(h, w.t(), out=logits)
            torch.mm(logits, w)
            torch.mm(logits.t(), h)

    return run


def peak_bytes(run: Run) -> int:
    """Largest memory of a step beyond what was there before, on a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__, 9)
    is_gpu = torch.cuda.is_available()
    device = "cuda" if is_gpu else "cpu"
    sizes = [(8192, 4096, 32000), (8192, 4096, 128256)] if is_gpu else [(2048, 256, 8192)]
    table: list[dict[str, Any]] = []
    result: dict[str, Any] = {"op": "cross_entropy"}
    others, missing = peers()
    for tokens, dim, vocab in sizes:
        for dtype in (torch.bfloat16,) if is_gpu else (torch.float32, torch.bfloat16):
            hidden = torch.randn(tokens, dim, device=device).to(dtype).requires_grad_()
            weight = torch.randn(vocab, dim, device=device).mul_(dim**-0.5).to(dtype).requires_grad_()
            labels = torch.randint(0, vocab, (tokens,), device=device)
            runs = {name: step(f, hidden, weight, labels) for name, f in ({"ours": ours} | others).items()}
            seconds = interleaved(runs | {"products": products(hidden, weight)}, options.rounds)
            short = str(dtype).removeprefix("torch.")
            for name, run in runs.items():
                faster, share = ratio(seconds, name), 1 / ratio(seconds, name, "products")
                row = {"vocabulary": vocab, "dtype": short, "who": name, "ms": statistics.median(seconds[name]) * 1e3}
                row |= {"ours faster": faster, "of products": share}
                if is_gpu:
                    row["MiB"] = peak_bytes(run) / 2**20
                table.append(row)
                figure = {"of products": share} if name == "ours" else {f"vs {name}": faster}
                result |= named(f"{short} {vocab}", figure)
    report("linear cross-entropy, forward and backward", table, result | {"skipped": missing})


if __name__ == "__main__":
    main()
