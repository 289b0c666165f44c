"""The pretrain command as users run it: interrupted, resumed, on other layouts, with bad input."""

import pytest
from training_runs import STEPS, losses


def test_resuming_on_other_layouts_continues_the_same_losses(start, run_file, tmp_path):
    # The schedule counts fractions of all steps, so parts of a run need a constant learning rate.
    constant = ["schedule.decay=0", "schedule.warmup=0"]
    whole = start("pretrain", [str(run_file("whole")), *constant])
    assert whole.wait() == 0, whole.text()
    path = run_file("moved")
    for axis, steps in (("tensor", 4), ("pipeline", 8), ("expert", STEPS)):
        command = start("pretrain", [str(path), *constant, f"train.steps={steps}", f"parallel.{axis}=2"], world_size=2)
        assert command.wait() == 0, command.text()
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert sorted(found) == sorted(expected)
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (["train.stepz=3"], 1, ["unknown key 'stepz'", "did you mean 'steps'"]),
        (["model.dim=wide"], 1, ["model.dim", "wide"]),
        (["parallel.data=3"], 2, ["parallel", "data 3", "2 were started"]),
        (["parallel.tensor=4", "parallel.data=1"], 1, ["needs 4 processes"]),
        (["train.global_batch_size=9", "train.micro_batch_size=3"], 2, ["global_batch_size 9", "multiple of 6"]),
        (["model.vocab_size=100"], 1, ["vocab", "512"]),
        (["model.context_length=64"], 1, ["context_length"]),
        (["model.block_pattern.0.channel.num_experts=3", "parallel.expert=2"], 2, ["num_experts 3", "divisor"]),
        (["model.block_pattern.0.token.num_kv_heads=1", "parallel.tensor=2"], 2, ["num_kv_heads 1", "multiple of 2"]),
        (["data.path=/nonexistent/corpus"], 1, ["/nonexistent/corpus", "preprocess"]),
        (["train.global_batch_size=100000", "train.micro_batch_size=1000"], 1, ["too few tokens"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_clear_sentence(start, run_file, overrides, world_size, words):
    command = start("pretrain", [str(run_file()), *overrides], world_size=world_size)
    assert command.wait() == 1, command.text()
    assert "Traceback" not in command.text()
    for word in words:
        assert word in command.text()


def test_a_run_folder_on_a_full_disk_says_so_before_training(start, run_file):
    command = start("pretrain", [str(run_file()), "run=/dev/full/run"])
    assert command.wait() == 1
    assert "/dev/full" in command.text()
    assert "Traceback" not in command.text()
