"""Which values of our logical tensors are which values of another library's: read and written either way.

A :class:`Link` says that some of our tensor, at an index of its leading dimensions, is some rows of their tensor. One
tensor of ours may come from many of theirs (experts are stacked here, apart there) and one of theirs from many of ours
(Mamba-2's input projection is five of our matrices one below the other). Where theirs is stored transposed, as GPT-2's
matrices are, its rows are those of the transpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Link:
    """Part of our tensor that is rows of theirs.

    Attributes:
        ours: name of our logical tensor.
        theirs: name of their tensor.
        place: index into the leading dimensions of ours.
        start: the first of their rows; as many follow as our part has.
        factor: their values are ours times this power of two.
    """

    ours: str
    theirs: str
    place: tuple[int, ...] = ()
    start: int = 0
    factor: float = 1.0


@dataclass
class LinkTable:
    """All links of one model.

    Attributes:
        shapes: of our tensors.
        links: for each tensor of ours.
        zeros: their tensors that we have not and that change nothing while they are zero, with their shapes.
        flat: their names whose tensors have a dimension of one more after the first (a convolution's).
        transposed: their names whose tensors are matrices ``[in, out]``.
    """

    shapes: dict[str, tuple[int, ...]]
    links: list[Link] = field(default_factory=list)
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)

    def add(self, ours: str, theirs: str, factor: float = 1.0) -> None:
        """Link a tensor of ours with one of theirs."""
        self.links.append(Link(ours, theirs, factor=factor))

    def add_part(self, ours: str, theirs: str, place: tuple[int, ...]) -> None:
        """Link what a tensor of ours has at an index of its leading dimensions with one of theirs."""
        self.links.append(Link(ours, theirs, place))

    def add_rows(self, theirs: str, *ours: str, flat: bool = False, transposed: bool = False) -> None:
        """Link their tensor with several of ours, whose rows lie one below the other in it."""
        start = 0
        for name in ours:
            self.links.append(Link(name, theirs, (), start))
            start += self.shapes[name][0]
        if flat:
            self.flat.add(theirs)
        if transposed:
            self.transposed.add(theirs)

    def ours(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor in float32 from theirs.

        Args:
            name: of ours.
            read: gives a tensor of theirs.

        Raises:
            ValueError: one of theirs has another shape.
        """
        links, shape = self._of_ours[name], self.shapes[name]
        if len(links) == 1 and not links[0].place:
            return self._part(links[0], read).to(torch.float32, copy=False)
        result = torch.empty(shape)
        for link in links:
            result[link.place] = self._part(link, read)
        return result

    def theirs(self, name: str, read: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
        """Their tensor in float32 from ours.

        Args:
            name: of theirs.
            read: gives what a tensor of ours has at an index of its leading dimensions.
        """
        if name in self.zeros:
            return torch.zeros(self.zeros[name])
        parts = [read(link.ours, link.place) * link.factor for link in self._of_theirs[name]]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.t() if name in self.transposed else joined.reshape(self.their_shapes[name])

    @property
    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of theirs with its shape, in the order of the links."""
        if not hasattr(self, "_their_shapes"):
            shapes: dict[str, tuple[int, ...]] = {}
            for link in self.links:
                rows, *rest = self._part_shape(link)
                if link.theirs in self.flat and rest:
                    rest = [1, *rest]
                shapes[link.theirs] = (shapes.get(link.theirs, (0,))[0] + rows, *rest)
            stored = {name: shape[::-1] if name in self.transposed else shape for name, shape in shapes.items()}
            self._their_shapes = stored | self.zeros
        return self._their_shapes

    def problems(self) -> Iterator[str]:
        """Tensors of ours that no link fills, or only in part."""
        for name, shape in self.shapes.items():
            linked = sum(prod(self._part_shape(link)) for link in self._of_ours.get(name, []))
            if linked != prod(shape):
                yield f"{name}: {linked} of {prod(shape)} values have a counterpart"

    @property
    def _of_ours(self) -> dict[str, list[Link]]:
        return self._grouped("ours")

    @property
    def _of_theirs(self) -> dict[str, list[Link]]:
        return self._grouped("theirs")

    def _grouped(self, key: str) -> dict[str, list[Link]]:
        if not hasattr(self, f"_by_{key}"):
            groups: dict[str, list[Link]] = {}
            for link in self.links:
                groups.setdefault(getattr(link, key), []).append(link)
            setattr(self, f"_by_{key}", groups)
        return getattr(self, f"_by_{key}")

    def _part_shape(self, link: Link) -> tuple[int, ...]:
        return self.shapes[link.ours][len(link.place) :]

    def _part(self, link: Link, read: Callable[[str], Tensor]) -> Tensor:
        values, wanted = read(link.theirs), self.their_shapes[link.theirs]
        if tuple(values.shape) != wanted:
            raise ValueError(f"{link.theirs!r} has shape {tuple(values.shape)}, its config.json means {wanted}")
        if link.theirs in self.transposed:
            values = values.t()
        shape = self._part_shape(link)
        rows = values[link.start : link.start + shape[0]].reshape(shape)
        return rows if link.factor == 1 else rows / link.factor
