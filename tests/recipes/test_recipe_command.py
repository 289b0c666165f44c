"""`lightbulb recipe` for real, in small: killed at every place, started again, changed."""

import random
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from training_runs import reached, wait_for

from lightbulb.config import ConfigError
from lightbulb.data.config import DataError
from lightbulb.recipes.arms import DENSE, ENSEMBLE, MIXTURE, SEED
from lightbulb.recipes.config import load_recipe
from lightbulb.recipes.engine import run_stages
from lightbulb.recipes.plan import Plan, tokens_per_step
from lightbulb.recipes.report import PICTURES
from lightbulb.recipes.stages import run_recipe, stages_of

STAGES = ["prepare", "seed", "branch", "mix", "tune", "decay", "dense", "evaluate", "report"]
WORDS = [["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], ["one", "two", "three", "four", "five", "six"]]
SECONDS = 900.0


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two kinds of text, and a recipe of two branches for them; the run goes to ``tmp_path/run``."""
    generator = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(60):
        words = [generator.choice(WORDS[number % 2]) for _ in range(250)]
        (tmp_path / "text" / f"{number:02}.txt").write_text(" ".join(words))
    block = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "mlp", "hidden_dim": 32}}
    model = {"vocab_size": 300, "dim": 32, "num_layers": 2, "context_length": 64, "block_pattern": [block]}
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "corpus": {
            "context_length": 64,
            "held_out_fraction": 0.2,
            "sources": [{"type": "text", "path": str(tmp_path / "text"), "domain": "words"}],
            "tokenizer": {"vocab_size": 300},
            "embed": {"dimensions": 4},
            "cluster": {"num_clusters": 2},
            "executor": {"workers": 1},
        },
        "seed": {
            "model": model,
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup": 0.1, "decay": 0.0},
            "train": {"steps": 24, "global_batch_size": 4, "micro_batch_size": 4, "save_every": 2},
        },
        "budget": 1.0,
        "branch": {"share": 0.3, "sync": {"every": 2}},
        "decay": {"share": 0.3, "mixture": {"weights": {"words/cluster-00": 1, "words/cluster-01": 2}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def done(run: Path) -> list[str]:
    """Stages with an output, in their order."""
    records = {path.stem: orjson.loads(path.read_bytes()) for path in (run / "stages").glob("*.json")}
    return [name for name in STAGES if records.get(name, {}).get("output")]


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_end(recipe, tmp_path, start):
    run, whole = tmp_path / "run", tmp_path / "whole"
    stable = Plan(load_recipe(recipe)).tune.steps
    places = {
        "while the seed trains": lambda: reached(run / "seed", 5),
        "between two stages": lambda: "seed" in done(run),
        "while branches train": lambda: reached(run / "branches/branch-0", 2),
        "before the mixture is tuned": lambda: "mix" in done(run),
        "in the decay": lambda: reached(run / "decay", stable + 1),
        "before the report": lambda: "evaluate" in done(run),
    }
    for there in places.values():
        command = start("recipe", [str(recipe)])
        wait_for(lambda here=there, its=command: here() or its.processes[0].exitcode is not None, SECONDS)
        command.processes[0].kill()  # the system sends its runs SIGTERM: they save and stop
        command.processes[0].join()
    before = done(run)
    assert before == STAGES[:8]
    command = start("recipe", [str(recipe)])
    assert command.wait(SECONDS) == 0, command.text()
    assert command.text().count("done already") == 8
    assert not (run / "replaced").exists()

    uninterrupted = start("recipe", [str(recipe), f"run={whole}"])
    assert uninterrupted.wait(SECONDS) == 0, uninterrupted.text()
    found, expected = (orjson.loads((folder / "summary.json").read_bytes()) for folder in (run, whole))
    for summary in (found, expected):
        del summary["seconds_by_stage"]
    assert found == expected
    _check_summary(found, Plan(load_recipe(recipe)))
    _check_page(run)

    other = start("recipe", [str(recipe), "decay.schedule.shape=one_minus_sqrt"])
    assert other.wait(SECONDS) == 0, other.text()
    assert "schedule.shape was 'linear', is 'one_minus_sqrt'" in other.text()
    assert other.text().count("done already") == 5
    assert sorted(path.name for path in (run / "replaced").iterdir()) == [
        "decay-1",
        "dense-1",
        "evaluate-1",
        "report-1",
    ]
    assert orjson.loads((run / "summary.json").read_bytes())["moe_bpb"] != found["moe_bpb"]
    assert orjson.loads((run / "replaced/report-1/summary.json").read_bytes())["moe_bpb"] == found["moe_bpb"]


def _check_summary(summary: dict[str, Any], plan: Plan) -> None:
    """Bits per byte of four arms, and FLOPs that are equal up to a step."""
    bits = {name: summary[f"{name}_bpb"] for name in (SEED, DENSE, ENSEMBLE, MIXTURE)}
    assert all(0 < value < bits[SEED] for name, value in bits.items() if name != SEED)
    flops, step = summary["total_flops"], tokens_per_step(plan.recipe.seed) * plan.seed.flops_per_token
    assert abs(flops[DENSE] - flops[MIXTURE]) <= step
    assert flops[ENSEMBLE] == pytest.approx(plan.seed.flops + plan.branch.flops)
    assert flops[SEED] == pytest.approx(plan.seed.flops)
    assert summary["tokens_by_stage"] == {training.name: training.tokens for training in plan.trainings}
    assert summary["inference_flops_per_token"][ENSEMBLE] == 2 * summary["inference_flops_per_token"][SEED]
    assert {"cluster-00"} <= summary["cluster_bpb"][MIXTURE].keys() <= {"cluster-00", "cluster-01"}  # held out, few


def _check_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    for name in PICTURES:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    for word in ("mixture of experts", "continued dense", "ensemble of branches", "cluster-00", "tune"):
        assert word in page


def test_it_refuses_before_anything_is_written(recipe, tmp_path, start):
    for argument, message in {
        "budget=0.01": "branch.share: leaves",
        "corpus.cluster=null": "corpus.cluster: there is one branch for each cluster",
        f"run={recipe.parent / 'text'}": "holds something that is no recipe's",
    }.items():
        command = start("recipe", [str(recipe), argument])
        assert command.wait() == 1
        assert message in command.text()
    assert not (tmp_path / "run").exists()


def test_the_plan_is_printed_and_nothing_is_done(recipe, tmp_path, start):
    command = start("recipe", [str(recipe), "--plan", "--tflops", "0.1"])
    assert command.wait() == 0, command.text()
    for name in ("seed", "branch", "mix", "tune", "decay", "dense", "mixture's arm"):
        assert name in command.text()
    assert not (tmp_path / "run").exists()


def test_machines_that_are_not_named_are_missed_before_anything_is_written(recipe, tmp_path):
    plan = Plan(load_recipe(recipe, [f"branch.jobs.hostfiles=[{tmp_path / 'group-0'}]"]))
    with pytest.raises(ConfigError, match=r"branch.jobs.hostfiles: .*group-0 is no file"):
        run_recipe(plan)
    assert not (tmp_path / "run").exists()


def test_settings_that_change_no_result_redo_nothing(recipe):
    """By what a record of each stage holds."""

    def recorded(*overrides: str) -> dict[str, dict[str, Any]]:
        return {stage.name: dict(stage.settings) for stage in stages_of(Plan(load_recipe(recipe, overrides)))}

    free = ["branch.train.save_every=1", "branch.parallel.recompute=full", "branch.sync.wait_seconds=9"]
    free += ["tune.train.save_every=3", "decay.parallel.recompute=full", "jobs.restarts=2", "branch.jobs.at_once=2"]
    assert recorded(*free) == recorded()
    for override, stages in {
        "branch.optimizer.lr=0.1": {"branch"},
        "branch.sync.every=1": {"branch"},
        "mix.moments=keep": {"mix"},
        "tune.schedule.warmup=0.3": {"tune", "decay"},
    }.items():
        changed = recorded(override)
        assert {name for name, settings in recorded().items() if changed[name] != settings} == stages


def test_a_corpus_that_others_use_too_is_taken_or_refused_but_never_replaced(recipe, tmp_path):
    shared = f"corpus.output={tmp_path / 'shared'}"
    first, second, other = (
        Plan(load_recipe(recipe, [shared, f"run={tmp_path / name}", f"corpus.seed={seed}"]))
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    )
    made = run_stages(first.recipe.run, stages_of(first)[:1])["prepare"].output
    manifest = (tmp_path / "shared/manifest.json").read_bytes()
    assert run_stages(second.recipe.run, stages_of(second)[:1])["prepare"].output == made
    with pytest.raises(ConfigError, match=r"corpus.output: .*shared holds a corpus of other settings"):
        run_stages(other.recipe.run, stages_of(other)[:1])
    assert (tmp_path / "shared/manifest.json").read_bytes() == manifest
    late = Plan(load_recipe(recipe, [shared, f"run={tmp_path / 'second'}", "decay.mixture={weights: {wrods: 1}}"]))
    with pytest.raises(DataError, match="'wrods'"):  # of the decay, before the seed is trained
        run_stages(late.recipe.run, stages_of(late)[:2])
    assert not (tmp_path / "second/seed").exists()
