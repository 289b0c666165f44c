"""The ledger of runs with mixtures: any history of ranks, mixtures and kills is proven, and what is wrong is named."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightbulb.config import build_config
from lightbulb.data.config import MixtureConfig
from lightbulb.data.loader import Batch
from lightbulb.data.mixture import Group, resolve
from lightbulb.data.sequence import SampleSequence
from lightbulb.train.ledger import Ledger, check_ledger, read_ledger, rewind_ledger, tokens_hash

SIZE = 8
GROUPS = {"code/cluster-00": Group(30, 300), "code/cluster-01": Group(11, 110), "maths": Group(19, 190)}
MIXTURES = [{}, {"weights": {"code": 1, "maths": 3}}, {"weights": {"code/cluster-01": 1}}, {"temperature": 5}]


class Run:
    """A run without a model: its loader state and its ledger."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = self.plain = 0
        self.drawn = np.zeros(3, dtype=np.int64)
        self.rows: list[list[int]] = []

    def train(self, steps: int, ranks: int, mixture: dict | None, saved: bool = True) -> None:
        """Some steps; those that are not saved are lost to a kill."""
        stages = [] if mixture is None else [(0, resolve(build_config(MixtureConfig, mixture), GROUPS))]
        sequence = SampleSequence(GROUPS, 5, True, stages)
        if mixture is None:
            self.plain = (self.step + steps) * SIZE if saved else self.plain
        sequence.plain_samples = self.plain
        ledgers = [Ledger(self.folder, rank, True, sequence.names) for rank in range(ranks)]
        drawn, rows = self.drawn, []
        for step in range(self.step, self.step + steps):
            draw = sequence.draw(step * SIZE, SIZE, drawn)
            drawn = drawn + np.bincount(draw.groups, minlength=3)
            rows.append(draw.rows.tolist())
            for rank, ledger in enumerate(ledgers):
                own = draw.part(rank * SIZE // ranks, (rank + 1) * SIZE // ranks)
                ids = torch.arange(step * SIZE, (step + 1) * SIZE)[rank * SIZE // ranks :][: SIZE // ranks]
                tokens = torch.from_numpy(own.rows)[:, None] * 10 + torch.arange(4)
                places = None if own.places is None else torch.from_numpy(own.places)
                ledger.add(step + 1, [Batch(tokens, tokens, None, ids, torch.from_numpy(own.groups), places)])
        for ledger in ledgers:
            ledger.write(ledger.take())
        if saved:
            self.step, self.drawn, self.rows = self.step + steps, drawn, self.rows + rows
        else:
            rewind_ledger(self.folder, self.step)

    @property
    def counts(self) -> dict[str, int] | None:
        """What the checkpoint has of the groups."""
        has_mixture = self.plain < self.step * SIZE
        return dict(zip(GROUPS, self.drawn.tolist(), strict=True)) if has_mixture else None

    def problems(self) -> list[str]:
        return check_ledger(self.folder, self.step, SIZE, self.counts, self.plain).problems


phase = st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from(MIXTURES), st.booleans())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.lists(phase, min_size=1, max_size=5))
def test_any_history_is_proven_and_every_row_can_be_told_from_it(plain: int, phases: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        if plain:
            run.train(plain, 2, None)
        for steps, ranks, mixture, saved in phases:
            run.train(steps, ranks, mixture, saved)
        assert run.problems() == []
        # without knowing any mixture: groups and places are enough for the rows, in the order the tokens are hashed
        sequence = SampleSequence(GROUPS, 5, True)
        sequence.plain_samples = run.plain
        found: list[list[int]] = [[] for _ in range(run.step)]
        for _, line in read_ledger(run.folder, run.step):
            if line.groups is None:
                rows = [row for places in line.places for row in sequence.plain_rows(*places).tolist()]
            else:
                names = sorted(line.groups)
                numbers = [(sequence.names.index(name), np.arange(*line.groups[name])) for name in names]
                rows = [row for number, places in numbers for row in sequence.group_rows(number, places).tolist()]
            assert tokens_hash([torch.tensor(rows)[:, None] * 10 + torch.arange(4)]) == line.tokens
            found[line.step - 1] += rows
        assert [sorted(rows) for rows in found] == [sorted(rows) for rows in run.rows]


def edit(run: Run, change: Callable[[dict], None], step: int) -> None:
    path = run.folder / "ledger" / "data-0000.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    change(next(line for line in lines if line["step"] == step))
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def moved(line: dict) -> None:
    line["groups"] = {name: [first + 1, stop + 1] for name, (first, stop) in line["groups"].items()}


def shorter(line: dict) -> None:
    first, stop = line["groups"]["maths"]
    line["groups"]["maths"] = [first, stop - 1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (moved, r"step 4: group maths: sample \d+ was read twice|step 3: group \S+: samples? \d+ .* skipped"),
        (shorter, "step 3: its groups do not have its 4 samples"),
        (lambda line: line.pop("groups"), "step 3: group|its groups|step 4: group"),
        (lambda line: line["groups"].update({"maths": [-1, 4]}), "damaged"),
    ],
)
def test_groups_that_cannot_be_true_are_named(tmp_path: Path, change: Callable, problem: str) -> None:
    run = Run(tmp_path)
    run.train(6, 2, {"weights": {"code": 1, "maths": 1}})
    assert run.problems() == []
    edit(run, change, 3)

    assert any(re.search(problem, text) for text in run.problems()), run.problems()


def test_counts_of_the_checkpoint_must_be_those_of_the_ledger(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(4, 1, None)
    run.train(4, 2, {})
    counts = run.counts
    assert counts is not None
    wrong = counts | {"maths": counts["maths"] + 1}
    assert any("group maths" in text for text in check_ledger(tmp_path, 8, SIZE, wrong, run.plain).problems)
    assert any("the groups began at" in text for text in check_ledger(tmp_path, 8, SIZE, counts, 0).problems)
    assert any("has groups although" in text for text in check_ledger(tmp_path, 8, SIZE, None, 64).problems)


def test_the_ledger_stays_small(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(6, 1, {})
    lines = (tmp_path / "ledger" / "data-0000.jsonl").read_bytes().splitlines()
    assert all(len(orjson.loads(line)["groups"]) <= 3 and len(line) < 200 for line in lines)
