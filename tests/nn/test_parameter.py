"""Initial weights do not depend on how they are split."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightbulb.nn.groups import Axis
from lightbulb.nn.parameter import Logical, initialise, logical_of, make_parameter

SINGLE_NAME = "weight"


def values(logical: Logical, seed: int = 0, name: str = SINGLE_NAME) -> Tensor:
    module = nn.Module()
    module.register_parameter(name, make_parameter(logical))
    initialise(module, seed)
    return module.get_parameter(name).detach()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_shards_are_slices_of_the_whole(dim: int, size: int) -> None:
    whole = values(Logical((8, 12), 0.5))
    shards = [values(Logical((8, 12), 0.5, dim, Axis(None, rank, size))) for rank in range(size)]
    assert torch.equal(torch.cat(shards, dim), whole)


def test_token_ids_are_split_into_parts_that_differ_by_one_at_most() -> None:
    whole = values(Logical((11, 3), 0.5))
    shards = [
        values(Logical((11, 3), 0.5, tensor_dim=0, tensor=Axis(None, rank, 4), is_vocab=True)) for rank in range(4)
    ]
    assert torch.equal(torch.cat(shards), whole)
    assert sorted(map(len, shards)) == [2, 3, 3, 3]


def test_expert_shards_are_slices_of_the_whole_also_when_split_over_tensor_ranks() -> None:
    shape, options = (8, 3, 4, 5), {"is_expert": True}
    whole = values(Logical(shape, 0.5, **options))
    for experts, tensors in itertools.product((1, 2, 4), (1, 2)):
        for e, t in itertools.product(range(experts), range(tensors)):
            logical = Logical(shape, 0.5, 2, Axis(None, t, tensors), Axis(None, e, experts), **options)
            assert torch.equal(values(logical), whole[logical.slices()])


def test_every_expert_and_name_and_seed_is_different() -> None:
    experts = values(Logical((4, 6), 1.0, is_expert=True))
    assert len({tuple(row.tolist()) for row in experts}) == 4
    plain = values(Logical((4, 6), 1.0))
    assert not torch.equal(plain, values(Logical((4, 6), 1.0), seed=1))
    assert not torch.equal(plain, values(Logical((4, 6), 1.0), name="other"))


def test_standard_deviation_and_ones() -> None:
    assert values(Logical((200, 200), 0.25)).std() == pytest.approx(0.25, rel=0.05)
    assert torch.equal(values(Logical((5,), None)), torch.ones(5))


def test_what_megatron_is_told() -> None:
    def marks(**options: Any) -> tuple[bool, bool, int]:
        parameter = make_parameter(Logical((4, 4), 1.0, **options))
        assert logical_of(parameter).shape == (4, 4)
        return parameter.allreduce, parameter.tensor_model_parallel, parameter.partition_dim  # type: ignore[attr-defined]

    assert marks() == (True, False, -1)
    assert marks(tensor_dim=1) == (True, True, 1)
    assert marks(is_expert=True, expert=Axis(None, 0, 2)) == (False, False, -1)
    assert marks(is_expert=True) == (True, False, -1)  # one expert rank: reduced like everything else


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="a dimension of 6 cannot be split over 4 ranks"):
        make_parameter(Logical((6, 2), 1.0, 0, Axis(None, 0, 4)))
