"""Frozen weights in four bits: the NF4 codes and the double quantisation of QLoRA.

"QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al. 2023, arXiv:2305.14314). Every 64 consecutive inputs of
a row are a block: its largest magnitude is its scale, and each value the nearest of 16 levels, quantiles of a normal
distribution, times the scale. Scales are kept in 8 bits, as shares of the largest of up to 256 of them. Here a scale is
rounded before its block's codes are chosen, and shares are of the largest scale itself, not of a difference from the
mean: so what was read once, written again, gives the same bits.

The scales that share a byte scale lie along the dimension that tensor parallelism leaves whole, and blocks along the
inputs: a rank's part keeps the same codes as it does in the whole, if the inputs are cut between blocks.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightbulb.nn.parameter import Keeper

BLOCK = 64
SCALES = 256
_OFFSET = 1 - (1 / 32 + 1 / 30) / 2
"""The largest quantile: half way between those that 8 values on the positive side and 8 on the negative would give."""


@cache
def levels() -> Tensor:
    """The 16 levels, ascending from -1 to 1, float32: 7 negative ones, 0 and 8 positive ones."""
    positive = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64))[:-1]
    negative = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64))[:-1]
    quantiles = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (quantiles / quantiles.max()).float()


class NF4(nn.Module, Keeper):
    """Values ``[..., out, in]`` in NF4, ``in`` a multiple of 64.

    Args:
        has_split_input: ranks split the inputs, so that scales are grouped along the outputs; else along the inputs.
    """

    codes: Tensor
    """``[..., out, in / 2]`` uint8: two codes to a byte, the first in the lower half."""
    shares: Tensor
    """``[..., out, in / 64]`` uint8: each block's scale, in 255ths of the largest in its group."""
    largest: Tensor
    """``[..., out, groups]`` float32, or ``[..., in / 64, groups]`` with a split input."""

    def __init__(self, has_split_input: bool):
        super().__init__()
        self.has_split_input = has_split_input
        for name, dtype in (("codes", torch.uint8), ("shares", torch.uint8), ("largest", torch.float32)):
            self.register_buffer(name, torch.empty(0, dtype=dtype), persistent=False)

    def write(self, values: Tensor) -> None:
        blocks = values.detach().float().unflatten(-1, (-1, BLOCK))
        absolute = self._grouped(blocks.abs().amax(-1))
        size = absolute.shape[-1]
        grouped = pad(absolute, (0, -size % SCALES)).unflatten(-1, (-1, SCALES))
        self.largest = grouped.amax(-1)
        shares = (grouped / self.largest[..., None].clamp_min(torch.finfo(torch.float32).tiny) * 255).round_()
        self.shares = self._grouped(shares.to(torch.uint8).flatten(-2)[..., :size]).contiguous()
        scales = self._scales()[..., None]
        middles = ((levels()[1:] + levels()[:-1]) / 2).to(values.device)
        # The largest of a block spans it, whatever its rounded scale says: written again, the scale is the same.
        is_largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
        ratios = torch.where(is_largest, blocks.sign(), blocks / scales).nan_to_num_(0.0, 0.0, 0.0)
        codes = torch.bucketize(ratios, middles).to(torch.uint8)
        first, second = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
        self.codes = first | second << 4

    def read(self, dtype: torch.dtype) -> Tensor:
        table = levels().to(self.codes.device)
        both = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)  # the two values of every byte
        blocks = both[self.codes.int()].flatten(-2).unflatten(-1, (-1, BLOCK))
        return blocks.mul_(self._scales()[..., None]).flatten(-2).to(dtype)

    def _scales(self) -> Tensor:
        """The scale of each block ``[..., out, in / 64]``, float32."""
        shares = self._grouped(self.shares).float().div_(255)
        largest = self.largest.repeat_interleave(SCALES, -1)[..., : shares.shape[-1]]
        return self._grouped(shares.mul_(largest))

    def _grouped(self, scales: Tensor) -> Tensor:
        """Scales with the dimension along which they are grouped last; its own inverse."""
        return scales.transpose(-1, -2) if self.has_split_input else scales
