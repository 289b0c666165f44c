"""Random numbers of training (dropout, router jitter) as a function of ids alone.

What a position draws depends on the seed, the name of the place in the model, and the sample's place in the data: not
on the rank, the micro-batch, the layout or what was drawn before. So every layout trains with the same noise,
recompute repeats it, and a resumed run continues it without any generator's state. CPU and CUDA generators differ.
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

    def _generator(self, place: str, sample: int, device: torch.device) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{place}/{sample}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
