"""What `--restart` decides: ranks and degrees of the next start, the launcher's command, an exit code in words."""

from pathlib import Path

import pytest
from training_runs import write_run_file

from lightbulb.config import load_config
from lightbulb.train.config import RunConfig
from lightbulb.train.restart import Job, command, degrees_for, describe_exit, fewer_ranks, newest_step


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Batches of 8 x 2 contexts, tensor 2, expert 4 of 4 experts."""
    path = write_run_file(tmp_path, tmp_path, parallel={"tensor": 2, "expert": 4, "data": 4})
    return load_config(RunConfig, path)


def test_tensor_stays_and_the_largest_expert_degree_that_fits_is_taken(config: RunConfig) -> None:
    assert degrees_for(config, 8) == ["parallel.data=null", "parallel.expert=4"]
    assert degrees_for(config, 4) == ["parallel.data=null", "parallel.expert=2"]
    assert degrees_for(config, 2) == ["parallel.data=null", "parallel.expert=1"]
    assert degrees_for(config, 6) is None  # 3 data ranks do not divide the global batch
    assert degrees_for(config, 1) is None  # tensor 2


def test_ranks_are_given_up_only_without_progress_and_down_to_the_minimum(config: RunConfig) -> None:
    assert fewer_ranks(config, 8, 2, progressed=True) == 8
    assert fewer_ranks(config, 8, 2, progressed=False) == 4
    assert fewer_ranks(config, 2, 2, progressed=False) == 2
    assert fewer_ranks(config, 8, 8, progressed=False) == 8


def test_the_command_keeps_the_config_as_it_is_until_ranks_are_given_up(config: RunConfig, tmp_path: Path) -> None:
    job = Job(Path("pretrain.py"), ["run.yaml", "train.steps=5"], 8, 2, 3)
    whole = command(job, config, 8, tmp_path / "outcome")
    assert whole[1:4] == ["-m", "deepspeed.launcher.runner", "--num_gpus=8"]
    assert whole[-4:] == ["pretrain.py", "run.yaml", "train.steps=5", f"--outcome={tmp_path / 'outcome'}"]
    assert command(job, config, 4, tmp_path)[-3:-1] == ["parallel.data=null", "parallel.expert=2"]
    several = command(job._replace(hostfile=Path("hosts")), config, 8, tmp_path)
    assert "--hostfile=hosts" in several and not any(word.startswith("--num_gpus") for word in several)


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name, is_complete in (("step-00000003", True), ("step-00000010", True), ("step-00000020", False)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if is_complete:
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_step(tmp_path) == 10


@pytest.mark.parametrize(
    ("code", "words"),
    [(247, "SIGKILL"), (-9, "SIGKILL"), (1, "exit code 1"), (75, "exit code 75"), (0, "ended before its ranks")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)
