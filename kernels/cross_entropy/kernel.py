"""The Triton kernel: one program per row of logits, in one pass for the log-sum-exp and one for the gradient.

The second pass finds the row in the GPU's second-level cache. Each lane keeps a maximum and a sum of its own, so that a
row is reduced once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 16384
_PER_THREAD = 16


@triton.jit
def rows_kernel(
    logits,
    labels,
    lse,
    target,
    stride,
    width,
    first,
    z_loss,
    MEASURES: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    ignored = label == -100
    column = label - first
    mine = (label != -100) & (column >= 0) & (column < width)
    columns = tl.arange(0, BLOCK)
    if MEASURES:
        # Read before anything is written: the reductions below are barriers.
        aim = tl.load(logits + column, mask=mine, other=0.0).to(tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < width, other=float("-inf")).to(tl.float32)
            larger = tl.where(x > largest, x, largest)  # a NaN is left to the sum
            offset = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(largest - offset) + tl.exp(x - offset)
            largest = larger
        top = tl.max(largest, axis=0)
        offset = tl.where(top == float("-inf"), 0.0, top)
        whole = offset + tl.log(tl.sum(total * tl.exp(largest - offset), axis=0))
        whole = tl.where(ignored, 0.0, whole)
        tl.store(lse + row, whole)
        tl.store(target + row, aim)
    else:
        whole = tl.load(lse + row)
        aim = tl.load(target + row)
    if WRITES:
        pull = 2.0 * z_loss * whole
        difference = aim - whole
        # exp(d) - 1, by its series where the subtraction would cancel.
        series = difference * (1.0 + difference * (0.5 + difference * (1.0 / 6.0)))
        at_label = tl.where(tl.abs(difference) < 0.01, series, tl.exp(difference) - 1.0) + pull * tl.exp(difference)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = (1.0 + pull) * tl.exp(x - whole)
            gradient = tl.where((start + columns == column) & mine, at_label, gradient)
            tl.store(logits + start + columns, tl.where(ignored, 0.0, gradient), mask=inside)


def run(
    logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor, z_loss: float, measures: bool, writes: bool
) -> None:
    """What :func:`~lightbulb.kernels.cross_entropy.rows.run` says, of logits with columns side by side."""
    rows, width = logits.shape
    if rows == 0:
        return
    block, warps = tiling(width)
    rows_kernel[(rows,)](
        logits,
        labels,
        lse,
        target,
        logits.stride(0),
        width,
        first,
        z_loss,
        MEASURES=measures,
        WRITES=writes,
        BLOCK=block,
        num_warps=warps,
    )


def tiling(width: int) -> tuple[int, int]:
    """Columns of a block and warps of a program: chunks have few rows, so that each must keep many loads in flight."""
    block = min(max(triton.next_power_of_2(width), 128), _LARGEST_BLOCK)
    return block, min(max(block // (32 * _PER_THREAD), 1), 32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` with a float32 total of bfloat16 factors."""
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
