"""Noise by ids: what a position draws does not depend on who draws it."""

import torch

from lightbulb.mixers.base import Context
from lightbulb.nn.noise import Noise, RowDropout

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


def keys(samples: list[int], positions: slice = slice(None), place: str = "3.channel", seed: int = 1) -> torch.Tensor:
    return Noise(seed, torch.tensor(samples), 8).keys(place, positions, 2, CPU)


def test_keys_depend_on_ids_alone_and_differ() -> None:
    whole = keys([4, 7, 9])
    assert whole.shape == (8, 3, 2) and whole.unique().numel() == whole.numel()
    assert torch.equal(keys([9, 4], slice(2, 6)), whole[2:6][:, [2, 0]])
    for other in (keys([5]), keys([4], place="4.channel"), keys([4], seed=2)):
        assert not torch.isin(other, whole).any()


def test_row_dropout_does_not_depend_on_the_order_of_rows_or_the_part_of_the_features() -> None:
    x, marks = torch.ones(24, 10), keys([4, 7, 9])[..., 0].flatten()
    whole, order = RowDropout(marks, 0.4)(x), torch.randperm(24)
    assert torch.equal(RowDropout(marks[order], 0.4)(x), whole[order])
    assert torch.equal(RowDropout(marks, 0.4)(x[:, :3], first=7), whole[:, 7:])


def test_row_dropout_draws_evenly_over_rows_and_features() -> None:
    marks = Noise(1, torch.arange(4), 128).keys("place", slice(None), 2, CPU).flatten()
    for probability in (0.1, 0.5, 0.9):
        dropped = RowDropout(marks, probability)(torch.ones(1024, 1024))
        assert torch.equal(dropped.unique(), torch.tensor([0.0, 1 / (1 - probability)]))
        kept = (dropped > 0).double() - (1 - probability)
        noise = (probability * (1 - probability)) ** 0.5
        assert kept.mean().abs() < 5 * noise / 1024
        for dim in (0, 1):  # the mean over 1024 of either, and what neighbours have in common
            assert kept.mean(dim).abs().max() < 5 * noise / 32
            common = (kept * kept.roll(1, dim)).mean()
            assert common.abs() < 5 * noise**2 / 1024
