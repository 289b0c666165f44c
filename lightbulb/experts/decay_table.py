"""Decays of one run side by side: a table, ``comparison.json`` and the curves ``decays.png``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from lightbulb.folder import explained, write_atomically
from lightbulb.train.manifest import CheckpointError
from lightbulb.train.metrics import read_metrics
from lightbulb.train.origin import read_origin

BINS = 200
"""Points of a curve; each is the mean over its steps."""
TRUNK = "#7a8699"


@dataclass(frozen=True)
class Row:
    """One decay, or the stable run where they were forked.

    Attributes:
        name: of the decay's folder.
        run: its folder.
        step: at the end.
        tokens: trained on at the end.
        bpb: held-out bits per byte; None where the stable run was not evaluated at the step.
        domain_bpb: the same by domain.
        contexts: held-out contexts of the evaluation.
    """

    name: str
    run: str
    step: int
    tokens: int
    bpb: float | None
    domain_bpb: dict[str, float]
    contexts: int | None


@dataclass(frozen=True)
class Comparison:
    """Decays from one checkpoint, the best first, and the stable run at that checkpoint."""

    trunk: Row
    decays: list[Row]
    picture: str

    def table(self) -> Table:
        """For a console: bits per byte of all held-out text and of each domain."""
        domains = sorted({name for row in self.decays for name in row.domain_bpb})
        table = Table("run", "step", "tokens", "bits per byte", *domains, title="Held-out bits per byte")
        for row in [self.trunk, *self.decays]:
            note = f" ({row.contexts} contexts)" if row is self.trunk and row.bpb is not None else ""
            cells = [_number(row.bpb) + note, *(_number(row.domain_bpb.get(name)) for name in domains)]
            style = "bold green" if self.decays and row is self.decays[0] else None
            table.add_row(row.name, f"{row.step:,}", f"{row.tokens:,}", *cells, style=style)
        return table


def compare(trunk: Path, decays: Sequence[Path], out: Path) -> Comparison:
    """Read complete decays, write ``comparison.json`` and ``decays.png`` into ``out``.

    Raises:
        CheckpointError: a decay has no origin.
        FileNotFoundError: a decay is not complete.
        FolderError: ``out`` cannot be written.
    """
    step = min(_forked_at(run) for run in decays)
    records = {run: list(read_metrics(run)) for run in decays}
    rows = [_finished(run) for run in decays]
    picture = out / "decays.png"
    with explained(picture):
        _figure(step, {run.name: records[run] for run in decays}, _beyond(trunk)).savefig(
            picture, dpi=130, facecolor="white"
        )
    before = [record for record in records[decays[0]] if record["step"] <= step]
    found = Comparison(_stable(trunk, step, before), sorted(rows, key=lambda row: row.bpb or 0.0), str(picture))
    write_atomically(out / "comparison.json", json.dumps(asdict(found), indent=1))
    return found


def _forked_at(run: Path) -> int:
    origin = read_origin(run)
    if origin is None or origin.parents[0].step is None:
        raise CheckpointError(f"{run}: no decay: it has no origin.json of one; name what branch-decay wrote")
    return origin.parents[0].step


def _finished(run: Path) -> Row:
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    last = [record for record in read_metrics(run) if record["kind"] == "eval"][-1]
    bits, by_domain = summary["held_out_bpb"], summary["domain_bpb"]
    return Row(run.name, str(run), summary["steps"], summary["tokens"], bits, by_domain, last["contexts"])


def _stable(trunk: Path, step: int, records: Sequence[Mapping[str, Any]]) -> Row:
    """The stable run at the step, from what a fork has copied of its metrics."""
    tokens = max((record["tokens"] for record in records if record["kind"] == "train"), default=0)
    found = [record for record in records if record["kind"] == "eval" and record["step"] == step]
    last: Mapping[str, Any] = found[-1] if found else {}
    return Row(
        f"{trunk.name} at step {step}", str(trunk), step, tokens,
        last.get("held_out_bpb"), last.get("domain_bpb") or {}, last.get("contexts"),
    )  # fmt: skip


def _beyond(trunk: Path) -> list[dict[str, Any]]:
    """All that the stable run has trained, also after the fork; nothing where it is gone."""
    return list(read_metrics(trunk)) if trunk.is_dir() else []


def _figure(step: int, decays: Mapping[str, Sequence[Mapping[str, Any]]], trunk: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss over tokens (above) and held-out bits per byte (below), of the stable run and its decays."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    everything = [record for run in [trunk, *decays.values()] for record in run]
    tokens = {record["step"]: record["tokens"] for record in everything if _is_train(record)}
    common = trunk or next(iter(decays.values()))
    _curves(upper, lower, common if trunk else [r for r in common if r["step"] <= step], tokens, TRUNK, "stable")
    for number, (name, records) in enumerate(decays.items()):
        colour = colormaps["turbo"](0.08 + 0.84 * number / max(1, len(decays) - 1))
        _curves(upper, lower, [record for record in records if record["step"] > step], tokens, colour, name)
    for axis, label in ((upper, "training loss, nats per token"), (lower, "held-out bits per byte")):
        axis.axvline(tokens.get(step, 0), color="#b8c0cc", linewidth=1, linestyle=":")
        axis.set_ylabel(label)
        axis.grid(color="#e4e8ee", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    upper.set_title(f"Decays from step {step:,}", loc="left", fontsize=10, fontweight="bold")
    upper.legend(frameon=False, fontsize=8)
    lower.set_xlabel("tokens")
    return figure


def _curves(
    upper: Axes, lower: Axes, records: Sequence[Mapping[str, Any]], tokens: Mapping[int, int], colour: Any, name: str
) -> None:
    train = np.array([(r["tokens"], np.nan if r["loss"] is None else r["loss"]) for r in records if _is_train(r)])
    if len(train):
        bins = np.array_split(train, min(BINS, len(train)))
        means = np.array([part.mean(axis=0) for part in bins])
        upper.plot(means[:, 0], means[:, 1], color=colour, linewidth=1.4, label=name)
    held_out = [(tokens.get(r["step"], 0), r["held_out_bpb"]) for r in records if r["kind"] == "eval"]
    if held_out:
        lower.plot(*zip(*held_out, strict=True), color=colour, marker="o", markersize=3, linewidth=1.2)


def _is_train(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "train"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
