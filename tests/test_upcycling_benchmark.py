"""What benchmarks/upcycling.py says must be true of its arms, and a sweep that is killed goes on."""

import multiprocessing
import os
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from growth.corpora import CLUSTERS, domain_shares, write_corpora
from growth.plan import BASELINE, BETTER_DOMAIN, Plan, Scale, Task, Tuned
from growth.results import arm_results, is_equal_flops, megabytes_sent, summary
from growth.scheduling import Sweep, SweepError
from growth.texts import PIECE, domains, pieces, write_texts
from growth.training import run_task

from lightbulb.experts.source import RunSource
from lightbulb.train.outer import SyncConfig, trunk_names

SHARES = {"code": 0.25, "reference": 0.1, "drama": 0.25, "maths": 0.2, "speeches": 0.2}
SCALE = Scale(750_000, 1_200_000)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(SCALE, Tuned(), SHARES, quick=False)


def test_every_arm_spends_the_budget_and_not_more(plan: Plan):
    assert max(is_equal_flops(plan).values()) < 0.005
    assert all(plan.flops(name) <= plan.budget * (1 + 1e-9) for name, arm in plan.arms.items() if not arm.free)


def test_flops_of_branches_count(plan: Plan):
    branches = [name for name in plan.arms["btx"].spent if name != "btx"]
    spent = sum(plan.tasks[name].flops for name in branches)
    assert len(branches) == 5 and spent == pytest.approx(plan.tuned.branch_share * plan.budget, rel=0.01)
    steps = plan.tasks["btx"].settings["steps"]
    assert plan.tasks["btx"].flops == steps * SCALE.step_tokens * plan.mixture.cost().train_flops


def test_from_scratch_has_the_seeds_flops_too(plan: Plan):
    total = plan.tasks["from_scratch"].flops
    assert total == pytest.approx(plan.budget + plan.tasks["seed"].flops, rel=0.005)


def test_better_data_is_moved_and_not_added(plan: Plan):
    before, after = (
        mixture["weights"][BETTER_DOMAIN] / sum(mixture["weights"].values())
        for mixture in plan.tasks["better_decay"].settings["mixtures"]
    )
    decay = plan.tuned.decay
    assert before * (1 - decay) + after * decay == pytest.approx(SHARES[BETTER_DOMAIN])
    assert after > before


def test_differences_are_within_a_seed(plan: Plan):
    values = {("dense", 0): 2.0, ("dense", 1): 3.0, ("sparse", 0): 1.99, ("sparse", 1): 2.97, ("seed", 0): 2.5}
    values |= {("seed", 1): 3.5, ("drop", 1): 2.9}

    def found(task: str, seed: int):
        value = values.get((task, seed))
        return None if value is None else {"bpb": value, "domain_bpb": {}}

    results = arm_results(plan, [0, 1], found)
    differences = list(results["sparse"]["difference"].values())
    assert differences == pytest.approx([-0.01, -0.03])
    line = summary(results, plan, [0, 1])
    assert line["sparse"] == pytest.approx([-0.02, statistics.stdev([-0.01, -0.03])], abs=1e-4)
    assert line[BASELINE] == pytest.approx([2.5, statistics.stdev([2.0, 3.0])], abs=1e-4)
    assert line["drop"] == pytest.approx([-0.1, 0.0])  # only the seed on which both are done
    assert "btx" not in line and line["sparse_by_seed"] == pytest.approx([-0.01, -0.03])


def test_bytes_sent_are_the_trunk_at_every_meeting(plan: Plan):
    task = "sync_8/branches"
    names = dict(plan.model(task).build().named_parameters())
    trunk = sum(names[name].numel() for name in trunk_names(names, SyncConfig(every=1).local))
    assert plan.trunk(task) == trunk
    meetings = plan.tasks[task].settings["steps"] // 8
    finetuning = plan.mixture.cost().params * plan.tasks["sync_8"].settings["steps"]
    expected = (trunk * meetings + finetuning) * 4 * 2 * 4 / 5 / 1e6
    assert megabytes_sent(plan, "sync_8") == pytest.approx(expected)
    assert megabytes_sent(plan, "cbtm_ensemble") == 0
    assert megabytes_sent(plan, "btx_centroid") == pytest.approx(finetuning * 4 * 2 * 4 / 5 / 1e6)


