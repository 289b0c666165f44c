"""The pictures of a finished recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lightbulb.recipes.arms import DENSE, ENSEMBLE, MIXTURE, SEED
from lightbulb.recipes.plan import Plan, Training
from lightbulb.train.metrics import read_metrics
from lightbulb.train.page import BLUE, GREEN, GREY, ORANGE, style

COLOURS = {SEED: GREY, DENSE: ORANGE, ENSEMBLE: GREEN, MIXTURE: BLUE}
NAMES = {SEED: "seed", DENSE: "continued dense", ENSEMBLE: "ensemble of branches", MIXTURE: "mixture of experts"}
BINS = 160
"""Points from the first FLOP of the mixture's arm to its last: each is the mean of its steps, so that all curves are as
smooth."""


class Curve(NamedTuple):
    """A training over the FLOPs of its arm.

    Attributes:
        name: for the legend.
        flops: ``[steps]``: of the arm so far.
        bits: ``[steps]``: bits per byte of the step's batch.
        held_out: (FLOPs, bits per byte) of evaluations of all held-out text.
        colour: of the arm.
        is_part: of several that train at the same time on their own text.
    """

    name: str
    flops: np.ndarray
    bits: np.ndarray
    held_out: list[tuple[float, float]]
    colour: str
    is_part: bool = False


def curves_figure(plan: Plan, arms: Mapping[str, Any]) -> Figure:
    """All runs over the FLOPs of their arm; of the branches, which train side by side, over those of all together."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axis = figure.subplots()
    for curve in _curves(plan):
        width, alpha = (0.7, 0.5) if curve.is_part else (1.5, 0.9)
        name = None if curve.is_part and not curve.name else curve.name
        axis.plot(curve.flops, curve.bits, color=curve.colour, linewidth=width, alpha=alpha, label=name)
        if curve.held_out and not curve.is_part:
            axis.plot(*curve.held_out[-1], color=curve.colour, marker="o", markersize=6, linestyle="none")
    if ENSEMBLE in arms:
        end = plan.seed.flops + plan.branch.flops
        axis.plot(end, arms[ENSEMBLE]["bpb"], color=COLOURS[ENSEMBLE], marker="o", markersize=6, linestyle="none")
    _limit(axis, plan)
    axis.legend(frameon=False, fontsize=8)
    style(axis, "Training: bits per byte of the batches, and of the held-out text (points)", "bits per byte")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("training FLOPs of the arm")
    return figure


def domains_figure(arms: Mapping[str, Any]) -> Figure:
    """Bits per byte by domain and by cluster, a point for each arm."""
    kinds = [kind for kind in ("domain_bpb", "cluster_bpb") if arms[SEED][kind]]
    rows = [(group, kind) for kind in kinds for group in arms[SEED][kind]]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    for name, arm in arms.items():
        values = [arm[kind].get(group, np.nan) for group, kind in rows]
        axis.scatter(values, np.arange(len(rows)), s=60, color=COLOURS[name], label=NAMES[name], zorder=2)
    style(axis, "", "")
    axis.set_yticks(np.arange(len(rows)), [group for group, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("held-out bits per byte")
    axis.xaxis.set_major_locator(MaxNLocator(8))
    axis.margins(x=0.04)
    figure.legend(frameon=False, fontsize=8, ncols=len(arms), loc="outside upper center")
    return figure


def accounts_figure(summary: Mapping[str, Any]) -> Figure:
    """Training FLOPs by stage, inference FLOPs and parameters of each arm."""
    names = list(summary["total_flops"])
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    training, inference, parameters = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    left, stages = np.zeros(len(names)), list(summary["tokens_by_stage"])
    for number, stage in enumerate(stages):
        values = np.array([summary["flops_by_stage"][name].get(stage, 0.0) for name in names])
        colour = colormaps["viridis"](0.1 + 0.8 * number / max(1, len(stages) - 1))
        training.barh(np.arange(len(names)), values, left=left, height=0.6, color=colour, label=stage)
        left += values
    _bars(inference, [summary["inference_flops_per_token"][name] for name in names])
    _bars(parameters, [summary["parameters"][name] for name in names], [summary["active_parameters"][n] for n in names])
    labels = {
        training: "training FLOPs",
        inference: "FLOPs per predicted token",
        parameters: "parameters (blue: active)",
    }
    for axis, label in labels.items():
        style(axis, "", "")
        axis.set_xlabel(label, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(4 if axis is training else 2))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    training.set_yticks(np.arange(len(names)), [NAMES[name] for name in names])
    training.invert_yaxis()
    figure.legend(*training.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=6, loc="outside upper center")
    return figure


def _bars(axis: Axes, values: Sequence[float], inner: Sequence[float] | None = None) -> None:
    places = np.arange(len(values))
    axis.barh(places, values, height=0.6, color="#c3cbd6" if inner else BLUE)
    if inner:
        axis.barh(places, inner, height=0.6, color=BLUE)


def _curves(plan: Plan) -> list[Curve]:
    """All trainings, each beginning where its arm stood."""
    seed_end = plan.seed.flops
    mixed = seed_end + plan.branch.flops
    decay = mixed + plan.tune.flops
    width = (decay + plan.decay.flops) / BINS
    found = [_curve(plan.seed, None, 0.0, width, COLOURS[SEED], NAMES[SEED])]
    for number, run in enumerate(plan.branch_runs):
        name = "branches, each on its cluster" if number == 0 else ""
        found.append(_curve(plan.branch, run, seed_end, width, COLOURS[ENSEMBLE], name))
    found.append(_curve(plan.tune, None, mixed, width, COLOURS[MIXTURE], NAMES[MIXTURE]))
    found.append(_curve(plan.decay, None, decay, width, COLOURS[MIXTURE], ""))
    if plan.recipe.baselines.dense:
        found.append(_curve(plan.dense, None, seed_end, width, COLOURS[DENSE], NAMES[DENSE]))
    return found


def _curve(training: Training, run: Path | None, begin: float, width: float, colour: str, name: str) -> Curve:
    """A run's own steps, so many FLOPs to a point; what its metrics have of the run it goes on from is left out."""
    records = list(read_metrics((run or Path(training.config.run)).expanduser()))
    train = [r for r in records if r["kind"] == "train" and r["step"] > training.first_step]
    at = [begin + training.tokens_until(r["step"]) * training.flops_per_token for r in train]
    bits = [np.nan if r["bits_per_byte"] is None else r["bits_per_byte"] for r in train]
    held_out = [
        (begin + training.flops, r["held_out_bpb"])
        for r in records
        if r["kind"] == "eval" and r["step"] == training.config.train.steps
    ]
    points = max(2, round(training.flops / width))
    return Curve(name, _binned(at, points), _binned(bits, points), held_out, colour, run is not None)


def _binned(values: Sequence[float], points: int) -> np.ndarray:
    """At most so many means."""
    parts = np.array_split(np.array(values, dtype=float), min(points, max(1, len(values))))
    return np.array([np.nanmean(part) if len(part) else np.nan for part in parts])


def _limit(axis: Axes, plan: Plan) -> None:
    """Leave out the seed's first tenth, where everything falls fast, from what the axis shows."""
    lines = [np.asarray(line.get_xydata(), dtype=float) for line in axis.get_lines()]
    seen = [xy[(xy[:, 0] > 0.1 * plan.seed.flops) & np.isfinite(xy[:, 1]), 1] for xy in lines]
    seen = [bits for bits in seen if len(bits)]
    if seen:
        low, high = min(part.min() for part in seen), max(part.max() for part in seen)
        axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
