"""The optimizer's moments of a mixture: what the sources' became, so that training goes on warm.

They go where the weights go: copied with what is copied, averaged with what is averaged, zero for what is new (routers,
units drawn anew, outputs that start at zero). Where an output is multiplied by n, because its gate is one n-th, the
gradient of the new matrix is one n-th of the old one's: the first moment is divided by n, the second by its square. So
it is of a bias that n parts of a layer have behind such gates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightbulb.config import ConfigError
from lightbulb.experts.pieces import Merge, dropped_units
from lightbulb.experts.run_folder import Piece
from lightbulb.experts.source import RunSource, Source
from lightbulb.parallel.optimizer import MOMENTS

_POWERS = dict(zip(MOMENTS, (1, 2), strict=True))


@dataclass
class MomentMerge(Merge):
    """A merge of one of the moments instead of the weights.

    Args:
        moment: one of :data:`MOMENTS`.
    """

    moment: str = MOMENTS[0]

    def read(self, source: Source, name: str) -> Tensor:
        return source.read(f"{name}:{self.moment}").float()

    def _scaled(self, values: Tensor, factor: int) -> Tensor:
        return values / factor ** _POWERS[self.moment]

    def _kept_whole(self, values: Tensor, count: int) -> Tensor:
        return self._scaled(values, count)

    def _with_new_units(self, values: Tensor, is_output: bool, layer: int, expert: int, matrix: str) -> Tensor:
        side = 1 if is_output else 0
        units = dropped_units(values.shape[side], self.config.drop_ratio, self.config.seed, layer, expert)
        return values.index_fill(side, units, 0.0)

    def _router(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


def moment_pieces(merge: Merge) -> Iterator[Piece]:
    """All pieces of both moments of a mixture."""
    for moment in MOMENTS:
        view = MomentMerge(merge.config, merge.sources, merge.seed_model, moment=moment)
        for piece in view.parameters():
            yield piece._replace(name=f"{piece.name}:{moment}")


def updates_so_far(merge: Merge) -> int:
    """Updates that the moments have seen: the fewest of any source's, by which their bias is corrected.

    Raises:
        ConfigError: a source has no moments, or not of all its parameters.
    """
    sources = [*merge.sources]
    if merge.seed_model is not None and merge.config.trunk == "seed_model":
        sources.append(merge.seed_model)
    counts = []
    for source in sources:
        if not isinstance(source, RunSource) or not source.checkpoint.has_moments:
            raise ConfigError(
                f"moments: keep: {source.path} has none (only runs that were trained have); set moments: zero"
            )
        known = source.checkpoint.manifest.tensors
        if frozen := [name for name in merge.shapes if f"{name}:{MOMENTS[0]}" not in known]:
            raise ConfigError(
                f"moments: keep: {source.path} has none of {frozen[0]!r} ({len(frozen)} in all), which was frozen "
                "(train.trainable); set moments: zero"
            )
        counts.append(source.checkpoint.state.optimizer_step)
    return min(counts)
