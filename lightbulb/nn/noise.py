"""Random numbers of training (dropout, router jitter) as a function of ids alone.

What a position draws depends on the seed, the name of the place in the model, and the sample's place in the data: not
on the rank, the micro-batch, the layout or what was drawn before. So every layout trains with the same noise,
recompute repeats it, and a resumed run continues it without any generator's state. CPU and CUDA generators differ.

A row that leaves its position (a token on its way to an expert) takes a key along, made where the position is; wherever
the row is then, its noise is a hash of key and feature.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The noise of one micro-batch.

    Attributes:
        seed: of the run.
        sample_ids: ``[batch]`` place of each sequence in the endless sequence of samples: unique in a run.
        length: positions of a whole sequence.
    """

    seed: int
    sample_ids: Tensor
    length: int

    def uniform(self, place: str, positions: slice, width: int, device: torch.device) -> Tensor:
        """``[positions, batch, width]`` uniform on [0, 1) in float32.

        Args:
            place: name of the part that asks, unique in the model.
            positions: those this rank holds.
            width: numbers per position.
            device: where to draw.
        """
        samples = [
            torch.rand(self.length, width, generator=self._generator(place, int(sample), device), device=device)
            for sample in self.sample_ids
        ]
        return torch.stack([sample[positions] for sample in samples], dim=1)

    def keys(self, place: str, positions: slice, width: int, device: torch.device) -> Tensor:
        """``[positions, batch, width]`` int64: keys of rows that leave their position, ``width`` of each position."""
        seeds = torch.tensor([self._number(place, int(sample)) for sample in self.sample_ids], device=device)
        counters = torch.arange(self.length * width, device=device).view(self.length, 1, width)[positions]
        return _hashed(seeds[:, None] + (counters + 1) * _STEP)

    def _generator(self, place: str, sample: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self._number(place, sample))

    def _number(self, place: str, sample: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{place}/{sample}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RowDropout:
    """Dropout of rows far from their positions.

    Attributes:
        keys: ``[R]`` of :meth:`Noise.keys`, one for each row.
        probability: of setting a feature to zero.
    """

    keys: Tensor
    probability: float

    def __call__(self, x: Tensor, first: int = 0) -> Tensor:
        """``x [R, width]``, whose features are the ones from ``first`` on, with some set to zero and the rest scaled
        up."""
        features = torch.arange(first + 1, first + 1 + x.shape[1], device=x.device)
        numbers = _hashed(self.keys[:, None] + features * _STEP) >> 40  # 24 bits and their sign
        kept = numbers >= int((self.probability - 0.5) * 2**24)
        return x * (kept.to(x.dtype) / (1 - self.probability))


_STEP = 0x9E3779B97F4A7C15 - 2**64  # as the factors below: modulo 2**64, as a signed number
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _hashed(x: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014) of int64 numbers, whose products wrap around; overwrites ``x``."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))
