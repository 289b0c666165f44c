"""Mixtures: proportions, permutations, caps; one sequence whatever ranks, batches and resumes: fault catalogue 52."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.data.config import DataConfig, DataError, MixtureConfig
from lightbulb.data.loader import TrainLoader
from lightbulb.data.mixture import Group, Mixture, OutOfRows, assign, check_enough, choose, occurrences, resolve
from lightbulb.data.sequence import SampleSequence

LENGTH, VOCAB = 16, 300
ROOT = Path(__file__).parent.parent.parent
GROUPS = {
    "python/cluster-00": Group(60, 6000), "python/cluster-01": Group(20, 2000), "pydoc": Group(20, 2000),
}  # fmt: skip
QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

weights_of_groups = st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.01)


def mixture(**values: Any) -> MixtureConfig:
    return build_config(MixtureConfig, values)


def shares(**values: Any) -> dict[str, float]:
    found = resolve(mixture(**values), GROUPS)
    return dict(zip(GROUPS, found.weights.round(6).tolist(), strict=True))


def sequence(stages: list[tuple[int, MixtureConfig]], seed: int = 0, groups=GROUPS) -> SampleSequence:
    return SampleSequence(groups, seed, True, [(first, resolve(config, groups)) for first, config in stages])


# ------------------------------------------------------------------------------------------------ weights and names
def test_one_name_shares_its_weight_by_tokens() -> None:
    assert shares(weights={"python": 3, "pydoc": 1}) == {
        "python/cluster-00": 0.5625, "python/cluster-01": 0.1875, "pydoc": 0.25
    }  # fmt: skip
    assert shares(weights={"*": 5}) == shares() == {
        "python/cluster-00": 0.6, "python/cluster-01": 0.2, "pydoc": 0.2
    }  # fmt: skip


def test_the_longest_name_counts_and_what_none_matches_is_left_out() -> None:
    found = shares(weights={"*": 1, "python/cluster-0*": 1, "python/cluster-01": 2})
    assert found == {"python/cluster-00": 0.25, "python/cluster-01": 0.5, "pydoc": 0.25}
    assert shares(weights={"python/cluster-01": 2}) == {"python/cluster-00": 0, "python/cluster-01": 1, "pydoc": 0}
    with pytest.raises(DataError, match="every group that 'pydoc' matches has a longer name|'py\\*' matches has"):
        resolve(mixture(weights={"py*": 1, "pydoc": 1, "python": 1}), GROUPS)


def test_temperature_flattens_the_domains() -> None:
    assert shares(temperature=2)["pydoc"] == pytest.approx(2000**0.5 / (2000**0.5 + 8000**0.5), abs=1e-6)
    assert shares(temperature=1e6)["pydoc"] == pytest.approx(0.5, abs=1e-5)
    flat = shares(temperature=1e6)
    assert flat["python/cluster-00"] == pytest.approx(3 * flat["python/cluster-01"], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weights": {"python": -1}}, "weights.python: Input should be greater than or equal to 0"),
        ({"weights": {"python": float("nan")}}, "weights.python: Input should be a finite number"),
        ({"weights": {"python": float("inf")}}, "weights.python: Input should be a finite number"),
        ({"weights": {"python": 0, "pydoc": 0.0}}, "weights: all are zero"),
        ({"weights": {}}, "weights: all are zero"),
        ({"weights": {"": 1}}, "at least 1 character"),
        ({"weights": {"python": 1}, "temperature": 2}, "leave out either weights or temperature"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"max_epochs": {"python": 0}}, "max_epochs.python: Input should be greater than 0"),
    ],
)
def test_bad_mixtures_are_refused_at_load(values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize("values", [{"weights": {"pithon": 1}}, {"max_epochs": {"pithon": 1}}])
def test_a_name_that_matches_nothing_is_refused_with_the_known_ones(data: DataConfig, values: dict) -> None:
    with pytest.raises(DataError, match=r"'pithon' matches no group .* known are plain, poems$"):
        TrainLoader(data, LENGTH, VOCAB, 0, 8, 2, mixtures=[(0, mixture(**values))])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/mixes").glob("*.yaml")), ids=lambda path: path.name)
def test_mixes_load_alone_and_by_name(path: Path) -> None:
    alone = load_config(MixtureConfig, path)
    by_name = build_config(DataConfig, {"path": "x", "stages": [{"start": "decay", "mixture": str(path)}]})
    assert by_name.stages[0].mixture == alone
    again = build_config(DataConfig, by_name.model_dump(mode="json"))
    assert again == by_name  # the saved config needs no other file


def test_stages_begin_in_their_order() -> None:
    stages = [{"start": 0.25, "mixture": {}}, {"start": 50, "mixture": {}}, {"start": "decay", "mixture": {}}]
    data = build_config(DataConfig, {"path": "x", "stages": stages})
    assert [first for first, _ in data.mixtures(100, 80)] == [0, 25, 50, 80]
    with pytest.raises(ValueError, match=r"data\.stages\.1: start 50 is after 50 steps, stages\.0 begins after 75"):
        data.mixtures(300, 240)
    assert build_config(DataConfig, {"path": "x"}).mixtures(100, 80) == []
    for start in (0, -1, 1.0, 0.0, float("nan"), "late"):
        with pytest.raises(ConfigError):
            build_config(DataConfig, {"path": "x", "stages": [{"start": start, "mixture": {}}]})


# ------------------------------------------------------------------------------------------------ which group
@QUICK
@given(weights_of_groups, st.integers(0, 2**32), st.integers(0, 10**12), st.integers(1, 20_000))
def test_proportions_hold_in_every_window(weights: list[float], seed: int, first: int, count: int) -> None:
    share = np.array(weights) / sum(weights)
    found = np.bincount(choose(seed, first, count, share), minlength=len(share))
    error = np.abs(found - count * share)
    assert (error <= 2 + np.log(count)).all()  # the sequence's own bound
    sigma = np.sqrt(count * share * (1 - share))
    assert (error <= np.maximum(3 * sigma, 2 + np.log(count))).all()
    assert (found[share == 0] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_proportions_are_within_three_sigma_for_a_run(seed: int) -> None:
    share = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    count = 100_000
    found = np.bincount(choose(seed, 0, count, share), minlength=5)
    assert (np.abs(found - count * share) < 0.3 * np.sqrt(count * share * (1 - share))).all()


@QUICK
@given(st.integers(0, 99), st.integers(0, 3000), st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_groups_do_not_depend_on_how_the_samples_are_cut(seed: int, first: int, cuts: list[int]) -> None:
    mix = Mixture(np.array([0.6, 0.3, 0.1]), np.array([400, 1 << 62, 50]))
    whole = assign(seed, first, sum(cuts), mix, np.zeros(3, dtype=np.int64))
    parts, drawn, at = [], np.zeros(3, dtype=np.int64), first
    for cut in cuts:
        parts.append(assign(seed, at, cut, mix, drawn))
        drawn = drawn + np.bincount(parts[-1], minlength=3)
        at += cut
    assert np.concatenate(parts).tolist() == whole.tolist()


@QUICK
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 300)), min_size=1, max_size=5), st.integers(0, 99),
    st.integers(1, 1500),
)  # fmt: skip
def test_caps_are_kept_and_used_up_before_anything_stops(pairs, seed: int, count: int) -> None:
    weights, caps = np.array([w for w, _ in pairs]), np.array([cap for _, cap in pairs])
    if weights.sum() < 1e-3:
        return
    mix, drawn = Mixture(weights / weights.sum(), caps), np.zeros(len(caps), dtype=np.int64)
    allowed = int(caps[weights > 0].sum())
    if count > allowed:
        with pytest.raises(OutOfRows, match=f"used up after {allowed} samples"):
            assign(seed, 0, count, mix, drawn)
        with pytest.raises(OutOfRows, match=f"needs {count} more samples, the caps of max_epochs allow {allowed}"):
            check_enough([(0, mix)], 0, count, drawn)
        return
    check_enough([(0, mix)], 0, count, drawn)
    found = np.bincount(assign(seed, 0, count, mix, drawn), minlength=len(caps))
    assert (found <= caps).all() and found.sum() == count and (found[weights == 0] == 0).all()


def test_the_weight_of_an_exhausted_group_goes_to_the_others_in_proportion() -> None:
    mix = Mixture(np.array([0.5, 0.3, 0.2]), np.array([100, 1 << 62, 1 << 62]))
    groups = assign(7, 0, 10_000, mix, np.zeros(3, dtype=np.int64))
    last = int(np.flatnonzero(groups == 0)[-1])
    assert (groups == 0).sum() == 100 and 190 <= last <= 210
    rest = np.bincount(groups[last + 1 :], minlength=3)
    assert rest[1] / rest[2] == pytest.approx(1.5, rel=0.01)


def test_caps_of_stages_are_checked_from_where_the_run_is() -> None:
    first, second = Mixture(np.array([1.0, 0.0]), np.array([50, 50])), Mixture(np.array([0.0, 1.0]), np.array([50, 50]))
    check_enough([(0, first), (50, second)], 0, 100, np.zeros(2, dtype=np.int64))
    check_enough([(0, first), (50, second)], 60, 100, np.array([50, 10]))
    with pytest.raises(OutOfRows, match="needs 51 more"):
        check_enough([(0, first), (51, second)], 0, 100, np.zeros(2, dtype=np.int64))
    with pytest.raises(OutOfRows, match="needs 40 more samples, the caps of max_epochs allow 39"):
        check_enough([(0, first), (50, second)], 60, 100, np.array([50, 11]))


def test_occurrences_count_what_stood_before() -> None:
    assert occurrences(np.array([5, 7, 5, 5, 7])).tolist() == [0, 0, 1, 2, 1]
    assert occurrences(np.array([], dtype=np.int64)).tolist() == []


# ------------------------------------------------------------------------------------------------ which row
def rows_of(found: SampleSequence, stop: int, step: int, first: int = 0, drawn=None) -> list[int]:
    """The rows of the samples up to ``stop``, so many at a time."""
    drawn = np.zeros(len(found.sizes), dtype=np.int64) if drawn is None else drawn
    rows: list[int] = []
    for at in range(first, stop, step):
        draw = found.draw(at, step, drawn)
        drawn = drawn + np.bincount(draw.groups, minlength=len(drawn))
        rows += draw.rows.tolist()
    return rows


@QUICK
@given(st.integers(0, 99), st.sampled_from([{}, {"weights": {"python": 1, "pydoc": 3}}, {"temperature": 3}]))
def test_each_group_visits_its_rows_once_per_epoch_in_a_new_order(seed: int, values: dict) -> None:
    found = sequence([(0, mixture(**values))], seed)
    rows = np.array(rows_of(found, 400, 8))
    groups = found.groups_of(rows)
    for group, size in enumerate(found.sizes):
        own = rows[groups == group]
        epochs = [own[i : i + size].tolist() for i in range(0, len(own), size)]
        everything = set(range(found.first_row(group), found.first_row(group) + size))
        assert all(set(epoch) == everything for epoch in epochs if len(epoch) == size)
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]


@QUICK
@given(st.integers(0, 99), st.integers(0, 30), st.integers(1, 30), st.integers(1, 20))
def test_adding_and_changing_a_mixture_repeats_and_drops_nothing(seed: int, plain: int, one: int, two: int) -> None:
    """So many steps of 8 without a mixture, with one, and with another; 100 rows in all, so over epochs, too."""
    rows = rows_of(sequence([], seed), 8 * plain, 8)
    for steps, values in ((one, {"weights": {"python": 1, "pydoc": 2}}), (two, {"temperature": 4})):
        found = sequence([(0, mixture(**values))], seed)
        found.plain_samples = 8 * plain
        drawn = np.bincount(found.groups_of(np.array(rows, dtype=np.int64)), minlength=3)
        rows += rows_of(found, len(rows) + 8 * steps, 8, len(rows), drawn)
    groups = found.groups_of(np.array(rows))
    for group, size in enumerate(found.sizes):
        counts = Counter(row for row, g in zip(rows, groups, strict=True) if g == group)
        epochs, rest = divmod(sum(counts.values()), int(size))
        assert set(counts.values()) <= {epochs, epochs + 1}  # nothing more often than what was left out
        assert sum(count == epochs + 1 for count in counts.values()) == rest


def test_without_shuffling_rows_come_as_they_were_written() -> None:
    found = SampleSequence(GROUPS, 0, False, [(0, resolve(mixture(weights={"pydoc": 1}), GROUPS))])
    assert rows_of(found, 24, 8) == [*range(80, 100), *range(80, 84)]


# ------------------------------------------------------------------------------------------------ loaders
SWITCH = [(0, mixture(weights={"plain": 3, "poems": 1})), (6, mixture(weights={"plain": 1, "poems": 2}))]


def loaders(data: DataConfig, size: int, micro: int = 2, mixtures=SWITCH, seed: int = 0) -> list[TrainLoader]:
    return [TrainLoader(data, LENGTH, VOCAB, seed, 8, micro, rank, size, mixtures) for rank in range(size)]


def take(ranks: list[TrainLoader], steps: int) -> list[tuple[list[int], ...]]:
    """Ids, groups, places and tokens of all samples of the next steps, in their order."""
    found = []
    for _ in range(steps):
        batches = [batch for rank in ranks for batch in rank.next_step()]
        for batch in batches:
            assert batch.group_places is not None
        parts = ("sample_ids", "groups", "group_places", "tokens")
        found.append(tuple(torch.cat([getattr(b, part) for b in batches]).flatten().tolist() for part in parts))
    return found


@pytest.mark.parametrize(("size", "micro"), [(1, 8), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_batches_do_not_depend_on_ranks_and_micro_batches(data: DataConfig, size: int, micro: int) -> None:
    alone, together = take(loaders(data, 1), 10), take(loaders(data, size, micro), 10)
    assert alone == together
    assert [step[0] for step in alone] == [list(range(8 * s, 8 * s + 8)) for s in range(10)]


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 7, 11])
@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (4, 1)])
def test_resume_at_any_step_continues_the_sequence(
    data: DataConfig, steps: int, saved_on: int, resumed_on: int
) -> None:
    whole, saved = take(loaders(data, 1), steps + 9), loaders(data, saved_on)
    taken = take(saved, steps)
    state = saved[0].state_dict()
    assert all(rank.state_dict() == state for rank in saved)
    assert sum(state["groups"].values()) == state["samples_consumed"] == 8 * steps
    resumed = loaders(data, resumed_on)
    for rank in resumed:
        rank.load_state_dict(state)
    assert taken + take(resumed, 9) == whole


@pytest.mark.parametrize("plain", [0, 3, 40])
def test_a_changed_mixture_goes_on_in_every_group(data: DataConfig, plain: int) -> None:
    first, second = loaders(data, 2, mixtures=[]), loaders(data, 1)
    for rank in first:
        for _ in range(plain):
            rank.next_step()
    for rank in second:
        rank.load_state_dict(first[0].state_dict())
    before = second[0].drawn.copy()
    found = take(second, 4)
    third = loaders(data, 4, mixtures=[(0, mixture(weights={"poems": 1}))])
    for rank in third:
        rank.load_state_dict(second[0].state_dict())
    found += take(third, 3)
    for group, start in enumerate(before.tolist()):
        places = [p for _, groups, at, _ in found for g, p in zip(groups, at, strict=True) if g == group]
        assert places == list(range(start, start + len(places)))
    assert {g for _, groups, _, _ in found[4:] for g in groups} == {1}


def test_a_mixture_cannot_be_taken_away(data: DataConfig) -> None:
    [mixed], [plain] = loaders(data, 1), loaders(data, 1, mixtures=[])
    take([mixed], 1)
    with pytest.raises(DataError, match=r"set data\.mixture=\{\} to draw all groups in proportion"):
        plain.load_state_dict(mixed.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"groups": {"plain": 8}}, {"groups": {"plain": 9, "poems": 0}}, {"groups": {"plain": -8, "poems": 16}},
        {"groups": []}, {"plain_samples": 9}, {"plain_samples": None},
    ],
)  # fmt: skip
def test_counts_that_cannot_be_true_are_refused(data: DataConfig, change: dict) -> None:
    [loader] = loaders(data, 1)
    take([loader], 1)
    with pytest.raises(DataError, match=r"data\.groups: "):
        loader.load_state_dict(loader.state_dict() | change)


def test_out_of_rows_takes_nothing(data: DataConfig) -> None:
    [loader] = loaders(data, 1, mixtures=[(0, mixture(weights={"plain": 1}, max_epochs={"plain": 1}))])
    rows = int(loader.sequence.sizes[0])
    take([loader], rows // 8)
    state = loader.state_dict()
    with pytest.raises(OutOfRows, match=f"used up after {rows} samples"):
        loader.next_step()
    assert loader.state_dict() == state
    with pytest.raises(OutOfRows, match=f"the caps of max_epochs allow {rows % 8};"):
        loader.check_enough(rows // 8 + 1)


def test_epochs_and_counts_are_the_same_with_and_without_a_mixture(data: DataConfig) -> None:
    [plain] = loaders(data, 1, mixtures=[])
    for _ in range(len(plain.corpus) // 8 + 2):
        plain.next_step()
    counted = plain.drawn
    assert counted.tolist() == plain.sequence.plain_counts(plain.samples_consumed).tolist()
    assert counted.sum() == plain.samples_consumed
    assert plain.state_dict().keys() == {
        "samples_consumed", "seed", "shuffle", "rows", "tokenizer_digest", "corpus_digest"
    }  # fmt: skip
    assert plain.group_epochs == {
        name: count / size for name, count, size in zip(("plain", "poems"), counted, plain.sequence.sizes, strict=True)
    }
