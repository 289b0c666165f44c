"""Does the best learning rate stay put when a model gets wider? With width scaling, and without it.

Small models of several widths learn the bytes of Python's standard library at a row of learning rates, each twice the
one before, with ``model.scaling`` (MiniCPM, Hu et al. 2024, arXiv:2404.06395) and without. A parabola through the three
losses around the lowest one gives the best rate between the trials. ``shift_with`` and ``shift_without`` are the
greatest ratio of two widths' best rates; the rules do their work where the first is below 2. Of ``at_edge`` the best
rate may lie beyond those that were tried, and a shift is the least it can be. The last line is JSON.
"""

import argparse
import json
import math
import sys
import sysconfig
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightbulb.config import build_config
from lightbulb.data.loader import Batch
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.host import process_group
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.train.schedule import ScheduleConfig, learning_rate_factor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

LENGTH, BATCH, HEAD_DIM, LAYERS, BASE = 128, 8, 32, 2, 64
LAST = 0.2
"""Share of the steps whose mean loss counts."""


def main() -> int:
    """Train, print, draw, write; 0 when the best rates with scaling are within those tried and a factor of 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="default 64 128 256")
    parser.add_argument("--rates", type=int, nargs=2, default=[-10, -4], help="powers of 2, default -10 to -4")
    parser.add_argument("--steps", type=int, default=300, help="of every training (default 300)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind (default 1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write width_scaling.json and .png there")
    arguments = parser.parse_args()
    rates = [2.0**power for power in range(arguments.rates[0], arguments.rates[1] + 1)]
    text = standard_library(arguments.steps * BATCH * LENGTH * 2)
    trials = [(scaled, width, lr) for scaled in (True, False) for width in arguments.widths for lr in rates]
    losses: dict[tuple[bool, int], list[float]] = {}
    with process_group(torch.device("cpu"), 3600.0):
        for scaled, width, lr in track(trials, "training", console=Console(stderr=True)):
            found = [trained(scaled, width, lr, arguments.steps, text, seed) for seed in range(arguments.seeds)]
            losses.setdefault((scaled, width), []).append(float(np.mean(found)))
    best = {key: best_rate(rates, values) for key, values in losses.items()}
    result = {
        name: shift([best[scaled, width] for width in arguments.widths])
        for name, scaled in (("shift_with", True), ("shift_without", False))
    }
    at_edge = [label(*key) for key, values in losses.items() if int(np.argmin(values)) in (0, len(rates) - 1)]
    show(rates, losses, best)
    if arguments.output:
        draw(rates, losses, arguments.output / "width_scaling.png")
        record = {
            "result": result, "at_edge": at_edge, "rates": rates, "steps": arguments.steps, "seeds": arguments.seeds,
            "losses": {f"{label(*key)}": values for key, values in losses.items()},
            "best": {f"{label(*key)}": rate for key, rate in best.items()},
        }  # fmt: skip
        (arguments.output / "width_scaling.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: round(value, 3) for name, value in result.items()} | {"at_edge": at_edge}))
    is_known = not any(label(True, width) in at_edge for width in arguments.widths)
    return 0 if is_known and result["shift_with"] < 2 else 1


def standard_library(size: int) -> torch.Tensor:
    """So many bytes of the standard library's modules, in the order of their names."""
    content = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content += path.read_bytes()
    return torch.tensor(np.frombuffer(content, np.uint8)[:size].astype(np.int64))


def trained(scaled: bool, width: int, lr: float, steps: int, text: torch.Tensor, seed: int) -> float:
    """Mean loss in nats of the last steps of one training; infinite if it went astray."""
    block = {
        "token": {"type": "attention", "num_heads": width // HEAD_DIM},
        "channel": {"type": "mlp", "hidden_dim": 3 * width},
    }
    values: dict[str, object] = {
        "vocab_size": 256, "dim": width, "num_layers": LAYERS, "context_length": LENGTH, "block_pattern": [block],
        "init_std": 0.08,
    }  # fmt: skip
    if scaled:
        values["scaling"] = {"base_dim": BASE, "scale_emb": 1.0, "scale_depth": 1.4}
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.0)
    schedule = ScheduleConfig(warmup=0.1, decay=0.0)
    model = build_config(LanguageConfig, values)
    engine = Engine(model, ParallelConfig().resolve(1), optimizer, "fp32", seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    try:
        for step in range(steps):
            engine.forward_backward([batch(text, generator)])
            losses.append(engine.update(lr * learning_rate_factor(schedule, step, steps)).loss)
    finally:
        engine.close()
    last = losses[-max(1, round(LAST * steps)) :]
    return float(np.mean(last)) if all(map(math.isfinite, last)) else math.inf


def batch(text: torch.Tensor, generator: torch.Generator) -> Batch:
    """Random pieces of the text."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None, torch.arange(BATCH), torch.zeros(BATCH))


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The vertex of the parabola, over the logarithm of the rate, through the lowest loss and its neighbours."""
    low = int(np.argmin(losses))
    if low in (0, len(rates) - 1) or not all(map(math.isfinite, losses[low - 1 : low + 2])):
        return rates[low]
    left, middle, right = losses[low - 1 : low + 2]
    return rates[low] * 2 ** (0.5 * (left - right) / (left - 2 * middle + right))


def shift(best: list[float]) -> float:
    """Greatest ratio of two best rates."""
    return max(best) / min(best)


def label(scaled: bool, width: int) -> str:
    """Such as `with, 64`."""
    return f"{'with' if scaled else 'without'}, {width}"


def show(rates: list[float], losses: dict[tuple[bool, int], list[float]], best: dict[tuple[bool, int], float]) -> None:
    """Print the losses and the best rates."""
    table = Table("scaling, width", *[f"2^{round(math.log2(rate))}" for rate in rates], "best", title="loss in nats")
    for key, values in losses.items():
        table.add_row(label(*key), *[f"{value:.3f}" for value in values], f"2^{math.log2(best[key]):.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(rates: list[float], losses: dict[tuple[bool, int], list[float]], path: Path) -> None:
    """Loss over learning rate, with and without scaling."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, scaled in zip(axes, (True, False), strict=True):
        for (is_scaled, width), values in losses.items():
            if is_scaled == scaled:
                axis.plot(rates, values, marker="o", label=f"width {width}")
        axis.set(xscale="log", xlabel="learning rate", title=f"{'with' if scaled else 'without'} scaling")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("loss of the last steps, nats per byte")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
