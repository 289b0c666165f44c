"""Ternary products on a GPU against cuBLAS in bfloat16: ``python -m lightbulb.kernels.ternary_matmul.benchmark_gpu``.

All as CUDA graphs. What memory bounds is compared with a copy: one token reads ``out x in / 4`` bytes of weights where
bfloat16 reads ``2 x out x in``. "of copy rate" is those bytes over the time of the product alone; "with inputs" has the
quantisation of the inputs in it.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightbulb.kernels.choice import HAS_TRITON
from lightbulb.kernels.timing import copy_bytes_per_second, graphed, interleaved, ratio, report

if HAS_TRITON:
    from lightbulb.kernels.ternary_matmul import kernel

SHAPES = ((4096, 4096), (16384, 4096), (20480, 3200), (28672, 8192))
"""Outputs and inputs of a matrix."""
RULE = (127, 126.99, 1e-8, 1e-6)
"""Of 8-bit inputs with a norm, as :func:`lightbulb.kernels.ternary_matmul.kernel.quantise` takes it."""
DECODE = (1, 8)
PREFILL = (64, 256, 1024, 4096)


def gpu_rows(rounds: int = 15) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The table's rows, and the figures to keep: how many times faster than cuBLAS, by shape and tokens."""
    limit, table, result = copy_bytes_per_second(), [], {}
    cases = [(shape, tokens) for shape in SHAPES for tokens in DECODE]
    for (outputs, inputs), tokens in [*cases, *((SHAPES[1], tokens) for tokens in PREFILL)]:
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        seconds = interleaved({name: graphed(run) for name, run in _contenders(x, weight).items()}, rounds)
        mine = statistics.median(seconds["ours"])
        row = {"out": outputs, "in": inputs, "tokens": tokens, "us": mine * 1e6, "vs cuBLAS": ratio(seconds, "cuBLAS")}
        row["with inputs"] = ratio(seconds, "cuBLAS", "with inputs")
        row["of copy rate"] = outputs * inputs / 4 / mine / limit
        row["TOP/s"] = 2 * outputs * inputs * tokens / mine / 1e12
        table.append(row)
        result[f"{outputs}x{inputs}_tokens_{tokens}_vs_cublas"] = round(row["vs cuBLAS"], 3)
    return table, result


def _contenders(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    scale = weight.abs().mean(dtype=torch.float32).view(1, 1)
    packed, tokens = kernel.pack(weight, scale), kernel.quantise(x, *RULE)
    return {
        "ours": partial(kernel.multiply, tokens, packed, scale, x.dtype),
        "with inputs": lambda: kernel.multiply(kernel.quantise(x, *RULE), packed, scale, x.dtype),
        "cuBLAS": partial(torch.nn.functional.linear, x, weight),
    }


def main() -> None:
    """Measure, print a table and a line of JSON; without a GPU say so."""
    if not (torch.cuda.is_available() and HAS_TRITON):
        report("ternary products on a GPU: skipped, there is none here", [], {"op": "ternary_matmul_gpu"})
        return
    table, result = gpu_rows()
    report("ternary weights, 8-bit inputs, against cuBLAS in bfloat16", table, {"op": "ternary_matmul_gpu"} | result)


if __name__ == "__main__":
    main()
