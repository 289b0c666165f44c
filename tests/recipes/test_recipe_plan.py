"""Recipes' configs and plans: everything checked before anything runs, and the same FLOPs for every arm."""

import re
from pathlib import Path

import pytest
import yaml

from lightbulb.config import ConfigError, read_yaml
from lightbulb.launcher.cli import COMMANDS
from lightbulb.recipes.accounts import seconds_by_stage
from lightbulb.recipes.config import load_recipe
from lightbulb.recipes.cost_table import Machine, cost_table, short, size
from lightbulb.recipes.engine import Record, changes
from lightbulb.recipes.plan import Plan, flops_per_token, tokens_per_step
from lightbulb.recipes.stages import stages_of
from lightbulb.train.schedule import decay_start, learning_rate_factor

EXPERTS = Path(__file__).parents[2] / "configs" / "experts"
QUICK, LARGE = EXPERTS / "cbtx-quick.yaml", EXPERTS / "voltron-13b-recipe.yaml"


def plan(*overrides: str, path: Path = QUICK) -> Plan:
    return Plan(load_recipe(path, overrides))


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_every_arm_spends_the_same(budget, share):
    made = plan(f"budget={budget}", f"branch.share={share}")
    mixture = made.branch.flops + made.tune.flops + made.decay.flops
    step = tokens_per_step(made.recipe.seed) * flops_per_token(made.recipe.seed)
    assert abs(made.dense.flops - mixture) <= step  # whole steps
    assert abs(mixture - made.budget) <= 2 * step
    assert made.budget == pytest.approx(budget * made.seed.flops)
    branch_step = 4 * tokens_per_step(made.branch.config) * made.branch.flops_per_token
    assert abs(made.branch.flops - share * made.budget) <= branch_step / 2
    assert made.decay.flops == pytest.approx(made.recipe.decay.share * made.budget, rel=0.01)


def test_flops_are_those_of_the_models():
    made = plan()
    assert made.seed.flops == made.recipe.seed.model.cost().train_flops * 256 * 8 * made.recipe.seed.train.steps
    assert made.branch.tokens == 4 * made.branch.steps * tokens_per_step(made.branch.config)
    assert made.tune.config.model.cost().train_flops > made.seed.config.model.cost().train_flops
    routers = plan("tune.train.trainable=routers")
    assert flops_per_token(routers.tune.config) < flops_per_token(made.tune.config)
    assert routers.tune.flops == pytest.approx(made.tune.flops, rel=0.01)  # cheaper tokens, so more of them


def test_forks_keep_the_learning_rate_until_their_decay():
    made = plan("decay.schedule.shape=one_minus_sqrt", "tune.schedule.warmup=0.1")
    for training, parent in ((made.decay, made.tune.config), (made.dense, made.seed.config)):
        schedule, steps = training.config.schedule, training.config.train.steps
        for step in range(training.first_step):
            before = learning_rate_factor(parent.schedule, step, parent.train.steps)
            assert learning_rate_factor(schedule, step, steps) == pytest.approx(before)
        assert learning_rate_factor(schedule, steps - 1, steps) == pytest.approx(0, abs=1e-6)
        assert schedule.shape == "one_minus_sqrt"
    assert decay_start(made.decay.config.schedule, made.decay.config.train.steps) == made.tune.steps
    assert decay_start(made.dense.config.schedule, made.dense.config.train.steps) > made.seed.steps


def test_better_data_in_the_decay_is_for_both_arms():
    made = plan('decay.mixture={weights: {"*": 1, pydoc: 3}}')
    for training in (made.decay, made.dense):
        (stage,) = training.config.data.stages
        start = decay_start(training.config.schedule, training.config.train.steps)
        assert stage.start == start
        assert stage.mixture.weights == {"*": 1, "pydoc": 3}
    assert not made.tune.config.data.stages


def test_another_batch_in_the_decay_begins_with_it_in_both_arms():
    made, same = plan("decay.train.global_batch_size=16"), plan()
    for training, before in ((made.decay, same.decay), (made.dense, same.dense)):
        steps, sizes = training.config.train.steps, training.config.batch_sizes()
        start = decay_start(training.config.schedule, steps)
        assert [sizes.of_step(step) for step in (0, start - 1, start, steps - 1)] == [8, 8, 16, 16]
        assert training.flops == pytest.approx(before.flops, rel=0.01)
        assert training.steps < before.steps


