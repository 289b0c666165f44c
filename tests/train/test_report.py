"""The page and pictures of a run."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightbulb.train.metrics import MetricsWriter
from lightbulb.train.report import _binned, _smooth, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(run: Path, num_layers: int = 2, steps: int = 30) -> Path:
    with MetricsWriter(run, steps, log_every=1000) as writer:
        for step in range(1, steps + 1):
            load = {str(layer): [0.7, 0.3, 0.0, 0.0] for layer in range(num_layers)}
            loss = math.nan if step == 7 else 5 / step
            train = {"kind": "train", "step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3, "expert_load": load}
            writer.write(train | {"tokens_per_second": 1000.0, "layout": "tp2"})
        writer.write({"kind": "eval", "step": steps, "held_out_loss": 2.0, "held_out_bpb": 1.5})
    return run


class Page(HTMLParser):
    """Text by tag, and proof that every tag that opens also closes."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def rows(self) -> str:
        return "|".join(self.texts)


def test_report_of_a_full_run_is_one_page_with_its_pictures(tmp_path: Path):
    run = write_run(tmp_path / "run <1>")
    baselines = {"unigram": 3.0, "xz -9": 1.25, "not measured": None}
    summary = {
        "held_out_bpb": 1.5,
        "baselines": baselines,
        "layout": {"tensor": 2, "data": 1},
        "parameters": 17_800_000,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "samples.json").write_text(json.dumps([{"prompt": "<b>a", "text": "<script>alert(1)</script> & 电灯"}]))
    page = write_report(run)
    assert page == run / "report.html"
    for name in ("loss.png", "experts.png", "throughput.png"):
        assert (run / name).read_bytes().startswith(PNG)
    parsed = Page(page)
    assert [base64.b64decode(source.split("base64,")[1]) for source in parsed.images] == [
        (run / name).read_bytes() for name in ("loss.png", "experts.png", "throughput.png")
    ]
    text = parsed.rows()
    # the bars are sorted, the best first, and the longest fills the column
    assert re.search(r"xz -9\|1.2500\|this run\|1.5000\|unigram\|3.0000", text)
    assert "not measured" not in text
    assert [float(width) for width in re.findall(r"width:([\d.]+)%\"", page.read_text())] == [41.7, 50.0, 100.0]
    assert "layout.tensor|2|" in text
    assert "parameters|17,800,000|" in text
    assert "layer 0: dead experts" in text
    assert "<b>a|<script>alert(1)</script> & 电灯" in text
    assert "script" not in parsed.tags
    assert "http" not in page.read_text()


def test_report_of_a_dense_run_without_summary_has_no_experts(tmp_path: Path):
    page = Page(write_report(write_run(tmp_path, num_layers=0)))
    assert not (tmp_path / "experts.png").exists()
    assert len(page.images) == 2
    assert "this run|1.5000" in page.rows()


def test_report_of_one_step_without_any_finite_number(tmp_path: Path):
    with MetricsWriter(tmp_path, 1) as writer:
        writer.write({"kind": "train", "step": 1, "loss": math.nan, "lr": 0.0, "expert_load": {"0": [math.nan] * 2}})
    assert write_report(tmp_path).is_file()


def test_many_layers_and_a_short_last_row_are_drawn(tmp_path: Path):
    write_report(write_run(tmp_path, num_layers=5, steps=3))
    assert (tmp_path / "experts.png").read_bytes().startswith(PNG)


def test_a_folder_without_metrics_or_steps_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no metrics.jsonl there"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    with pytest.raises(ValueError, match="no training step yet"):
        write_report(tmp_path)


@pytest.mark.parametrize(("content", "words"), [("{", "not a JSON file"), ("[]", "expected a JSON dict, found list")])
def test_a_damaged_summary_is_named(tmp_path: Path, content: str, words: str):
    write_run(tmp_path, num_layers=0, steps=1)
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=rf"summary.json: {words}"):
        write_report(tmp_path)


def test_smoothing_skips_what_is_not_finite_and_starts_at_the_first_value():
    values = np.linspace(0, 1, 400)
    values[200] = np.nan
    smooth = _smooth(values)
    assert smooth[0] == 0
    np.testing.assert_allclose(smooth[:380], np.linspace(0, 1, 400)[:380], atol=2e-3)
    assert np.isfinite(smooth).all()


def test_long_curves_are_binned_by_their_means():
    values = np.arange(4000, dtype=float)
    values[1] = np.nan
    bins = _binned(values)
    assert len(bins) == 1334
    np.testing.assert_allclose(bins[:2], [1, 4])
    assert _binned(np.ones((3100, 2))).shape == (1034, 2)


def test_domains_have_a_table_and_a_curve_each(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with MetricsWriter(run, 40, log_every=1000) as writer:
        counts = {"code": 3000, "a <b>": 1000}
        tokens = {"domain_tokens": counts, "group_epochs": {"code/cluster-00": 1.25, "a <b>": 0.5}}
        writer.write({"kind": "train", "step": 31, "tokens": 4000, "loss": 1.0, "lr": 1e-3, **tokens})
        for step in (10, 31):
            by_domain = {"domain_loss": {"code": 2.5, "a <b>": None}, "domain_bpb": {"code": 1.75, "a <b>": None}}
            writer.write({"kind": "eval", "step": step, "held_out_loss": 2.0, "held_out_bpb": 1.5, **by_domain})
    (run / "summary.json").write_text(json.dumps({"domain_tokens": counts, "steps": 31}))
    page = Page(write_report(run))
    assert "|code|3,000|75.0%|2.5|1.75|" in page.rows()
    assert "|a <b>|1,000|25.0%|not known|not known|" in page.rows()
    assert "Epochs: code/cluster-00 1.25, a <b> 0.5." in page.rows()
    assert "domain_tokens.code" not in page.rows()
    assert (run / "domains.png").read_bytes().startswith(PNG) and len(page.images) == 4
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("domain_bpb/code")] == [1.75, 1.75]
    assert board.Scalars("group_epochs/code/cluster-00")[0].value == 1.25
