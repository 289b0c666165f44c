"""Batch sizes that change at some steps: samples and steps agree, and nothing is repeated or left out."""

from pathlib import Path

import pytest
import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.data.batches import BatchSizes
from lightbulb.data.config import DataConfig, MixtureConfig
from lightbulb.data.loader import TrainLoader
from lightbulb.train.config import RunConfig
from lightbulb.train.ledger import Ledger, check_ledger

LENGTH, VOCAB = 16, 300
CHANGES = [(3, 16), (5, 4)]
SIZES = [8, 8, 8, 16, 16, 4, 4, 4, 4]
MIXTURES = [(0, MixtureConfig(weights={"plain": 3, "poems": 1})), (5, MixtureConfig(weights={"poems": 1}))]


@pytest.mark.parametrize("changes", [[], [(1, 2)], CHANGES, [(2, 8), (7, 24), (8, 3)]])
def test_equality_with_a_list_of_all_samples(changes: list[tuple[int, int]]) -> None:
    sizes = BatchSizes(8, changes)
    steps = [step for step in range(12) for _ in range(sizes.of_step(step))]
    assert [sizes.of_step(step) for step in range(12)] == [
        next((size for start, size in reversed(changes) if step >= start), 8) for step in range(12)
    ]
    assert [sizes.step_at(sample) for sample in range(len(steps))] == steps
    assert [sizes.samples(step) for step in range(12)] == [sum(s < step for s in steps) for step in range(12)]


def loaders(data: DataConfig, ranks: int, mixtures=MIXTURES) -> list[TrainLoader]:
    sizes = BatchSizes(8, CHANGES)
    return [TrainLoader(data, LENGTH, VOCAB, 0, sizes, 2, rank, ranks, mixtures) for rank in range(ranks)]


def take(ranks: list[TrainLoader], steps: int, ledgers: list[Ledger] | None = None, first: int = 1) -> list[list[int]]:
    """Sample ids and tokens of each step, laid together from all ranks."""
    found = []
    for step in range(first, first + steps):
        shares = [rank.next_step() for rank in ranks]
        for ledger, share in zip(ledgers or [], shares, strict=False):
            ledger.add(step, share)
        batches = [batch for share in shares for batch in share]
        ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
        found.append(ids + torch.cat([batch.tokens for batch in batches]).flatten().tolist())
    return found


@pytest.mark.parametrize("mixtures", [[], MIXTURES])
@pytest.mark.parametrize(("saved_after", "saved_on", "resumed_on"), [(2, 2, 1), (3, 1, 2), (4, 2, 1), (7, 1, 2)])
def test_changes_are_the_same_on_all_ranks_and_after_a_resume(
    data: DataConfig, tmp_path: Path, mixtures: list, saved_after: int, saved_on: int, resumed_on: int
) -> None:
    whole = take(loaders(data, 1, mixtures), len(SIZES))
    places = [place for step, size in zip(whole, SIZES, strict=True) for place in step[:size]]
    assert places == list(range(sum(SIZES))), "every sample once, in its order"
    assert [len(step) for step in whole] == [size * (LENGTH + 1) for size in SIZES]

    saved = loaders(data, saved_on, mixtures)
    names = saved[0].sequence.names
    ledgers = [Ledger(tmp_path, rank, True, names) for rank in range(2)]
    before = take(saved, saved_after, ledgers)
    resumed = loaders(data, resumed_on, mixtures)
    for rank in resumed:
        rank.load_state_dict(saved[0].state_dict())
    after = take(resumed, len(SIZES) - saved_after, ledgers, saved_after + 1)
    assert before + after == whole
    for ledger in ledgers:
        ledger.write(ledger.take())
    state = resumed[0].state_dict()
    plain = state.get("plain_samples", state["samples_consumed"])
    check = check_ledger(tmp_path, len(SIZES), BatchSizes(8, CHANGES), state.get("groups"), plain)
    assert (check.samples, check.problems) == (sum(SIZES), [])
    assert check_ledger(tmp_path, len(SIZES), 8, state.get("groups"), plain).problems, "as if it had not changed"


def test_a_mixture_begins_at_the_step_whatever_the_batches(data: DataConfig) -> None:
    [loader] = loaders(data, 1)
    groups = [torch.cat([batch.groups for batch in loader.next_step()]) for _ in SIZES]
    poems = loader.sequence.names.index("poems")
    assert all((step == poems).all() for step in groups[5:]) and not any((step == poems).all() for step in groups[:5])
    loader.check_enough(len(SIZES))


def config(**train) -> RunConfig:
    values = {"steps": 40, "global_batch_size": 8, "micro_batch_size": 2}
    return build_config(RunConfig, {
        "run": "runs/a", "data": {"path": "data/a"}, "train": values | train, "schedule": {"decay": 0.25},
        "model": {"vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32, "block_pattern": [{
            "token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 32},
        }]},
    })  # fmt: skip


def test_stages_of_a_run_file_start_at_a_step_a_fraction_and_the_decay() -> None:
    stages = [{"start": 4, "global_batch_size": 16}, {"start": 0.5, "global_batch_size": 24}]
    sizes = config(batch_stages=[*stages, {"start": "decay", "global_batch_size": 32}]).batch_sizes()
    assert [sizes.of_step(step) for step in (3, 4, 19, 20, 29, 30, 39)] == [8, 16, 16, 24, 24, 32, 32]
    assert sizes.samples(40) == 4 * 8 + 16 * 16 + 10 * 24 + 10 * 32


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"start": "decay", "global_batch_size": 9}], "train.global_batch_size 9 is not a multiple"),
        ([{"start": 0.01, "global_batch_size": 16}], r"train.batch_stages.0: start 0.01 is after 0 steps, the run"),
        ([{"start": 0.5, "global_batch_size": 16}, {"start": 20, "global_batch_size": 8}], "after 20 steps, stages.0"),
        ([{"start": 4, "global_batch_size": 0}], "global_batch_size"),
    ],
)
def test_bad_stages_are_named(stages: list[dict], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(batch_stages=stages)


def test_every_batch_must_divide_over_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch_size 12 is not a multiple .* make it a multiple of 8"):
        config(batch_stages=[{"start": 4, "global_batch_size": 12}]).resolve(4)
