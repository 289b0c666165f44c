"""The dtype in which this machine multiplies matrices fastest."""

from functools import cache

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply tensors like ``x`` in.

    Its own, except for bfloat16 on a CPU without AMX: there bfloat16 products run at half the rate of float32 (84
    against 157 GFLOP/s on one core with AVX-512 only), so that converting them pays, and rounds less.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_amx():
        return torch.float32
    return x.dtype


@cache
def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 tiles."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
