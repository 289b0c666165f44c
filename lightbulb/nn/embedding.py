"""Token embedding with the vocabulary split over the tensor axis, and a table of positions."""

from torch import Tensor, nn
from torch.nn.functional import embedding

from lightbulb.nn.groups import exit_tensor_region, tensor_axis
from lightbulb.nn.parameter import Logical, make_parameter


class VocabParallelEmbedding(nn.Module):
    """Looks tokens up in a table whose rows are split over the tensor axis.

    Args:
        vocab_size: rows of the logical table, at least one for each tensor rank.
        dim: width of a row.
        std: standard deviation of the initial rows.
    """

    def __init__(self, vocab_size: int, dim: int, std: float):
        super().__init__()
        self.axis = tensor_axis()
        self.first = self.axis.part(vocab_size).start
        self.weight = make_parameter(Logical((vocab_size, dim), std, tensor_dim=0, is_vocab=True, tensor=self.axis))

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [batch, length]`` to ``[length, batch, dim]``, whole on every tensor rank."""
        tokens = tokens.t()
        if self.axis.group is None:
            return embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.first
        mine = (local >= 0) & (local < rows)
        found = embedding(local.clamp(0, rows - 1), self.weight) * mine[..., None]
        return exit_tensor_region(found, self.axis)


class PositionEmbedding(nn.Module):
    """A learned vector for each position, whole on every rank, to be added to the tokens' between tensor regions.

    Args:
        length: positions.
        dim: width of a row.
        std: standard deviation of the initial rows.
    """

    def __init__(self, length: int, dim: int, std: float):
        super().__init__()
        self.weight = make_parameter(Logical((length, dim), std, by_position=True))

    def forward(self, positions: Tensor) -> Tensor:
        """``positions [rows]`` to ``[rows, 1, dim]``, for all sequences of a batch."""
        return embedding(positions, self.weight)[:, None]