def test_stages_of_the_seed_are_its_own():
    """What goes on from it takes the batch and the mixture of its end, and its tokens are counted as they are."""
    rare = {"weights": {"pydoc": 1.0}}
    made = plan(
        "seed.train.batch_stages=[{start: 100, global_batch_size: 16}]",
        "seed.data.stages=[{start: 100, mixture: {weights: {pydoc: 1}}}]",
    )
    assert made.seed.tokens == 256 * (100 * 8 + 1200 * 16)
    assert made.seed.tokens_until(101) == 256 * (100 * 8 + 16)
    for training in (made.branch, made.tune, made.decay):
        assert (training.config.train.global_batch_size, training.config.train.batch_stages) == (16, ())
        assert training.tokens == training.runs * training.steps * 16 * 256
        assert [mixture.model_dump()["weights"] for _, mixture in training.config.mixtures()] == [rare["weights"]]
    assert made.dense.config.train.batch_stages == made.seed.config.train.batch_stages
    assert made.dense.config.data.stages == made.seed.config.data.stages
    assert made.dense.tokens == made.dense.steps * 16 * 256


@pytest.mark.parametrize("moments", ["keep", "zero"])
def test_moments_of_the_mixture_are_taken_where_it_keeps_them(moments):
    made = plan(f"mix.moments={moments}")
    assert made.tune.config.start_from == str(made.upcycle.run)
    assert made.tune.config.start_from_moments == (moments == "keep")
    assert not made.decay.config.start_from_moments  # a fork: it has them anyway
    ratio = 3 if moments == "keep" else 1
    cells = [list(column.cells) for column in cost_table(made, Machine(0.4, 989e12)).columns]
    assert cells[7][cells[0].index("mix")] == size(ratio * 4 * made.tune.cost.params)


def test_a_seed_that_goes_on_from_another_run():
    made = plan("seed.start_from=runs/other", "seed.start_from_moments=true", "mix.moments=zero")
    made.check()
    assert made.seed.config.start_from_moments
    for training in (made.branch, made.tune, made.decay, made.dense):
        assert not training.config.start_from_moments


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("branch.shares=1", "branch: unknown key 'shares', did you mean 'share'"),
        ("corpus.cluster=null", "corpus.cluster: there is one branch for each cluster"),
        ("corpus.cluster.num_clusters=1", "a mixture needs 2"),
        ("corpus.context_length=128", "seed.model.context_length 256 is not the corpus's 128"),
        ("branch.share=0.8", r"branch.share 0.8 \+ decay.share 0.4 leave nothing for tune"),
        ("seed.schedule.decay=0.1", "branches start before the decay; set 0"),
        ("seed.run=runs/other", "seed.run 'runs/other' follows from the recipe"),
        ("tune.train.steps=9", "tune: train.steps follows from the budget"),
        ("mix.sources=[]", "mix.sources follows from the recipe"),
        ("mix.router.top_k=8", "mix: config: router.top_k 8 exceeds the 4 experts"),
        ("mix.metod=btx", "mix: config: unknown key 'metod'"),
        ("budget=0.0001", "branch.share: leaves 0.00 steps for branches"),
        ("tune.optimizer.lrr=1", "tune: optimizer: unknown key 'lrr'"),
        ("branch.jobs.at_onc=1", "branch.jobs: unknown key 'at_onc'"),
        ("corpus.tokenizer.vocab_size=9000", "corpus.tokenizer.vocab_size 9000 exceeds seed.model.vocab_size 4096"),
        ("tune.schedule.decay=0.2", "tune: schedule.decay 0.2: the decay is a stage of its own"),
        ("decay.schedule.decay=0.2", "decay: schedule.decay follows from the share"),
        ("decay.train.trainable=routers", "decay: train.trainable stays what it was while the mixture was tuned"),
        ("branch.train.batch_stages=[]", "branch: train.batch_stages: steps follow from one batch"),
        ("decay.train.global_batch_size=12", "decay: .*train.global_batch_size 12 is not a multiple"),
        (
            "seed.train.batch_stages=[{start: 0.1, global_batch_size: 16}]",
            "batch_stages.0.start 0.1: what goes on",
        ),
        (
            "seed.data.stages=[{start: decay, mixture: {}}]",
            "data.stages.0.start 'decay': what goes on from the",
        ),
    ],
)
def test_what_cannot_be_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        plan(override).check()


