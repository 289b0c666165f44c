"""`lightbulb finetune` as a user starts it: on two ranks, stopped and gone on with, merged, asked and exported."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from processes import Command
from training_runs import TRAIN, losses


@pytest.mark.slow
def test_a_run_is_tuned_merged_asked_and_exported(
    start: Callable[..., Command], run_file: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    base = run_file("base", train=TRAIN | {"steps": 3})
    assert start("pretrain", [str(base)]).wait() == 0
    tuning = tmp_path / "tuned.yaml"
    values = {
        "run": str(tmp_path / "tuned"), "start_from": str(tmp_path / "base"), "lora": {"rank": 4}, "merge": True,
        "data": {"path": str(corpus)}, "train": TRAIN | {"steps": 4, "eval_every": 0},
        "parallel": {"pipeline": 2},
    }  # fmt: skip
    tuning.write_text(yaml.safe_dump(values))
    first = start("finetune", [str(tuning), "train.steps=2"], world_size=2)
    assert first.wait() == 0, first.text()
    again = start("finetune", [str(tuning)], world_size=2)
    assert again.wait() == 0, again.text()
    assert sorted(losses(tmp_path / "tuned")) == [1, 2, 3, 4]
    merged = str(tmp_path / "tuned" / "merged")
    for name, arguments in (("generate", [merged, "--prompt", "1 plus"]), ("export", [merged, str(tmp_path / "hf")])):
        command = start(name, arguments)
        assert command.wait() == 0, command.text()
