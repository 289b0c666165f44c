"""The choice of degrees: sizes against the built model, the order of preference, what cannot fit."""

from pathlib import Path

import pytest
from training_runs import write_run_file

from lightbulb.config import load_config
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.planning.layout import FIXED_BYTES, USABLE, candidates, choose_layout, estimate, parameter_table
from lightbulb.planning.report import plan
from lightbulb.train.config import RunConfig

GIB = 1 << 30
BIG = {
    "vocab_size": 32_000, "dim": 2048, "num_layers": 16, "context_length": 2048,
    "block_pattern": [{
        "token": {"type": "attention", "num_heads": 16, "num_kv_heads": 8},
        "channel": {"type": "switch", "num_experts": 8, "hidden_dim": 4096},
    }],
}  # fmt: skip
TRAIN = {"steps": 10, "global_batch_size": 64, "micro_batch_size": 1}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return load_config(RunConfig, write_run_file(tmp_path, tmp_path, model=BIG, train=TRAIN))


def test_the_table_counts_every_parameter(run: RunConfig) -> None:
    table = parameter_table(run.model)
    assert sum(shape.size for shape in table) == run.model.cost().params
    experts = sum(shape.size for shape in table if shape.is_expert)
    assert experts == 16 * 8 * 3 * 2048 * 4096


def test_learned_positions_are_on_the_first_stage(run: RunConfig) -> None:
    """Which is the fullest here: the cut gives the last one fewer layers, because of the head."""
    learned = run.model_copy(update={"model": run.model.model_copy(update={"learned_positions": True})})
    before, after = (estimate(r, ParallelConfig(pipeline=2), True, parameter_table(r.model)) for r in (run, learned))
    assert after.weights - before.weights == 2 * 2048 * 2048


def test_one_rank_holds_weights_gradients_and_state_of_everything(run: RunConfig) -> None:
    parallel = next(candidates(run, 1, 1))
    memory = estimate(run, parallel, True, parameter_table(run.model))
    params = run.model.cost().params
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * params, 4 * params, 12 * params)
    assert memory.total == sum(memory) + FIXED_BYTES


def test_every_axis_takes_its_share(run: RunConfig) -> None:
    table = parameter_table(run.model)
    by_label = {parallel.label(): estimate(run, parallel, True, table) for parallel in candidates(run, 8, 8)}
    assert list(by_label)[:4] == ["TP1xPP1xEP1xDP8", "TP1xPP1xEP2xDP8", "TP1xPP1xEP4xDP8", "TP1xPP1xEP8xDP8"]
    plain = by_label["TP1xPP1xEP1xDP8"]
    assert plain.optimizer == pytest.approx(plain.weights / 2 * 12 / 8)
    assert by_label["TP1xPP1xEP8xDP8"].weights < plain.weights / 3
    assert by_label["TP8xPP1xEP1xDP1"].weights == pytest.approx(plain.weights / 8, rel=0.02)
    assert by_label["TP1xPP8xEP1xDP1"].weights < plain.weights / 5
    assert by_label["TP8xPP1xEP1xDP1"].activations < plain.activations / 2


def test_data_parallelism_comes_first_and_memory_forces_the_rest(run: RunConfig) -> None:
    labels = []
    for gib in (80, 24, 12):
        choice = choose_layout(run, 8, 4, gib * GIB, bf16=True)
        assert choice is not None and choice.fits
        assert choice.memory.total <= USABLE * gib * GIB
        labels.append(choice.parallel.label())
    assert labels == ["TP1xPP1xEP1xDP8", "TP1xPP1xEP2xDP8", "TP2xPP1xEP4xDP4"]


def test_tensor_parallelism_stays_within_a_machine(run: RunConfig) -> None:
    assert max(parallel.tensor for parallel in candidates(run, 8, 4)) == 4
    assert max(parallel.tensor for parallel in candidates(run, 8, 8)) == 8


def test_what_does_not_fit_says_what_it_needs(run: RunConfig, tmp_path: Path) -> None:
    choice = choose_layout(run, 2, 2, 4 * GIB, bf16=True)
    assert choice is not None and not choice.fits and choice.rejected
    report = plan(str(tmp_path / "run.yaml"), 2, 2, 4.0)
    assert not report["fits"] and "use more ranks" in report["reason"]
    assert (
        plan(str(tmp_path / "run.yaml"), 8, 8, 200.0)["lines"][-1] == "  parallel: {tensor: 1, pipeline: 1, expert: 1}"
    )


def test_ranks_that_no_layout_can_use(tmp_path: Path) -> None:
    write_run_file(tmp_path, tmp_path)
    report = plan(str(tmp_path / "run.yaml"), 7, 7, 8.0)
    assert not report["fits"] and "no layout splits" in report["reason"]
