"""The pretrain command as users run it: interrupted, resumed, on other layouts, with bad input."""

import random
import resource
import signal

import pytest
import yaml
from runs import STEPS, final_hashes, losses, reached, wait_for


def test_killed_runs_resume_bit_for_bit(start, run_file, tmp_path):
    reference = start("pretrain", [str(run_file("reference"))], world_size=2)
    assert reference.wait() == 0, reference.text()
    expected = losses(tmp_path / "reference")
    assert sorted(expected) == list(range(1, STEPS + 1))
    for seed in range(3):
        run, during_save = tmp_path / f"killed-{seed}", seed == 0
        path = run_file(run.name)
        step = random.Random(seed).randint(4, STEPS - 2)
        environment = {"LIGHTBULB_FAULT": "sleep:point=save:seconds=1"} if during_save else {}
        command = start("pretrain", [str(path)], world_size=2, **environment)
        if during_save:
            wait_for(lambda run=run: (run / "checkpoints" / ".step-00000006.partial").exists())
        else:
            wait_for(lambda run=run, step=step: reached(run, step))
        command.kill()
        resumed = start("pretrain", [str(path)], world_size=2)
        assert resumed.wait() == 0, resumed.text()
        assert "resumed from" in resumed.text()
        assert losses(run) == expected
        assert final_hashes(run) == final_hashes(tmp_path / "reference")
        assert not list((run / "checkpoints").glob(".*.partial"))


def test_a_signal_to_one_rank_saves_and_stops_all(start, run_file, tmp_path):
    path = run_file("stopped", train=yaml.safe_load(run_file().read_text())["train"] | {"steps": 400, "save_every": 0})
    command = start("pretrain", [str(path)], world_size=2)
    wait_for(lambda: reached(tmp_path / "stopped", 3))
    command.processes[1]._popen._send_signal(signal.SIGTERM)
    assert command.wait(30) == 0, command.text()
    assert "stopped at step" in command.text()
    last = max(losses(tmp_path / "stopped"))
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()


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


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_is_missing(start, run_file, tmp_path):
    train = yaml.safe_load(run_file().read_text())["train"] | {"steps": 400}
    run = tmp_path / "full"
    command = start("pretrain", [str(run_file("full", train=train))], world_size=2)
    wait_for(lambda: (run / "checkpoints" / "latest").exists())
    for process in command.processes:  # like a disk quota: larger files than this cannot be written any more
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert command.wait(60) == 1, command.text()
    assert "limit or disk quota is reached (0.1 MB needed)" in command.text()
    assert "Traceback" not in command.text()
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
    assert not list((run / "checkpoints").glob(".*.partial"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(start, run_file, tmp_path):
    path = run_file("damaged")
    assert start("pretrain", [str(path)]).wait() == 0
    expected = losses(tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / f"step-{STEPS:08d}" / "model-rank0000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    command = start("pretrain", [str(path)])
    assert command.wait() == 0, command.text()
    assert f"{newest}: damaged" in command.text()
    assert "step-00000009" in command.text()
    assert losses(tmp_path / "damaged") == expected
    for manifest in (tmp_path / "damaged" / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    command = start("pretrain", [str(path)])
    assert command.wait() == 1
    assert "no checkpoint is intact" in command.text()


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
        (["model.block_pattern.0.token.num_kv_heads=1", "parallel.tensor=2"], 2, ["num_kv_heads 1", "divisor"]),
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


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(start, run_file, tmp_path):
    train = yaml.safe_load(run_file().read_text())["train"] | {"steps": 400}
    path = run_file("busy", train=train)
    first = start("pretrain", [str(path)])
    wait_for(lambda: reached(tmp_path / "busy", 1))
    second = start("pretrain", [str(path)])
    assert second.wait(30) == 1
    assert "in use by" in second.text()
    first.kill()


def test_a_checkpoint_of_another_model_is_refused_with_both_values(start, run_file, tmp_path):
    path = run_file("other")
    assert start("pretrain", [str(path), "train.steps=3"]).wait() == 0
    command = start("pretrain", [str(path), "model.dim=64"])
    assert command.wait() == 1
    assert "model.dim = 32" in command.text()
    assert "64" in command.text()


def test_a_run_folder_on_a_full_disk_says_so_before_training(start, run_file):
    command = start("pretrain", [str(run_file()), "run=/dev/full/run"])
    assert command.wait() == 1
    assert "/dev/full" in command.text()
    assert "Traceback" not in command.text()
