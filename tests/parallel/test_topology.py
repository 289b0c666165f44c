"""Degrees and their errors."""

from typing import Any

import pytest

from lightbulb.config import ConfigError, build_config
from lightbulb.parallel.topology import ParallelConfig, layouts


def test_data_takes_what_is_left() -> None:
    assert ParallelConfig(tensor=2, pipeline=2).resolve(8).data == 2
    assert ParallelConfig().resolve(1).data == 1
    assert ParallelConfig(expert=4).resolve(4).label() == "TP1xPP1xEP4xDP4"


def test_degrees_must_make_the_world_size() -> None:
    with pytest.raises(
        ConfigError, match="tensor 2 x pipeline 2 x ulysses 1 x data 1 needs 4 processes but 2 were started"
    ):
        ParallelConfig(tensor=2, pipeline=2).resolve(2)
    with pytest.raises(
        ConfigError, match="tensor 3 x pipeline 1 x ulysses 1 x data 1 needs 3 processes but 4 were started"
    ):
        ParallelConfig(tensor=3).resolve(4)
    with pytest.raises(ConfigError, match="data 8 needs 8 processes but 4 were started"):
        ParallelConfig(data=8).resolve(4)


def test_expert_must_divide_data() -> None:
    with pytest.raises(ConfigError, match=r"parallel.expert 4 does not divide the 2 ranks .* choose a divisor of 2"):
        ParallelConfig(tensor=2, expert=4).resolve(4)
    assert ParallelConfig(tensor=2, sequence=True, expert_tensor=1, expert=4).resolve(4).data == 2
    assert ParallelConfig(ulysses=2, expert=4).resolve(4).data == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence": True}, "tensor is 1"),
        ({"interleave": 2}, "pipeline is 1"),
        ({"tensor": 4, "expert_tensor": 2}, "expert_tensor 2 is neither"),
        ({"tensor": 2, "expert_tensor": 1}, "set sequence: true"),
        ({"pipeline": 2, "stages": [4]}, "of each of pipeline 2 x interleave 1 = 2 stages"),
    ],
)
def test_options_that_contradict_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ParallelConfig, values)


@pytest.mark.parametrize(("world_size", "count"), [(1, 1), (2, 6), (3, 6), (4, 20), (8, 50)])
def test_every_layout_once(world_size: int, count: int) -> None:
    found = list(layouts(world_size))
    assert len(found) == len({layout.label() for layout in found}) == count
    for layout in found:
        assert layout.resolve(world_size) == layout
