"""A run as pictures and one page: ``loss.png``, ``domains.png``, ``experts.png``, ``throughput.png``, ``report.html``.

Read from the run folder: ``metrics.jsonl``; ``summary.json`` if it is there, a mapping of facts in which
``held_out_bpb`` is the run's held-out bits per byte and ``baselines`` maps names to the bits per byte to compare it
with; and ``samples.json`` if it is there, a list of ``{"prompt": ..., "text": ...}`` (the text continues the prompt).
The page needs no other file and no network.
"""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lightbulb.folder import write_atomically
from lightbulb.train.metrics import DEAD_BELOW, OVERLOADED_ABOVE, read_metrics
from lightbulb.train.page import BLUE, GREEN, GREY, ORANGE, image, page, save_figure, section, style

Records = Sequence[Mapping[str, Any]]

MAX_POINTS = 1500
"""Longer curves are averaged in bins: a picture has no more columns."""
SMOOTHING_STEPS = 50
PANEL_COLUMNS = 3
BY_DOMAIN = ("domain_tokens", "domain_loss", "domain_bpb", "group_epochs")
"""Parts of the summary that have a table of their own."""


def write_report(run: Path) -> Path:
    """Draw the pictures of a run and write its page; returns the page's path.

    Raises:
        FileNotFoundError: no metrics in the folder.
        ValueError: there is no training step yet, or a file of the run is damaged; the message names it.
        FolderError: the run folder cannot be written.
    """
    records = list(read_metrics(run))
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    if not train:
        raise ValueError(f"{run}: metrics.jsonl has no training step yet; run the report after the first one")
    summary = _read_json(run / "summary.json", {})
    samples = _read_json(run / "samples.json", [])
    pictures = {"Loss": save_figure(_loss_figure(train, held_out), run / "loss.png")}
    if any(len(record.get("domain_bpb") or {}) > 1 for record in held_out):
        pictures["Domains"] = save_figure(_domains_figure(held_out), run / "domains.png")
    if any(record.get("expert_load") for record in train):
        pictures["Experts"] = save_figure(_experts_figure(train), run / "experts.png")
    pictures["Throughput"] = save_figure(_throughput_figure(train), run / "throughput.png")
    path = run / "report.html"
    write_atomically(path, _page(run.resolve().name, train, held_out, summary, samples, pictures))
    return path


def _read_json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); delete it or write it again") from None
    if not isinstance(value, type(missing)):
        raise ValueError(f"{path}: expected a JSON {type(missing).__name__}, found {type(value).__name__}")
    return value


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key; null becomes nan, records without the key are left out."""
    pairs = [(record["step"], record[key]) for record in records if key in record]
    steps = np.array([step for step, _ in pairs], dtype=float)
    return steps, np.array([math.nan if value is None else value for _, value in pairs], dtype=float)


def _binned(values: np.ndarray) -> np.ndarray:
    """At most ``MAX_POINTS`` rows, each the mean of its bin over what is finite."""
    size = math.ceil(len(values) / MAX_POINTS) if len(values) else 1
    if size == 1:
        return values
    starts = np.arange(0, len(values), size)
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of at most ``SMOOTHING_STEPS`` rows or a twentieth of all, over what is finite.

    It narrows to one row at the start, where a loss falls fast, and to its earlier half at the end.
    """
    rows = np.arange(len(values))
    half = np.minimum(min(SMOOTHING_STEPS, len(values) // 20) // 2, rows)
    first, last = rows - half, np.minimum(rows + half + 1, len(values))
    known = np.isfinite(values)
    before = [(1, 0)] + [(0, 0)] * (values.ndim - 1)
    sums = np.cumsum(np.pad(np.where(known, values, 0.0), before), axis=0)
    counts = np.cumsum(np.pad(known.astype(float), before), axis=0)
    count = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], count, out=np.full_like(values, np.nan), where=count > 0)