def test_a_changed_setting_changes_what_depends_on_it_only(plan: Plan):
    other = Plan(SCALE, replace(Tuned(), moe_lr=1e-3), SHARES, quick=False)
    before, after = plan.keys(0, "text"), other.keys(0, "text")
    same = {name for name in before if before[name] == after[name]}
    assert {"seed", "dense", "half/0", "sync_1/branches", "final/ensemble"} <= same
    assert not {"sparse", "btx", "sync_1", "from_scratch"} & same
    assert not set(before.values()) & set(plan.keys(1, "text").values())
    assert not set(before.values()) & set(plan.keys(0, "other text").values())


def test_the_quick_plan_has_the_arms_of_the_json_line():
    quick = Plan(Scale(300_000, 480_000), Tuned(), SHARES, quick=True)
    wanted = {"seed", BASELINE, "cbtm_ensemble", "sparse", "drop", "btx", "btx_moa", "from_scratch"}
    assert wanted | {quick.shown_sync()} <= set(quick.arms)
    assert max(is_equal_flops(quick).values()) < 0.01


def test_pieces_are_the_text_and_carry_their_documents_name(tmp_path: Path):
    text = "".join(f"line {number}\n" for number in range(2_000))
    parts = list(pieces(text))
    assert "".join(parts) == text and all(len(part) < PIECE + 20 for part in parts)
    sizes = write_texts(None, tmp_path, 60_000)
    assert set(sizes) == {path.stem for path in tmp_path.glob("*.jsonl")} and len(sizes) == 5
    assert all(0 < size < 70_000 for size in sizes.values())


def test_a_missing_corpus_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no tinyshakespeare.txt"):
        domains(tmp_path)


TASKS = {
    name: Task(name, "train", {}, needs)
    for name, needs in {"a": (), "b": ("a",), "c": ("b",), "d": ("c",), "e": ("a",)}.items()
}
KEYS = {0: {name: f"key-{name}" for name in TASKS}}


def note(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> dict[str, float]:
    """A task that leaves a line and takes a while."""
    with (work / "done.txt").open("a") as file:
        file.write(f"{task.name}\n")
    time.sleep(0.3)
    return {"bpb": 1.0, "seconds": 0.3, "cpu_seconds": 0.0}


def fail(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> dict[str, float]:
    raise ValueError("no such thing")


def sweep_apart(work: Path) -> None:
    Sweep(work, note, 1).complete(TASKS, KEYS, ["d", "e"])


def test_a_killed_sweep_goes_on_and_repeats_nothing_that_was_done(tmp_path: Path):
    child = multiprocessing.get_context("fork").Process(target=sweep_apart, args=(tmp_path,))
    child.start()
    deadline = time.time() + 30
    while not (tmp_path / "results" / "key-b.json").is_file() and time.time() < deadline:
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    finished = {path.stem for path in (tmp_path / "results").glob("*.json")}
    assert {"key-a", "key-b"} <= finished < {f"key-{name}" for name in TASKS}
    sweep = Sweep(tmp_path, note, 2)
    sweep.complete(TASKS, KEYS, ["d", "e"])
    lines = (tmp_path / "done.txt").read_text().split()
    assert set(lines) == set(TASKS)
    assert all(lines.count(key.removeprefix("key-")) == 1 for key in finished)
    assert lines.index("a") < lines.index("b") < lines.index("c") < lines.index("d")
    sweep.complete(TASKS, KEYS, ["d", "e"])
    assert (tmp_path / "done.txt").read_text().split() == lines


def test_a_task_that_fails_is_named_with_its_log(tmp_path: Path):
    with pytest.raises(SweepError, match=r"a, seed 0: ValueError: no such thing; see .*key-a.log"):
        Sweep(tmp_path, fail, 1).complete(TASKS, KEYS, ["e"])


@pytest.mark.slow
def test_branches_that_never_meet_are_separate_branches(tmp_path: Path):
    corpus = write_corpora(None, tmp_path, 60_000)
    small = Plan(Scale(8_192, 60_000), Tuned(), domain_shares(corpus), quick=True)
    synced = small.tasks["sync_1/branches"]
    apart = replace(synced, name="apart", settings=synced.settings | {"sync": {"every": 1_000_000}})
    tasks = {name: small.tasks[name] for name in ("seed", *(f"half/{number}" for number in range(CLUSTERS)))}
    keys = {0: {name: name.replace("/", "-") for name in (*tasks, "apart")}}
    sweep = Sweep(tmp_path, run_task, 1)
    sweep.complete(tasks | {"apart": apart}, keys, [*tasks, "apart"])
    folders = sweep.folders(0, keys[0])
    for number in range(CLUSTERS):
        alone, together = RunSource(folders[f"half/{number}"]), RunSource(folders["apart"] / str(number))
        assert all(torch.equal(alone.read(name), together.read(name)) for name in alone.names())
