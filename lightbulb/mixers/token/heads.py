"""What mixers with heads share: the fields that shape the heads, and how heads are split."""

from pydantic import Field, model_validator

from lightbulb.mixers.base import TokenMixerConfig
from lightbulb.nn.groups import Axis


class HeadsConfig(TokenMixerConfig):
    """Query heads over fewer key/value heads, split over the tensor axis and again over the Ulysses axis."""

    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, each shared by ``num_heads / num_kv_heads`` query heads; None for one per query head."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head; None for ``dim / num_heads``."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "HeadsConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}; choose a divisor"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_kv_heads or self.num_heads

    def width(self, dim: int) -> int:
        """Width of one head for a model width.

        Raises:
            ValueError: ``dim`` does not divide into an even head width.
        """
        if self.head_dim is not None:
            return self.head_dim
        if dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {dim} does not divide into num_heads {self.num_heads} heads of even width; "
                f"set head_dim or choose a dim that is a multiple of {2 * self.num_heads}"
            )
        return dim // self.num_heads

    def check_tensor_parallel(self, degree: int) -> None:
        for field, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            if heads % degree:
                raise ValueError(f"{field} {heads} cannot be split over parallel.tensor {degree}; choose a divisor")

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        for field, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            if heads % (tensor * ulysses):
                raise ValueError(
                    f"{field} {heads} cannot be split over parallel.tensor {tensor} x parallel.ulysses {ulysses}; "
                    f"choose a multiple of {tensor * ulysses}"
                )


def my_heads(heads: int, tensor: Axis, ulysses: Axis) -> slice:
    """Which of a model's ``heads`` this rank mixes: the tensor axis cuts first, then Ulysses."""
    mine = heads // (tensor.size * ulysses.size)
    first = (tensor.rank * ulysses.size + ulysses.rank) * mine
    return slice(first, first + mine)
