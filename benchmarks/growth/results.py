"""What the arms of benchmarks/upcycling.py gave: differences within a seed, what they cost, a table and pictures."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.table import Table

from growth.corpora import CLUSTERS
from growth.plan import BASELINE, BRANCH_SHARES, SYNC_EVERY, Plan, Settings, Tuned

FLOAT_BYTES = 4
JSON_ARMS = ("cbtm_ensemble", "sparse", "drop", "btx", "btx_moa", "synced", "from_scratch")
Found = Callable[[str, int], Settings | None]
"""What a task of a seed found, or None while it is not done."""


def arm_results(plan: Plan, seeds: Sequence[int], found: Found) -> dict[str, Settings]:
    """Figures of every arm that is done on a seed or more.

    Differences are to the arm's baseline on the same seed; a seed counts where both are done.
    """
    results = {}
    for name, arm in plan.arms.items():
        done = {seed: record for seed in seeds if (record := found(arm.task, seed)) is not None}
        base = plan.arms.get(arm.baseline)
        differences = {}
        for seed, record in done.items():
            other = found(base.task, seed) if base else None
            if other is not None and base is not None:
                differences[seed] = record[arm.value] - other[base.value]
        if not done:
            continue
        results[name] = {
            "label": arm.label,
            "baseline": arm.baseline,
            "bpb": {str(seed): record[arm.value] for seed, record in done.items()},
            "difference": {str(seed): value for seed, value in differences.items()},
            "mean_difference": statistics.fmean(differences.values()) if differences else None,
            "spread": spread(list(differences.values())),
            "start_bpb": {str(s): record["start_bpb"] for s, record in done.items() if "start_bpb" in record},
            "domain_bpb": {str(s): record["domain_bpb"] for s, record in done.items() if "domain_bpb" in record},
            "flops": plan.flops(name),
            "flops_of_budget": plan.flops(name) / plan.budget,
            "megabytes_sent": megabytes_sent(plan, name),
            "skipped_steps": sum(record.get("skipped", 0) for record in done.values()),
        }
    return results


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def megabytes_sent(plan: Plan, arm: str) -> float:
    """What each of :data:`CLUSTERS` workers sends in an arm after the seed, in MB.

    Branches run one on each worker and send their trunk at every meeting. Whatever else is trained is trained data
    parallel: gradients of all parameters are reduced at every step. Either costs ``2 (k - 1) / k`` times its size.
    """
    total = 0.0
    for name in plan.arms[arm].spent:
        task = plan.tasks[name]
        settings = task.settings
        model = plan.model(name)
        if task.kind == "sync":
            floats = plan.trunk(name) * (settings["steps"] // settings["sync"]["every"])
        elif "/" in name:
            floats = 0
        else:
            floats = model.cost().params * round(task.flops / plan.scale.flops(1, model))
        total += floats * FLOAT_BYTES * 2 * (CLUSTERS - 1) / CLUSTERS / 1e6
    return total


def summary(results: Mapping[str, Settings], plan: Plan, seeds: Sequence[int]) -> Settings:
    """The JSON line: ``[mean difference to continued dense, spread]`` of each arm, two of them absolute."""
    line: Settings = {"seeds": len(seeds)}
    for name in ("seed", BASELINE):
        values = list(results[name]["bpb"].values())
        line[name] = [round(statistics.fmean(values), 4), round(spread(values), 4)]
    shown = plan.shown_sync()
    for name in (*JSON_ARMS, *(name for name in results if name not in (*JSON_ARMS, "seed", BASELINE))):
        record = results.get(shown if name == "synced" else name)
        if record and record["mean_difference"] is not None:
            line[name] = [round(record["mean_difference"], 4), round(record["spread"], 4)]
    line["synced_arm"] = shown
    if "sparse" in results:
        line["sparse_by_seed"] = [round(value, 4) for value in results["sparse"]["difference"].values()]
    return line


def crossing(results: Mapping[str, Settings], plan: Plan, prefix: str = "") -> str:
    """At which communication budget branches beat sparse upcycling with every seed, in a sentence."""
    names = [name for name in (f"{prefix}sparse", f"{prefix}sparse_centroid") if name in results]
    sparse = min((results[name]["mean_difference"], name) for name in names) if names else None
    ours = {
        name: record
        for name, record in results.items()
        if name.startswith((f"{prefix}sync_", f"{prefix}diloco_", f"{prefix}btx"))
        and record["mean_difference"] is not None
    }
    if sparse is None or not ours:
        return "Communication is not compared: it takes sparse upcycling and branches."
    rival = results[sparse[1]]["difference"]
    better = [
        (record["megabytes_sent"], name)
        for name, record in ours.items()
        if all(record["difference"].get(seed, math.inf) < value for seed, value in rival.items())
    ]
    sent = results[sparse[1]]["megabytes_sent"]
    if not better:
        best = min(ours, key=lambda name: ours[name]["mean_difference"])
        return (
            f"At no communication budget with every seed: the best, {ours[best]['label']}, is at "
            f"{ours[best]['mean_difference']:+.4f}, sparse upcycling at {sparse[0]:+.4f} ({sent:,.0f} MB per worker)."
        )
    megabytes, name = min(better)
    return (
        f"With every seed from {megabytes:,.0f} MB per worker on ({ours[name]['label']}: "
        f"{ours[name]['mean_difference']:+.4f}); sparse upcycling sends {sent:,.0f} MB and is at {sparse[0]:+.4f}."
    )


def rows(results: Mapping[str, Settings]) -> list[list[str]]:
    """The table: arm, seeds, mean and spread of differences, each seed, start, FLOPs, MB sent."""
    found = []
    for name, record in results.items():
        is_absolute = not record["difference"] or name == record["baseline"]
        values = list(record["bpb" if is_absolute else "difference"].values())
        form = "{:.4f}" if is_absolute else "{:+.4f}"
        starts = list(record["start_bpb"].values())
        found.append([
            record["label"],
            form.format(statistics.fmean(values)),
            f"{spread(values):.4f}",
            " ".join(form.format(value) for value in values),
            f"{statistics.fmean(starts):.3f}" if starts else "",
            f"{record['flops_of_budget']:.3f}",
            f"{record['megabytes_sent']:,.0f}",
        ])  # fmt: skip
    return found


COLUMNS = ("arm", "bits/byte", "spread", "by seed", "at its start", "FLOPs / budget", "MB sent per worker")


def table(results: Mapping[str, Settings]) -> Table:
    """For the terminal."""
    shown = Table(*COLUMNS, title="Held-out bits/byte: differences to continued dense (absolute without a sign)")
    for row in rows(results):
        shown.add_row(*row)
    return shown


def markdown(results: Mapping[str, Settings]) -> str:
    """For docs/results."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_differences(results: Mapping[str, Settings], path: Path) -> None:
    """Every arm's mean difference as a bar, every seed as a dot."""
    shown = {
        name: record
        for name, record in results.items()
        if record["baseline"] == BASELINE and record["mean_difference"] is not None and name not in ("seed", BASELINE)
    }
    names = sorted(shown, key=lambda name: shown[name]["mean_difference"], reverse=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(names) + 1.2))
    for place, name in enumerate(names):
        record = shown[name]
        mean, values = record["mean_difference"], list(record["difference"].values())
        axes.barh(place, mean, color="#4c8bbf" if mean < 0 else "#d98c5f", height=0.7)
        axes.plot(values, [place] * len(values), "o", color="black", markersize=3.5)
    axes.set_yticks(range(len(names)), [shown[name]["label"] for name in names], fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("bits/byte less continued dense's, same seed (left is better); a dot for each seed")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_communication(results: Mapping[str, Settings], path: Path) -> None:
    """What each worker sends against the difference, for shares of the budget in branches that meet or do not, and for
    what they compete with."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    shared = families_of_shares()
    families = {
        "BTX, branches never meet": (*shared["BTX"].values(), "o-"),
        f"BTX, trunk synchronised every {SYNC_EVERY[1]} steps": (*shared["trunk synchronised"].values(), "s--"),
        "the same by DiLoCo": (*shared["trunk synchronised by DiLoCo"].values(), "P-."),
        "sparse upcycling": ("sparse", "sparse_centroid", "^"),
        "drop-upcycling": ("drop", "drop_centroid", "v"),
        "c-BTM, likelihood posterior": ("cbtm_ensemble", "D"),
    }
    for label, (*names, style) in families.items():
        found = [results[n] for n in names if n in results and results[n]["mean_difference"] is not None]
        if found:
            x, y, error = ([record[key] for record in found] for key in ("megabytes_sent", "mean_difference", "spread"))
            axes.errorbar(x, y, error, fmt=style, capsize=3, label=label)
    for share, name in shared["BTX"].items():
        if name in results and results[name]["mean_difference"] is not None:
            place = results[name]["megabytes_sent"], results[name]["mean_difference"]
            axes.annotate(
                f"{share:.0%} in branches",
                place,
                fontsize=8,
                xytext=(-8, -4),
                textcoords="offset points",
                ha="right",
                va="top",
            )
    _save_differences(figure, axes, "MB sent by each of five workers after the seed", path)


def families_of_shares() -> dict[str, dict[float, str]]:
    """Arms by the share of the budget in branches."""
    whole, sync, diloco = Tuned().branch_share, f"sync_{SYNC_EVERY[1]}", f"diloco_{SYNC_EVERY[1]}"
    return {
        "BTX": {share: f"btx_share_{share}" for share in BRANCH_SHARES} | {whole: "btx_centroid"},
        "trunk synchronised": {share: f"{sync}_share_{share}" for share in BRANCH_SHARES} | {whole: sync},
        "trunk synchronised by DiLoCo": {share: f"{diloco}_share_{share}" for share in (*BRANCH_SHARES, whole)},
        "BTX of feed-forward layers only": {share: f"btx_ffn_{share}" for share in (*BRANCH_SHARES, whole)},
    }


def draw_seed_lengths(results: Mapping[str, Settings], lengths: Mapping[str, float], path: Path) -> None:
    """Differences to continued dense against the seed's length."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in ("sparse_centroid", "btx_centroid", "sync_1", "sync_8"):
        points = []
        for prefix, factor in {"": 1.0, **{f"{key}.": value for key, value in lengths.items()}}.items():
            record = results.get(prefix + name)
            if record and record["mean_difference"] is not None:
                points.append((factor, record["mean_difference"], record["spread"], record["label"]))
        if points:
            points.sort()
            x, y, error, labels = zip(*points, strict=True)
            axes.errorbar(x, y, error, fmt="o-", capsize=3, label=labels[-1].partition(", seed")[0])
    axes.set_xscale("log", base=2)
    _save_differences(figure, axes, "length of the seed, times that of the table", path)


def draw_shares(results: Mapping[str, Settings], path: Path) -> None:
    """Differences to continued dense against the share of the budget in branches; none in branches is copies."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for prefix, style in (("", "o-"), ("long.", "s--")):
        for number, (label, names) in enumerate(families_of_shares().items()):
            points = [
                (share, results[prefix + name])
                for share, name in ({0.0: "sparse_centroid"} | names).items()
                if prefix + name in results and results[prefix + name]["mean_difference"] is not None
            ]
            if len(points) > 1:
                axes.errorbar(
                    [share for share, _ in points],
                    [record["mean_difference"] for _, record in points],
                    [record["spread"] for _, record in points],
                    fmt=style, color=f"C{number}", capsize=3,
                    label=label + (", seed x 3" if prefix else ""),
                )  # fmt: skip
    _save_differences(figure, axes, "share of the budget in branches", path)


def _save_differences(figure: Any, axes: Any, against: str, path: Path) -> None:
    """With what all pictures of differences to continued dense against something have."""
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(against)
    axes.set_ylabel("bits/byte less continued dense's")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def is_equal_flops(plan: Plan) -> dict[str, float]:
    """Share of the budget by which each arm is off, for arms that claim to spend it."""
    return {name: math.fabs(plan.flops(name) / plan.budget - 1) for name, arm in plan.arms.items() if not arm.free}