def _loss_figure(train: Records, held_out: Records) -> Figure:
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps, losses = _series(train, "loss")
    steps, losses = _binned(steps), _binned(losses)
    upper.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.9)
    upper.plot(steps, _smooth(losses), color=BLUE, linewidth=1.8, label="train")
    eval_steps, eval_losses = _series(held_out, "held_out_loss")
    if len(eval_steps):
        upper.plot(eval_steps, eval_losses, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="held out")
    upper.legend(frameon=False)
    style(upper, "Loss", "nats per token")
    rate_steps, rates = _series(train, "lr")
    lower.plot(_binned(rate_steps), _binned(rates), color=GREEN, linewidth=1.6)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style(lower, "Learning rate", "")
    lower.set_xlabel("step")
    return figure


def _domains_figure(held_out: Records) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axis = figure.subplots()
    domains = sorted({domain for record in held_out for domain in record.get("domain_bpb") or {}})
    for number, domain in enumerate(domains):
        known = [record for record in held_out if domain in (record.get("domain_bpb") or {})]
        steps, bits = _series([{"step": r["step"], "bits": r["domain_bpb"][domain]} for r in known], "bits")
        colour = colormaps["turbo"](0.08 + 0.84 * number / max(1, len(domains) - 1))
        axis.plot(steps, bits, color=colour, marker="o", markersize=3, linewidth=1.4, label=domain)
    axis.legend(frameon=False, fontsize=8, ncols=max(1, len(domains) // 8))
    style(axis, "Held-out bits per byte, by domain", "bits per byte")
    axis.set_xlabel("step")
    return figure


def _experts_figure(train: Records) -> Figure:
    records = [record for record in train if record.get("expert_load")]
    layers = list(records[-1]["expert_load"])
    columns = min(PANEL_COLUMNS, math.ceil(len(layers) ** 0.5))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 7), 2.7 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        _draw_load(axis, layer, records)
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    for column, axis in enumerate(axes[-1]):
        # where the last row is short, its column's lowest panel carries the axis
        lowest = axis if axis.axison else axes[-2][column]
        lowest.set_xlabel("step")
        lowest.tick_params(labelbottom=True)
    limits = f"dead below {DEAD_BELOW:g}, overloaded above {OVERLOADED_ABOVE:g}"
    figure.suptitle(f"Load of each expert, in uniform shares ({limits})", fontsize=11)
    return figure


def _draw_load(axis: Axes, layer: str, records: Records) -> None:
    steps = np.array([record["step"] for record in records if layer in record["expert_load"]], dtype=float)
    shares = [record["expert_load"][layer] for record in records if layer in record["expert_load"]]
    loads = np.array(shares, dtype=float) * len(shares[0])
    steps, loads = _binned(steps), _smooth(_binned(loads))
    num_experts = loads.shape[1]
    for expert, color in enumerate(colormaps["turbo"](np.linspace(0.08, 0.92, num_experts))):
        axis.plot(steps, loads[:, expert], color=color, linewidth=1.2 if num_experts <= 16 else 0.6, alpha=0.85)
    axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axis.axhspan(0, DEAD_BELOW, color="crimson", alpha=0.12, linewidth=0)
    # every panel reaches 2, so that balanced layers are drawn to one scale
    top = 1.05 * np.nanmax(loads, initial=1.9)
    if top > OVERLOADED_ABOVE:
        axis.axhline(OVERLOADED_ABOVE, color="crimson", linewidth=1, linestyle=":")
    axis.set_ylim(0, top)
    style(axis, f"layer {layer} · {num_experts} experts", "")


def _throughput_figure(train: Records) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    steps, rates = _series(train, "tokens_per_second")
    steps, rates = _binned(steps), _binned(rates)
    axis.plot(steps, rates, color=BLUE, alpha=0.3, linewidth=0.9)
    axis.plot(steps, _smooth(rates), color=BLUE, linewidth=1.8)
    if np.isfinite(rates).any():
        median = float(np.nanmedian(rates))
        axis.axhline(median, color=GREY, linewidth=1, linestyle="--", label=f"median {median:,.0f}")
        axis.legend(frameon=False, loc="lower right")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    style(axis, "Throughput", "tokens per second")
    axis.set_xlabel("step")
    return figure


def _page(
    name: str,
    train: Records,
    held_out: Records,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
) -> str:
    last = train[-1]
    lead = f"{last['step']:,} steps"
    if last.get("tokens") is not None:
        lead += f", {last['tokens']:,} tokens"
    sections = [
        _bars(_own_bits(held_out, summary), summary.get("baselines") or {}),
        *(section(title, image(f"{title} over the steps of the run", path)) for title, path in pictures.items()),
        _domains(last, held_out),
        _facts(last, summary),
        _alarms(train),
        _samples(samples),
    ]
    return page(name, lead, sections)


def _own_bits(held_out: Records, summary: Mapping[str, Any]) -> Any:
    measured = [record.get("held_out_bpb") for record in held_out]
    return summary.get("held_out_bpb", measured[-1] if measured else None)


def _bars(own: Any, baselines: Mapping[str, Any]) -> str:
    """Bits per byte of the run and of what it is compared with, the best first; what is no number is left out."""
    named = [(name, bits, False) for name, bits in baselines.items()] + [("this run", own, True)]
    rows = [row for row in named if isinstance(row[1], int | float) and math.isfinite(row[1])]
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1])
    widest = rows[-1][1] or 1.0
    body = "".join(_bar(name, bits, bits / widest, is_own) for name, bits, is_own in rows)
    return section("Held-out bits per byte (less is better)", f'<table class="bars">{body}</table>')


