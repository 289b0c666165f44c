"""What mixers with heads share: the fields that shape the heads, their projections, and how heads are split."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.mixers.base import TokenMixer, TokenMixerConfig
from lightbulb.nn.groups import Axis, enter_tensor_region, tensor_axis, ulysses_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.parameter import Init
from lightbulb.nn.ulysses import scatter_heads

Biases = Literal["none", "qkv", "all"]
"""Which projections have biases: none, those to heads, or the output's too."""


class HeadsConfig(TokenMixerConfig):
    """Query heads over fewer key/value heads, split over the tensor axis and again over the Ulysses axis."""

    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, each shared by ``num_heads / num_kv_heads`` query heads; None for one per query head."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head; None for ``dim / num_heads``."""
    rope_theta: float | None = Field(10_000.0, gt=0)
    """Base of the rotary frequencies; None for no rotation."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "HeadsConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}; choose a divisor"
            )
        if self.head_dim is not None and self.head_dim % 2 and self.rope_theta is not None:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_kv_heads or self.num_heads

    def width(self, dim: int) -> int:
        """Width of one head for a model width.

        Raises:
            ValueError: ``dim`` does not divide into a head width, which a rotation needs to be even.
        """
        if self.head_dim is not None:
            return self.head_dim
        return head_width(dim, self.num_heads, "head_dim", is_rotated=self.rope_theta is not None)

    def check_tensor_parallel(self, degree: int) -> None:
        check_heads({"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}, degree)

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        check_heads({"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}, tensor, ulysses)


class HeadsMixer(TokenMixer):
    """Projections to heads local to the tensor rank, and back.

    Args:
        config: shape of the heads.
        dim: model width.
        init: initial standard deviations.
        has_keys: False where keys are made of queries.
        bias: which projections have biases.
    """

    def __init__(self, config: HeadsConfig, dim: int, init: Init, has_keys: bool = True, bias: Biases = "none"):
        super().__init__()
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        self.width = config.width(dim)
        self.kv_heads = config.kv_heads // self.axis.size
        queries, keys, has_bias = config.num_heads * self.width, config.kv_heads * self.width, bias != "none"
        self.query = ColumnParallelLinear(dim, queries, init.std, bias=has_bias)
        if has_keys:
            self.key = ColumnParallelLinear(dim, keys, init.std, bias=has_bias)
        self.value = ColumnParallelLinear(dim, keys, init.std, bias=has_bias)
        self.output = RowParallelLinear(queries, dim, init.output_std, bias=bias == "all")

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys (if there are any) and values ``[length, batch, heads, width]`` of ``x [rows, batch, dim]``:
        all positions, this rank's heads."""
        x = enter_tensor_region(x, self.axis)
        names = ("query", "key", "value") if hasattr(self, "key") else ("query", "value")
        return scatter_heads([self.projected(name, x).unflatten(-1, (-1, self.width)) for name in names], self.ulysses)

    def projected(self, name: str, x: Tensor) -> Tensor:
        """``x [length, batch, dim]`` inside the tensor region through one projection: features of this rank's heads,
        before Ulysses takes them apart."""
        return getattr(self, name)(x)


def head_width(dim: int, num_heads: int, field: str, is_rotated: bool = True) -> int:
    """``dim / num_heads``; ``field`` is what sets another width.

    Raises:
        ValueError: no whole number, or an odd one of a head that is rotated.
    """
    unit = num_heads * (2 if is_rotated else 1)
    if dim % unit:
        raise ValueError(
            f"dim {dim} does not divide into num_heads {num_heads} heads of {'even' if is_rotated else 'equal'} width; "
            f"set {field} or choose a dim that is a multiple of {unit}"
        )
    return dim // num_heads


def check_heads(counts: Mapping[str, int], tensor: int, ulysses: int = 1) -> None:
    """Raise ValueError when the heads of a field cannot be split over so many ranks."""
    ranks = f"parallel.tensor {tensor}" + (f" x parallel.ulysses {ulysses}" if ulysses > 1 else "")
    for field, count in counts.items():
        if count % (tensor * ulysses):
            raise ValueError(f"{field} {count} cannot be split over {ranks}; choose a multiple of {tensor * ulysses}")


def head_slice(heads: int, tensor: Axis, ulysses: Axis) -> slice:
    """Which of a model's ``heads`` this rank mixes: the tensor axis cuts first, then Ulysses."""
    mine = heads // (tensor.size * ulysses.size)
    first = (tensor.rank * ulysses.size + ulysses.rank) * mine
    return slice(first, first + mine)
