"""The C++ products, for the CPU: they take interleaved weights only."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from lightbulb.kernels.native import INT, POINTER, function
from lightbulb.kernels.ternary_matmul.packing import PER_BYTE, TernaryWeight
from lightbulb.kernels.ternary_matmul.quantise import Quantisation

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = ("plain", "avx2", "avx512-vnni")
"""Instruction sets, by what :func:`best_level` gives."""

_KINDS = {torch.int8: 0, torch.float32: 1, torch.bfloat16: 2}
_TYPES = [POINTER, INT, INT, INT, POINTER, INT, POINTER, POINTER, INT, POINTER, *[INT] * 2, POINTER, INT, POINTER]
_TYPES += [INT] * 3
_forced: int | None = None


@cache
def best_level() -> int:
    """The widest instruction set of this processor, in :data:`LEVELS`."""
    level = ctypes.c_int64()
    function("ternary_level", POINTER)(ctypes.byref(level))
    return level.value


def force_level(level: int | None) -> None:
    """Compute with an instruction set of this processor that is not its widest; None for that."""
    global _forced
    assert level is None or 0 <= level <= best_level()
    _forced = level


class _How(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("levels", "factor", "least", "norm_eps")] + [
        ("bounded", ctypes.c_int64)
    ]


@cache
def _how(quantisation: Quantisation) -> _How:
    levels, factor, least, norm_eps, is_bounded = quantisation
    return _How(levels, factor, least, -1.0 if norm_eps is None else norm_eps, is_bounded)


def product(
    x: Tensor,
    token_scale: Tensor | Quantisation,
    weight: TernaryWeight,
    counts: list[int] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``[rows, out]`` in ``out_dtype``, one of :data:`DTYPES`.

    Args:
        x: ``[rows, in]`` with columns side by side: int8 codes, or float32 or bfloat16 to be quantised.
        token_scale: float32, of each row of codes or one for all, or how x becomes codes.
        weight: interleaved, with a float32 scale.
        counts: rows of each expert; None for one matrix.
    """
    rows, out = len(x), x.new_empty(len(x), weight.out, dtype=out_dtype)
    counts = [rows] if counts is None else counts
    if isinstance(token_scale, Tensor):
        scales, stride, how = token_scale.data_ptr(), int(token_scale.numel() > 1), None
    else:
        scales, stride, how = None, 0, ctypes.byref(_how(token_scale))
    function("ternary_matmul", *_TYPES)(
        x.data_ptr(), _KINDS[x.dtype], x.stride(0), weight.in_features, scales, stride, how,
        weight.codes.data_ptr(), PER_BYTE[weight.form], weight.scale.data_ptr(), weight.scale.shape[-1], weight.out,
        (ctypes.c_int64 * len(counts))(*counts), len(counts), out.data_ptr(), out_dtype == torch.bfloat16,
        best_level() if _forced is None else _forced, torch.get_num_threads(),
    )  # fmt: skip
    return out
