"""Noise by ids: what a position draws does not depend on who draws it."""

import torch

from lightbulb.mixers.base import Context
from lightbulb.nn.noise import Noise

CPU = torch.device("cpu")


def draw(samples: list[int], positions: slice = slice(None), place: str = "3.token", seed: int = 1) -> torch.Tensor:
    return Noise(seed, torch.tensor(samples), 8).uniform(place, positions, 5, CPU)


def test_every_cut_of_batch_and_positions_draws_the_same() -> None:
    whole = draw([4, 7, 9])
    assert whole.shape == (8, 3, 5) and whole.min() >= 0 and whole.max() < 1
    assert torch.equal(draw([7]), whole[:, 1:2])
    assert torch.equal(draw([9, 4], slice(2, 6)), whole[2:6][:, [2, 0]])


def test_samples_places_and_seeds_draw_apart() -> None:
    first = draw([4])
    for other in (draw([5]), draw([4], place="3.channel"), draw([4], seed=2)):
        assert not torch.equal(first, other)


def test_dropout_keeps_the_mean_and_rests_outside_training() -> None:
    x = torch.ones(64, 4, 128)
    context = Context(torch.arange(64), noise=Noise(0, torch.arange(4), 64)).at("0").at("token")
    dropped = context.dropout(x, 0.5)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(float(dropped.mean()) - 1) < 0.02
    assert context.dropout(x, 0.0) is x
    assert Context(torch.arange(64)).dropout(x, 0.5) is x
