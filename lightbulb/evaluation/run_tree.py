"""Runs and what they were made of, as a tree: from ``origin.json`` of each, back to the runs that began by themselves.

A run with several parents (an upcycling) stands below the first; the others are named beside it, and the picture has a
line from each.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from matplotlib.figure import Figure
from rich.markup import escape
from rich.tree import Tree

from lightbulb.evaluation.results import FILE, newest
from lightbulb.folder import explained
from lightbulb.train.manifest import complete_checkpoints, read_state
from lightbulb.train.metrics import FILE_NAME, read_metrics
from lightbulb.train.origin import Origin, locate, read_origin

COLOURS = {
    "pretrain": "#7a8699", "start": "#7a8699", "branch": "#2f6fde", "decay": "#e07b1a", "upcycle": "#2a9d6f",
    "import": "#8a5fc7", "finetune": "#c23b5a",
}  # fmt: skip
"""Of a kind of run in the picture."""


@dataclass
class Node:
    """A run.

    Attributes:
        run: its folder.
        kind: of its origin; ``pretrain`` for one that began by itself, ``gone`` for a parent that is not there.
        parents: what it was made of, the first of which it stands below.
        left_at: step of the first parent's checkpoint.
        children: runs that stand below it.
        steps: it has trained, those of the run it was forked from included; None if nothing says so.
        tokens: as ``steps``.
        bpb: held-out bits per byte, last measured.
    """

    run: Path
    kind: str
    parents: list["Node"] = field(default_factory=list)
    left_at: int | None = None
    children: list["Node"] = field(default_factory=list)
    steps: int | None = None
    tokens: int | None = None
    bpb: float | None = None

    @property
    def name(self) -> str:
        """The folder's last part, with its parent's where that says more: ``seed-decay-400/flat``."""
        within = self.parents and self.run.parent.name.startswith(self.parents[0].run.name)
        return f"{self.run.parent.name}/{self.run.name}" if within else self.run.name

    @property
    def facts(self) -> list[str]:
        """What is known of it, each in a few words."""
        found = [f"{self.kind} from step {self.left_at:,}" if self.left_at is not None else self.kind]
        found += [f"with {', '.join(parent.name for parent in self.parents[1:])}"] if len(self.parents) > 1 else []
        found += [f"{self.steps:,} steps"] if self.steps is not None else []
        found += [f"{self.tokens:,} tokens"] if self.tokens is not None else []
        return found + ([f"{self.bpb:.4f} bits/byte"] if self.bpb is not None else [])


def run_tree(runs: Sequence[Path]) -> list[Node]:
    """The runs and all they come from, as the roots of trees.

    Raises:
        FileNotFoundError: one of the runs is no folder.
        CheckpointError: an ``origin.json`` or a checkpoint's state is damaged.
        ValueError: metrics, summary or evaluation of a run are damaged.
    """
    known: dict[Path, Node] = {}
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such folder; name folders of runs")
        _add(run.resolve(), known)
    return [node for node in known.values() if not node.parents]


def console_tree(roots: Sequence[Node]) -> Tree:
    """For a console."""
    whole = Tree("runs", hide_root=True)
    for root in roots:
        _grow(whole, root)
    return whole


def draw_tree(roots: Sequence[Node], path: Path) -> None:
    """As a picture: a column per generation, a line from each parent.

    Raises:
        FolderError: it cannot be written.
    """
    rows = {id(node): row for row, (_, node) in enumerate(_walk(roots))}
    nodes = list(_walk(roots))
    columns = 1 + max((depth for depth, _ in nodes), default=0)
    figure = Figure(figsize=(1.2 + 3.3 * columns, 0.6 + 0.62 * max(len(nodes), 1)), layout="constrained")
    axis = figure.subplots()
    depths = {id(node): depth for depth, node in nodes}
    for depth, node in nodes:
        row, colour = rows[id(node)], COLOURS.get(node.kind, "#b8c0cc")
        for number, parent in enumerate(node.parents):
            corner = depths[id(parent)] + 0.03
            style: dict[str, Any] = {
                "color": "#b8c0cc",
                "linewidth": 1.2,
                "linestyle": "-" if number == 0 else ":",
                "zorder": 1,
            }
            axis.plot([corner, corner, depth], [rows[id(parent)], row, row], **style)
        axis.scatter([depth], [row], s=70, color=colour, zorder=2)
        axis.annotate(node.name, (depth, row), (9, 3), textcoords="offset points", fontsize=9, fontweight="bold")
        facts = " · ".join(node.facts)
        axis.annotate(facts, (depth, row), (9, -9), textcoords="offset points", fontsize=7, color="#55606f")
    axis.set_xlim(-0.15, columns + 0.1)
    axis.set_ylim(len(nodes) - 0.4, -0.6)
    axis.axis("off")
    with explained(path):
        figure.savefig(path, dpi=130, facecolor="white")


def _add(run: Path, known: dict[Path, Node]) -> Node:
    """The node of a run; it and its ancestors are added where they are not known."""
    if run in known:
        return known[run]
    origin = read_origin(run)
    node = known[run] = Node(run, "pretrain" if origin is None else origin.kind, **_measured(run))
    if origin is not None:
        node.parents = _parents(run, origin, known)
        node.left_at = origin.parents[0].step
        node.parents[0].children.append(node)
    return node


def _parents(run: Path, origin: Origin, known: dict[Path, Node]) -> list[Node]:
    found: list[Node] = []
    for parent in origin.parents:
        if (folder := locate(run, parent)) is not None:
            node = _add(folder.resolve(), known)
        else:
            node = known.setdefault(Path(parent.run), Node(Path(parent.run), "gone"))
        found += [node] if node not in found else []
    return found


def _measured(run: Path) -> dict[str, Any]:
    """Steps, tokens and bits per byte: of the summary, else of the metrics, else of the newest checkpoint."""
    if (run / "summary.json").is_file():
        try:
            summary = orjson.loads((run / "summary.json").read_bytes())
            return {"steps": summary["steps"], "tokens": summary["tokens"], "bpb": summary.get("held_out_bpb")}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{run / 'summary.json'}: damaged ({error}); remove it") from None
    found: dict[str, Any] = {}
    if (run / FILE_NAME).is_file():
        for record in read_metrics(run):
            if record["kind"] == "train":
                found |= {"steps": record["step"], "tokens": record["tokens"]}
            elif record["kind"] == "eval":
                found["bpb"] = record["held_out_bpb"]
    elif checkpoints := complete_checkpoints(run):
        state = read_state(checkpoints[0])
        found = {"steps": state.step, "tokens": state.tokens}
    return {"bpb": newest(run / FILE).get("bpb")} | found


def _grow(tree: Tree, node: Node) -> None:
    branch = tree.add(f"[bold]{escape(node.name)}[/bold]  {escape(' · '.join(node.facts))}")
    for child in node.children:
        _grow(branch, child)


def _walk(nodes: Sequence[Node], depth: int = 0) -> Iterator[tuple[int, Node]]:
    """Generation and node, parents before their children."""
    for node in nodes:
        yield depth, node
        yield from _walk(node.children, depth + 1)
