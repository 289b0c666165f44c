"""Every mixer against a peer of equal shape, and the growth of its time with the length of the sequence, on one thread.

Peers run in the same loop, turn by turn; the median of CPU time is compared, because a shared machine drifts more than
two programs differ. A ``..._vs_...`` ratio above 1 means that ours is faster; ``growth_...`` is the time of a token at
8,192 positions over that at 512; ``lory_overhead`` is the time of a LORY layer over a dense one of its active size,
minus 1. The peers are not dependencies of LightBulb: ``pip install -e ".[bench]"``. The last line printed is JSON.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from mixer_peers import attention, experts, feedforward, growth, recurrent, sparse
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightbulb.config import Config
from lightbulb.mixers.base import TokenMixerConfig
from lightbulb.registry import lookup

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

TOPICS: dict[str, Callable[[int], dict[str, float]]] = {
    "attention": attention.measure,
    "sparse": sparse.measure,
    "recurrent": recurrent.measure,
    "feedforward": feedforward.measure,
    "experts": experts.measure,
}
GOALS: dict[str, Callable[[dict[str, float]], bool]] = {
    "mamba_vs_hf": lambda r: r["mamba_vs_hf"] >= 3,
    "mamba_vs_mambapy": lambda r: r["mamba_vs_mambapy"] > 1,
    "retention_vs_xtransformers": lambda r: r["retention_vs_xtransformers"] >= 1,
    "attention_vs_xtransformers": lambda r: r["attention_vs_xtransformers"] >= 1,
    "kan_vs_pykan": lambda r: r["kan_vs_pykan"] >= 50,
    "switch_vs_mixtral": lambda r: r["switch_vs_mixtral"] >= 1,
    "deepseek_moe_vs_olmoe": lambda r: r["deepseek_moe_vs_olmoe"] >= 1,
    "lory_overhead": lambda r: r["lory_overhead"] <= r["lory_overhead_bound"],
    "block_sparse_vs_dense_4k": lambda r: r["block_sparse_vs_dense_4k"] >= 3,
    "growth_retention": lambda r: r["growth_retention"] <= 1.3,
    "growth_mamba": lambda r: r["growth_mamba"] <= 1.3,
    "growth_infini": lambda r: r["growth_infini"] <= 1.3,
    "growth_block_sparse": lambda r: r["growth_block_sparse"] <= 1.3,
}
DIM = 256
GROWING: dict[str, dict[str, object]] = {
    "attention": {"type": "attention", "num_heads": 4},
    "retention": {"type": "retention", "num_heads": 4},
    "mamba": {"type": "mamba", "state_dim": 64},
    "infini": {"type": "infini", "num_heads": 4, "segment_length": 256},
    "block_sparse": {"type": "block_sparse", "num_heads": 4, "window": 256},
}
"""Token mixers whose growth is drawn, with :data:`DIM` features."""


def main() -> int:
    """Measure, print, draw, write; 0 when every goal is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender (default 7)")
    parser.add_argument("--only", choices=[*TOPICS, "growth"], nargs="*", help="measure these topics only")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the growth curves")
    arguments = parser.parse_args()
    wanted = arguments.only or [*TOPICS, "growth"]
    results: dict[str, float] = {}
    for topic in [name for name in TOPICS if name in wanted]:
        results |= TOPICS[topic](arguments.rounds)
    curves: dict[str, dict[int, float]] = {}
    if "growth" in wanted:
        for name in track(GROWING, "growth", console=Console(stderr=True)):
            curves[name] = growth.seconds_per_token(_config(GROWING[name]), DIM, rounds=max(2, arguments.rounds // 2))
            results[f"growth_{name}"] = growth.ratio(curves[name])
    reached = {name: goal(results) for name, goal in GOALS.items() if name in results}
    _show(results, reached)
    if arguments.plot and curves:
        _draw(curves, arguments.plot)
    line = json.dumps({name: round(value, 3) for name, value in results.items()})
    if arguments.json:
        record = {"results": results, "reached": reached, "seconds_per_token": curves, "machine": _machine()}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(line)
    return 0 if all(reached.values()) else 1


def _config(values: dict[str, object]) -> TokenMixerConfig:
    cls: type[Config] = lookup("token_mixer", str(values["type"]))  # type: ignore[assignment]
    return cls.model_validate(values)  # type: ignore[return-value]


def _machine() -> dict[str, object]:
    return {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.processor()}


def _show(results: dict[str, float], reached: dict[str, bool]) -> None:
    table = Table("measure", "value", "goal", title="mixers, one thread, float32, forward and backward")
    for name, value in results.items():
        goal = "" if name not in reached else "reached" if reached[name] else "[red]missed[/red]"
        table.add_row(name, f"{value:.3f}", goal)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, seconds in curves.items():
        axis.plot(list(seconds), [1e6 * value for value in seconds.values()], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="length of the sequence", ylabel="µs per token, forward and backward")
    axis.set_xticks(list(next(iter(curves.values()))), [str(length) for length in next(iter(curves.values()))])
    axis.minorticks_off()
    axis.set_title(f"token mixers of {DIM} features, one CPU thread, float32", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
