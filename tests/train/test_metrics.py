"""One record per step in the file, TensorBoard and the console; alarms about routers."""

import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightbulb.train.metrics import MetricsWriter, read_metrics, router_alarms


def record(step: int, **extra: object) -> dict[str, object]:
    known = {
        "kind": "train",
        "step": step,
        "tokens": step * 1000,
        "loss": 5.0 - 0.01 * step,
        "bits_per_byte": 1.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "skipped_steps": 0,
        "tokens_per_second": 12_345.6,
        "flops_per_second": 1.25e12,
        "mfu": 0.314,
        "memory_gib": 0.8,
        "eta_seconds": 3725.4,
    }
    return known | extra


def write_steps(run: Path, first: int, last: int) -> None:
    with MetricsWriter(run, 100) as writer:
        for step in range(first, last + 1):
            writer.write(record(step))


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run)]


def test_each_record_is_a_line_on_disk_at_once(tmp_path: Path):
    with MetricsWriter(tmp_path, 10) as writer:
        for step in (1, 2):
            writer.write(record(step, anything={"else": [1, 2]}))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == record(step, anything={"else": [1, 2]})
        writer.write({"kind": "eval", "step": 2, "held_out_loss": 4.0, "held_out_bpb": 1.4})
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "train", "eval"]


def test_resume_leaves_one_line_per_step(tmp_path: Path):
    write_steps(tmp_path, 1, 8)
    with MetricsWriter(tmp_path, 100) as writer:
        writer.rewind(5)
        for step in range(6, 11):
            writer.write(record(step))
    assert steps(tmp_path) == list(range(1, 11))


def test_rewind_works_between_records_and_on_an_empty_folder(tmp_path: Path):
    with MetricsWriter(tmp_path, 100) as writer:
        writer.rewind(0)
        for step in (1, 2, 3):
            writer.write(record(step))
        writer.rewind(1)
        writer.write(record(2, again=True))
    assert [line.get("again", False) for line in read_metrics(tmp_path)] == [False, True]


def test_half_a_line_of_a_killed_run_is_not_read_and_not_continued(tmp_path: Path):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert steps(tmp_path) == [1, 2]
    write_steps(tmp_path, 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is no JSON"):
        list(read_metrics(tmp_path))
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is no JSON"):
        MetricsWriter(tmp_path, 10).rewind(1)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    values = {
        "loss": math.nan,
        "grad_norm": math.inf,
        "tensor": torch.tensor(-torch.inf),
        "array": np.array([1.0, np.nan]),
        "scalar": np.float32(0.5),
        "router_entropy": {"0": math.nan, "1": torch.tensor(0.25)},
    }
    with MetricsWriter(tmp_path, 10) as writer:
        writer.write(record(1, **values))
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=pytest.fail)
    assert [line[key] for key in ("loss", "grad_norm", "tensor", "array", "scalar")] == [
        None,
        None,
        None,
        [1, None],
        0.5,
    ]
    assert line["router_entropy"] == {"0": None, "1": 0.25}


def test_a_record_without_step_or_with_an_object_is_refused(tmp_path: Path):
    with MetricsWriter(tmp_path, 10) as writer:
        with pytest.raises(ValueError, match="needs 'kind' and 'step'"):
            writer.write({"kind": "train"})
        with pytest.raises(TypeError):
            writer.write(record(1, loss=object()))


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsWriter(tmp_path, 10, is_writer=False) as writer:
        writer.rewind(0)
        writer.write(record(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_has_the_scalars_and_forgets_what_was_rewound(tmp_path: Path):
    write_steps(tmp_path, 1, 4)
    time.sleep(1.1)  # TensorBoard orders its files by the second they were opened in
    with MetricsWriter(tmp_path, 100) as writer:
        writer.rewind(2)
        writer.write(record(3, loss=1.0, expert_load={"1": [0.7, 0.3]}, router_entropy={"1": 0.6}))
        writer.write({"kind": "eval", "step": 3, "held_out_bpb": 1.25})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in board.Scalars("train/loss")] == [
        (1, 4.99),
        (2, 4.98),
        (3, 1),
    ]
    for tag, value in [
        ("expert_load_max/1", 1.4),
        ("expert_load_min/1", 0.6),
        ("router_entropy/1", 0.6),
        ("eval/held_out_bpb", 1.25),
    ]:
        assert board.Scalars(tag)[0].value == pytest.approx(value)


def test_without_a_terminal_there_is_a_plain_line_every_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsWriter(tmp_path, 25, log_every=10) as writer:
        for step in range(1, 26):
            writer.write(record(step))
        writer.write({"kind": "eval", "step": 25, "held_out_loss": 4.0, "held_out_bpb": None})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25", "25"]
    assert lines[0] == (
        "step 1/25  loss 4.9900  bpb 1.500  lr 1.00e-03  grad norm 0.500  12,346 tok/s  1.25 TFLOP/s  MFU 31.4%  "
        "0.80 GiB  ETA 1:02:05"
    )
    assert lines[-1] == "step 25  held-out loss 4.0000  bits per byte not finite"


def test_a_loss_that_is_not_finite_and_skipped_steps_are_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsWriter(tmp_path, 10) as writer:
        writer.write({"kind": "train", "step": 1, "loss": math.nan, "skipped_steps": 2})
    assert capsys.readouterr().out == "step 1/10  loss not finite  skipped 2\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with MetricsWriter(tmp_path, 3, log_every=1) as writer:
        for step in (1, 2, 3):
            writer.write({"kind": "train", "step": step, "loss": 1.5, "expert_load": {"0": [1.0, 0.0]}})
    text = sys.stdout.getvalue()
    assert all(part in text for part in ("3/3", "100%", "loss 1.5000"))
    assert "step 1/3" not in text
    assert text.count("warning: layer 0: dead experts") == 1


def test_dead_and_overloaded_experts_are_told_by_layer():
    load = {"1": [0.5, 0.05] + [0.075] * 6, "3": [0.01, 0.0] + [0.165] * 6, "5": [0.125] * 8}
    assert router_alarms({"1": load["1"]}, 8) == []
    assert router_alarms({"1": [0.51, *load["1"][1:]]}, 8) == [
        "layer 1: overloaded experts, over 4x the uniform share: 0 (4.1x)"
    ]
    assert router_alarms(load, 8) == ["layer 3: dead experts, under 0.1x the uniform share: 0 (0.08x), 1 (0x)"]


def test_one_expert_is_warned_about_once_in_fifty_steps(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsWriter(tmp_path, 200) as writer:
        for step in range(1, 121):
            dead = [0.0, 0.5, 0.5] if step < 30 else [0.0, 0.0, 1.0]
            writer.write(record(step, expert_load={"2": dead}))
    alarms = {line["step"]: line["alarms"] for line in read_metrics(tmp_path) if "alarms" in line}
    assert {step: [text.split(": ")[-1] for text in texts] for step, texts in alarms.items()} == {
        1: ["0 (0x)"],
        30: ["1 (0x)"],
        51: ["0 (0x)"],
        80: ["1 (0x)"],
        101: ["0 (0x)"],
    }
    assert capsys.readouterr().out.count("warning: layer 2: dead") == 5
