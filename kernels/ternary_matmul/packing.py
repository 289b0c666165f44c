"""Ternary codes in bytes, several to a byte along the last dimension.

Two formats: ``2bit``, four codes to a byte, which shifts unpack (code k of a row plus 1 at bits ``2 (k mod 4)``);
``base3``, five to a byte as digits of a number up to 242 (code k plus 1 at place ``3^(k mod 5)``), 1.6 bits a code
where log2(3) = 1.58 are needed. A row is filled up with the code 0, which adds nothing to a product, so that each row,
and with it each rank's part of a matrix, stands for itself.
"""

from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

PackFormat = Literal["2bit", "base3"]
FORMATS: tuple[PackFormat, ...] = get_args(PackFormat)

BASE: dict[PackFormat, int] = {"2bit": 4, "base3": 3}
PER_BYTE: dict[PackFormat, int] = {"2bit": 4, "base3": 5}


class TernaryWeight(NamedTuple):
    """A packed matrix, or one per expert.

    Attributes:
        codes: ``[out, bytes]`` uint8 of :func:`pack_codes`, or ``[experts, out, bytes]``.
        scale: ``[parts]``, or ``[experts, parts]``: of each ``out / parts`` outputs one after the other (a matrix may
            hold several that share their input, as gate and up).
        in_features: codes of a row.
        form: how they are packed.
    """

    codes: Tensor
    scale: Tensor
    in_features: int
    form: PackFormat

    @property
    def out(self) -> int:
        """Outputs of a matrix."""
        return self.codes.shape[-2]

    def matrices(self) -> list["TernaryWeight"]:
        """Those of the experts, or this one."""
        if self.codes.dim() == 2:
            return [self]
        return [self._replace(codes=codes, scale=scale) for codes, scale in zip(self.codes, self.scale, strict=True)]

    def scales(self) -> Tensor:
        """``[out]``, the scale of each output of one matrix."""
        return self.scale.repeat_interleave(self.out // len(self.scale))

    def unpacked(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Codes of the outputs from ``begin`` to ``end`` of one matrix, ``[end - begin, in]``."""
        return unpack_codes(self.codes[begin:end], self.in_features, self.form, dtype)


def pack_codes(codes: Tensor, form: PackFormat) -> Tensor:
    """``codes [..., n]``, each -1, 0 or 1 in any dtype, to bytes ``[..., ceil(n / codes per byte)]`` (uint8)."""
    per_byte = PER_BYTE[form]
    digits = pad(codes, (0, -codes.shape[-1] % per_byte)).to(torch.int16).unflatten(-1, (-1, per_byte)) + 1
    places = BASE[form] ** torch.arange(per_byte, dtype=torch.int16, device=codes.device)
    return (digits * places).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, size: int, form: PackFormat, dtype: torch.dtype) -> Tensor:
    """The codes ``[..., size]`` of :func:`pack_codes`, in a dtype."""
    table = _table(form).to(packed.device, dtype)
    return table[packed.int()].flatten(-2)[..., :size]


@cache
def _table(form: PackFormat) -> Tensor:
    """The codes of each byte, ``[256, codes per byte]``; bytes that no codes give are not used."""
    places = BASE[form] ** torch.arange(PER_BYTE[form])
    return (torch.arange(256)[:, None] // places % BASE[form] - 1).to(torch.int8)
