"""How the rows of ``[a, b, rows, keys]`` lie in memory."""

from torch import Tensor


def row_stride(x: Tensor) -> int:
    """From one row to the next."""
    return next((x.stride(axis) for axis in (2, 1, 0) if x.shape[axis] > 1), x.shape[3])


def has_even_rows(x: Tensor) -> bool:
    """Whether one stride leads through all rows, and the keys lie side by side."""
    if x.shape[3] > 1 and x.stride(3) != 1:
        return False
    step = row_stride(x)
    for axis in (2, 1, 0):
        if x.shape[axis] > 1 and x.stride(axis) != step:
            return False
        step *= x.shape[axis]
    return True