def test_a_section_may_change_a_file(tmp_path):
    made = plan(path=LARGE)
    assert made.recipe.seed.model.dim == 5120
    assert made.recipe.seed.schedule.decay == 0.0
    assert made.recipe.seed.run == "runs/voltron-13b/seed"
    assert made.recipe.corpus.output == Path("runs/voltron-13b/corpus")
    values = read_yaml(QUICK)
    (tmp_path / "seed.yaml").write_text(yaml.safe_dump(values["seed"] | {"run": "elsewhere", "data": {"path": "x"}}))
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(values["corpus"] | {"output": "elsewhere"}))
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(values | {"seed": "seed.yaml", "corpus": {"base": "corpus.yaml", "seed": 3}})
    )
    found = load_recipe(tmp_path / "recipe.yaml", ["seed.train.steps=7"])
    assert found.corpus.seed == 3
    expected = load_recipe(QUICK, ["seed.train.steps=7", "corpus.seed=3"])
    assert found == expected


def test_the_large_recipe_grows_eight_experts_with_attention():
    made = plan(path=LARGE)
    made.check()
    assert made.upcycle.method == "btx+moa"
    assert made.upcycle.experts == 8
    assert made.tune.config.model.cost().params == pytest.approx(92.45e9, rel=1e-3)
    text = LARGE.read_text()
    for training in made.trainings:  # the table in its first lines
        row = re.search(rf"^#.* {training.name} .*? ([\d.]+) ([BT])\b.* ([\d.]+e\d+)", text, re.MULTILINE)
        assert float(row[1]) * {"B": 1e9, "T": 1e12}[row[2]] == pytest.approx(training.tokens, rel=0.01)
        assert float(row[3]) == pytest.approx(training.flops, rel=0.01)
    assert made.decay.config.data.stages
    made.tune.config.resolve(1024)
    made.seed.config.resolve(1024)
    for run in (made.branch.config,):
        run.resolve(128)


@pytest.mark.parametrize("path", [QUICK, LARGE], ids=lambda path: path.stem)
def test_the_table_of_costs(path):
    made = plan(path=path)
    table = cost_table(made, Machine(0.4, 989e12))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][: len(made.trainings)] and "mixture's arm" in cells[0]
    seed = cells[0].index("seed")
    hours = made.seed.flops / (0.4 * 989e12) / 3600
    assert float(cells[-1][seed].replace(",", "")) == pytest.approx(hours, rel=1e-3)
    assert cells[7][seed] == size(12 * made.seed.config.model.cost().params)
    assert cells[5][cells[0].index("mix")] == short(made.tune.config.model.cost().params)


@pytest.mark.parametrize("missing", ["model.norm", "model.block_pattern.0.token.bias", "train.trainable"])
def test_a_seed_of_an_older_version_is_not_trained_again(missing):
    stage = next(stage for stage in stages_of(plan()) if stage.name == "seed")
    now = Record(settings=stage.settings, inputs={})
    older = Record(settings={key: value for key, value in stage.settings.items() if key != missing}, inputs={})
    assert missing in stage.settings and changes(older, now) and not changes(older, now, stage.defaults)


def test_times_are_of_stages_that_are_on(tmp_path):
    (tmp_path / "stages").mkdir()
    for name in ("seed", "dense"):
        record = Record(settings={}, inputs={}, output="0", seconds=2.0, finished=f"2026-01-01 {len(name)}")
        (tmp_path / f"stages/{name}.json").write_text(record.model_dump_json())
    assert seconds_by_stage(plan(f"run={tmp_path}")) == {"seed": 2.0, "dense": 2.0}
    assert seconds_by_stage(plan(f"run={tmp_path}", "baselines.dense=false")) == {"seed": 2.0}


def test_units():
    assert [short(n) for n in (7, 1500, 2.5e6, 9.245e10, 1.05e12)] == ["7", "1.5 k", "2.5 M", "92.45 B", "1.05 T"]
    assert [size(n) for n in (5e5, 3.2e9, 1.109e12)] == ["0.5 MB", "3.2 GB", "1.109 TB"]


def test_commands_of_the_documentation_are_commands():
    text = (EXPERTS.parents[1] / "docs" / "recipe.md").read_text()
    lines = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("lightbulb ")]
    assert len(lines) > 8
    for _, name, *arguments in lines:
        assert name in COMMANDS
        for argument in arguments:
            if argument.startswith("configs/"):
                assert (EXPERTS.parents[1] / argument).is_file(), argument
        if name == "recipe":
            path, *rest = (argument for argument in arguments if not argument.startswith("--") and "/" in argument)
            overrides = [argument for argument in arguments if "=" in argument]
            assert rest == [argument for argument in overrides if "/" in argument]
            plan(*overrides, path=EXPERTS.parents[1] / path)
