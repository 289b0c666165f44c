"""Ternary codes in bytes, several to a byte along the last dimension.

Two formats: ``2bit``, four codes to a byte, which shifts unpack; ``base3``, five to a byte as digits of a number up to
242, 1.6 bits a code where log2(3) = 1.58 are needed. A row is filled up with the code 0, which adds nothing to a
product, so that each row, and with it each rank's part of a matrix, stands for itself.
"""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

PackFormat = Literal["2bit", "base3"]
FORMATS: tuple[PackFormat, ...] = get_args(PackFormat)

_BASE: dict[PackFormat, int] = {"2bit": 4, "base3": 3}
_PER_BYTE: dict[PackFormat, int] = {"2bit": 4, "base3": 5}


def pack_codes(codes: Tensor, form: PackFormat) -> Tensor:
    """``codes [..., n]``, each -1, 0 or 1 in any dtype, to bytes ``[..., ceil(n / codes per byte)]`` (uint8)."""
    per_byte = _PER_BYTE[form]
    digits = pad(codes, (0, -codes.shape[-1] % per_byte)).to(torch.int16).unflatten(-1, (-1, per_byte)) + 1
    places = _BASE[form] ** torch.arange(per_byte, dtype=torch.int16, device=codes.device)
    return (digits * places).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, size: int, form: PackFormat, dtype: torch.dtype) -> Tensor:
    """The codes ``[..., size]`` of :func:`pack_codes`, in a dtype."""
    table = _table(form).to(packed.device, dtype)
    return table[packed.int()].flatten(-2)[..., :size]


@cache
def _table(form: PackFormat) -> Tensor:
    """The codes of each byte, ``[256, codes per byte]``; bytes that no codes give are not used."""
    places = _BASE[form] ** torch.arange(_PER_BYTE[form])
    return (torch.arange(256)[:, None] // places % _BASE[form] - 1).to(torch.int8)
