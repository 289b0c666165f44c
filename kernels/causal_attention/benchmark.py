"""Causal attention on the CPU, forward and backward, against PyTorch's: ``python -m
lightbulb.kernels.causal_attention.benchmark``.

The roof is a large float32 product's rate on the FLOPs of the visible pairs.
"""

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.kernels.causal_attention import causal_attention, has_fast_causal_attention
from lightbulb.kernels.timing import Run, arguments, interleaved, ratio, report

_PROBE = 1024
SHAPES = [  # batch, heads, key heads, length, width
    (4, 8, 4, 512, 32),
    (2, 8, 8, 512, 64),
    (1, 8, 2, 2048, 64),
]


def peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's, the key heads repeated as models do."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def step(function: Any, tensors: list[Tensor], grad: Tensor) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(*tensors), tensors, grad)


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__, 9)
    if torch.cuda.is_available():
        report(
            "a kernel for CPUs: PyTorch's own is used on this GPU, nothing to compare", [], {"op": "causal_attention"}
        )
        return
    a = torch.randn(_PROBE, _PROBE)
    table: list[dict[str, Any]] = []
    result: dict[str, Any] = {"op": "causal_attention"}
    for batch, heads, kv_heads, length, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            sizes = [heads, kv_heads, kv_heads, heads]
            *tensors, grad = (torch.randn(batch, n, length, width).to(dtype).requires_grad_() for n in sizes)
            result["native"] = has_fast_causal_attention(*tensors)
            runs = {"ours": step(causal_attention, tensors, grad), "torch": step(peer, tensors, grad)}
            seconds = interleaved(runs | {"probe": lambda: a @ a}, options.rounds)
            flops = 14 * width * batch * heads * length * (length + 1) / 2
            roof = flops / (2 * _PROBE**3) * statistics.median(seconds["probe"])
            mine, short = statistics.median(seconds["ours"]), str(dtype).removeprefix("torch.")
            shape = f"{batch}x{heads}/{kv_heads}x{length}x{width}"
            faster = ratio(seconds, "torch")
            row = {"shape": shape, "dtype": short, "ms": mine * 1e3, "vs torch": faster, "of product rate": roof / mine}
            table.append(row)
            result[f"{shape}_{short}_vs_torch"] = round(faster, 3)
    report("causal attention, forward and backward", table, result)


if __name__ == "__main__":
    main()