def _bar(name: str, bits: float, width: float, is_own: bool) -> str:
    return (
        f'<tr class="{"own" if is_own else "other"}"><th>{html.escape(name)}</th><td class="number">{bits:.4f}</td>'
        f'<td><span class="bar" style="width:{width:.1%}"></span></td></tr>'
    )


def _domains(last: Mapping[str, Any], held_out: Records) -> str:
    """What each domain gave to training, and how well its held-out text is predicted."""
    tokens = last.get("domain_tokens") or {}
    if not tokens:
        return ""
    measured = next((record for record in reversed(held_out) if record.get("domain_bpb")), {})
    total, head = sum(tokens.values()), ("domain", "tokens", "share", "held-out loss", "bits per byte")
    body = "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"
    for name in sorted(tokens):
        loss, bits = (measured.get(key, {}).get(name, math.nan) for key in ("domain_loss", "domain_bpb"))
        cells = (f"{tokens[name]:,}", f"{tokens[name] / max(total, 1):.1%}", _text(loss), _text(bits))
        body += f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    epochs = ", ".join(f"{name} {_text(value)}" for name, value in (last.get("group_epochs") or {}).items())
    below = f"<p>Epochs: {html.escape(epochs)}.</p>" if epochs else ""
    return section("Domains", f"<table>{body}</table>{below}")


def _facts(last: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in summary.items() if key != "baselines" and key not in BY_DOMAIN}
    final = {key: value for key, value in last.items() if isinstance(value, int | float) and key != "step"}
    body = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_text(value))}</td></tr>"
        for key, value in [*_flat(shown), *((f"last step: {key}", value) for key, value in final.items())]
    )
    return section("Run facts", f"<table>{body}</table>")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    match value:
        case None:
            return "not known"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.4g}"
        case list():
            return ", ".join(_text(item) for item in value)
        case _:
            return str(value)


def _alarms(train: Records) -> str:
    told = [(record["step"], text) for record in train for text in record.get("alarms", [])]
    if not told:
        return ""
    rows = "".join(f"<tr><th>step {step:,}</th><td>{html.escape(text)}</td></tr>" for step, text in told[-30:])
    title = "Router alarms" if len(told) <= 30 else f"Router alarms (the last 30 of {len(told)})"
    return section(title, f'<table class="alarm">{rows}</table>')


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    body = "".join(
        f"<pre><b>{html.escape(str(sample.get('prompt', '')))}</b>{html.escape(str(sample.get('text', '')))}</pre>"
        for sample in samples
    )
    return section("Samples (prompt in bold)", body) if body else ""
