"""A finished recipe as one page with its pictures, and its ``summary.json``."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from lightbulb.evaluation.run_tree import draw_tree, run_tree
from lightbulb.evaluation.specialisation import draw
from lightbulb.folder import write_atomically
from lightbulb.recipes.accounts import summarise
from lightbulb.recipes.arms import ARMS, DENSE, ENSEMBLE, EVALUATION, MIXTURE, arm_runs
from lightbulb.recipes.engine import duration
from lightbulb.recipes.pictures import NAMES, accounts_figure, curves_figure, domains_figure
from lightbulb.recipes.plan import Plan
from lightbulb.train.page import image, page, save_figure, section

SUMMARY, PAGE = "summary.json", "report.html"
PICTURES = {
    "tree.png": "Runs, each with the ones it was made of",
    "curves.png": "Training",
    "domains.png": "Held-out bits per byte by domain and cluster",
    "experts-by-cluster.png": "Experts of the mixture, by cluster",
    "experts-by-domain.png": "Experts of the mixture, by domain",
    "accounts.png": "What every arm costs",
}
OUTPUTS = (SUMMARY, PAGE, *PICTURES)
"""Files that a report writes into the recipe's folder."""


def write_report(plan: Plan) -> None:
    """Draw the pictures and write summary and page.

    Raises:
        FolderError: the folder cannot be written.
        ValueError: a run has no readable summary or metrics.
    """
    run = plan.recipe.run
    arms = orjson.loads((run / EVALUATION / ARMS).read_bytes())
    summary = summarise(plan, arms)
    draw_tree(run_tree([*plan.branch_runs, *arm_runs(plan).values()]), run / "tree.png")
    save_figure(curves_figure(plan, arms), run / "curves.png")
    save_figure(domains_figure(arms), run / "domains.png")
    for kind in ("cluster", "domain"):
        draw(arms[MIXTURE]["experts"], kind, run / f"experts-by-{kind}.png")
    save_figure(accounts_figure(summary), run / "accounts.png")
    write_atomically(run / SUMMARY, orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    write_atomically(run / PAGE, _page(plan, summary, run))


def _page(plan: Plan, summary: Mapping[str, Any], run: Path) -> str:
    lead = f"{plan.recipe.num_clusters} clusters, {plan.upcycle.experts} experts, {plan.upcycle.method}"
    if plan.recipe.branch.sync is not None:
        lead += f", branches together every {plan.recipe.branch.sync.every} steps"
    pictures = [section(title, image(title, run / name)) for name, title in PICTURES.items()]
    parts = [_scores(summary), *pictures[:3], _groups(summary), *pictures[3:], _costs(summary), _stages(plan, summary)]
    return page(run.resolve().name, lead, parts)


def _scores(summary: Mapping[str, Any]) -> str:
    """Bits per byte of each arm, the best first."""
    found = {name: summary[f"{name}_bpb"] for name in summary["total_flops"]}
    widest = max(found.values())
    rows = "".join(
        f'<tr class="{"own" if name == MIXTURE else "other"}"><th>{NAMES[name]}</th><td class="number">{bits:.4f}</td>'
        f'<td><span class="bar" style="width:{bits / widest:.1%}"></span></td></tr>'
        for name, bits in sorted(found.items(), key=lambda item: item[1])
    )
    note = ""
    if DENSE in found:
        ratio = summary["total_flops"][MIXTURE] / summary["total_flops"][DENSE]
        note = (
            f"<p>The mixture has spent {ratio:.4f} times the training FLOPs of the continued dense model, and is "
            f"{found[MIXTURE] - found[DENSE]:+.4f} bits per byte from it.</p>"
        )
    return section("Held-out bits per byte (less is better)", f'<table class="bars">{rows}</table>{note}')


def _groups(summary: Mapping[str, Any]) -> str:
    """Bits per byte by domain and cluster."""
    names = list(summary["domain_bpb"])
    rows = [
        [group, *(_bits(summary[kind][name].get(group)) for name in names)]
        for kind in ("domain_bpb", "cluster_bpb")
        for group in summary[kind][names[0]]
    ]
    return section("By domain and cluster", _table(["", *(NAMES[name] for name in names)], rows))


def _costs(summary: Mapping[str, Any]) -> str:
    """FLOPs and parameters of each arm."""
    per_token = summary["inference_flops_per_token"]
    head = ["", "bits per byte", "training FLOPs", "FLOPs per predicted token", "parameters", "of them active"]
    rows = [
        [NAMES[name], _bits(summary[f"{name}_bpb"]), f"{flops:.4g}", f"{per_token[name]:.4g}"]
        + [f"{summary[kind][name]:,}" for kind in ("parameters", "active_parameters")]
        for name, flops in summary["total_flops"].items()
    ]
    note = "Training FLOPs: forward and backward of every token that was trained on, the seed's included."
    if ENSEMBLE in summary["total_flops"]:
        note += " The ensemble is of the branches as they are, and has spent no more than these."
    return section("Accounts", _table(head, rows) + f"<p>{note}</p>")


def _stages(plan: Plan, summary: Mapping[str, Any]) -> str:
    """Length, FLOPs and time of each stage."""
    seconds, tokens = summary["seconds_by_stage"], summary["tokens_by_stage"]
    flops = {stage: value for stages in summary["flops_by_stage"].values() for stage, value in stages.items()}
    trainings = {training.name: training for training in plan.trainings}
    rows = []
    for name, spent in seconds.items():
        training = trainings.get(name)
        length = f"{training.runs} × {training.steps:,}" if training and training.runs > 1 else ""
        if training and not length:
            length = f"{training.steps:,}"
        account = [f"{tokens[name]:,}", f"{flops[name]:.4g}"] if name in tokens else ["", ""]
        rows.append([name, length, *account, duration(spent)])
    return section("Stages", _table(["stage", "steps", "tokens", "training FLOPs", "time (h:min:s)"], rows))


def _table(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f"<th>{html.escape(first)}</th>{cells}")
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _bits(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"
