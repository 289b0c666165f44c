"""What a layout costs: two processes of one thread against one process of one thread, on the same global batch.

Every round trains a few steps on one process, then on each layout of two (data, tensor, tensor with sequence
parallelism, pipeline, interleaved pipeline, Ulysses, expert), so that a drifting machine meets all of them alike; the
median over rounds counts. Efficiency is the time of one process over twice the time of two. Beside it, from
instrumented steps of their own:

- the bytes each rank hands to collectives and messages in a step, and the time these take (`gloo:` spans of the
  profiler; they may overlap computation);
- the ceiling: how fast two processes that share nothing run on this machine, which no layout can exceed;
- the adapter's share of a step: the time in the functions that stand in for Megatron-core's CUDA ones.

The last line printed is JSON.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightbulb.config import build_config
from lightbulb.evaluation.trial import SyntheticBatch, Trial, global_batch
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise
from lightbulb.parallel import megatron_cpu
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.host import tune_allocator
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

MODEL = {
    "vocab_size": 4096,
    "dim": 256,
    "num_layers": 4,
    "context_length": 256,
    "block_pattern": [
        {
            "token": {"type": "attention", "num_heads": 8, "num_kv_heads": 4},
            "channel": {"type": "switch", "num_experts": 8, "hidden_dim": 512, "router": {"top_k": 2}},
        }
    ],
}
BATCH, MICRO_BATCH = 16, 2
ONE = ParallelConfig(data=1)
LAYOUTS = {
    "dp2": ParallelConfig(data=2),
    "tp2": ParallelConfig(tensor=2, data=1),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, data=1),
    "pp2": ParallelConfig(pipeline=2, data=1),
    "pp2_interleaved": ParallelConfig(pipeline=2, interleave=2, data=1),
    "ul2": ParallelConfig(ulysses=2, data=1),
    "ep2": ParallelConfig(expert=2, data=2),
}


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that go into collectives and messages, between more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "recv" not in func.name() and _group_size(args) > 1:
            sent = args[1] if "allgather" in func.name() or "alltoall" in func.name() else args[0]
            tensors = [sent] if isinstance(sent, torch.Tensor) else torch.utils._pytree.tree_leaves(sent)
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return 0


def trial() -> Trial:
    """The model and its batches."""
    return Trial(build_config(LanguageConfig, MODEL), OptimizerConfig(lr=1e-3), 0, 1, BATCH)


def batches(engine: Engine, parallel: ParallelConfig, step: int) -> list[SyntheticBatch]:
    """This rank's micro-batches of a step."""
    whole, rows = global_batch(trial(), step), BATCH // (parallel.data or 1)
    starts = range(engine.data_rank * rows, (engine.data_rank + 1) * rows, MICRO_BATCH)
    parts = [[None if t is None else t[i : i + MICRO_BATCH] for t in whole] for i in starts]
    return [SyntheticBatch(*part) for part in parts]  # type: ignore[arg-type]


def time_steps(rank: int, parallel: ParallelConfig, steps: int, instrumented: bool) -> dict[str, float]:
    """Median seconds of a step, or what the instruments of one step say (a job of a rank pool)."""
    tune_allocator()
    engine = Engine(trial().model, parallel, trial().optimizer, "fp32", 0, torch.device("cpu"))
    engine.train_step(batches(engine, parallel, 0), 1e-3)
    if instrumented:
        found = _instrument(engine, parallel)
    else:
        seconds = []
        for step in range(steps):
            mine = batches(engine, parallel, step + 1)
            dist.barrier()
            started = time.perf_counter()
            engine.train_step(mine, 1e-3)
            seconds.append(time.perf_counter() - started)
        found = {"seconds": statistics.median(seconds)}
    engine.close()
    return found


def _instrument(engine: Engine, parallel: ParallelConfig) -> dict[str, float]:
    counter = CountBytes()
    with counter:
        engine.train_step(batches(engine, parallel, 1), 1e-3)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.train_step(batches(engine, parallel, 2), 1e-3)
    spans = [event.cpu_time_total for event in profiler.key_averages() if event.key.startswith("gloo:")]
    started = time.perf_counter()
    engine.train_step(batches(engine, parallel, 3), 1e-3)
    step = time.perf_counter() - started
    share = _adapter(engine, parallel) / step
    return {"bytes": counter.bytes, "communication_seconds": sum(spans) / 1e6, "adapter_share": share}


def _adapter(engine: Engine, parallel: ParallelConfig) -> float:
    """Seconds a step spends in the adapter's functions, the norm that CUDA would need too included; its replaced
    constants cost nothing."""
    engine.forward_backward(batches(engine, parallel, 4))
    engine.optimizer.prepare_grads()
    links = engine.optimizer.chained_optimizers
    gradients = [gradient for link in links for gradient in link.get_main_grads_for_grad_norm()]
    started = time.perf_counter()
    megatron_cpu.l2_norm(65536, torch.zeros(1), [gradients])
    norm = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(1000):
        megatron_cpu._CPU_TORCH.cuda.current_device()
    return norm + 100 * (time.perf_counter() - started) / 1000  # far fewer than 100 messages and buffers in a step


def time_alone(rank: int, world_size: int, steps: int) -> float:
    """Seconds of a plain forward and backward while ``world_size`` processes do the same and exchange nothing."""
    tune_allocator()
    model = trial().model.build()
    initialise(model, 0)
    whole = global_batch(trial(), 0)
    part = [None if t is None else t[:MICRO_BATCH] for t in whole]
    noise = Noise(0, whole.sample_ids[:MICRO_BATCH], whole.tokens.shape[1])
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(2):
            model(*part[:3], noise).sum().backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(rounds: int, steps: int, console: Console) -> dict[str, Any]:
    """All figures, times as medians over rounds."""
    times: dict[str, list[float]] = {name: [] for name in ("one", *LAYOUTS)}
    ceilings: list[float] = []
    with RankPool(2) as pool:
        for number in range(rounds):
            for name, parallel in {"one": ONE, **LAYOUTS}.items():
                ranks = parallel.copies * (parallel.data or 1)
                found = pool.run(ranks, time_steps, parallel, steps, False)
                times[name].append(max(rank["seconds"] for rank in found))
            alone, both = (max(pool.run(ranks, time_alone, ranks, steps)) for ranks in (1, 2))
            ceilings.append(alone / both)
            console.print(f"round {number + 1} of {rounds} done")
        instruments = {}
        for name, parallel in LAYOUTS.items():
            found = pool.run(2, time_steps, parallel, steps, True)
            instruments[name] = {key: max(rank[key] for rank in found) for key in found[0]}
    one = statistics.median(times["one"])
    layouts = {}
    for name in LAYOUTS:
        ratios = [single / (2 * double) for single, double in zip(times["one"], times[name], strict=True)]
        layouts[name] = {
            "efficiency": statistics.median(ratios),
            "seconds": statistics.median(times[name]),
            **instruments[name],
        }
    return {"seconds_one": one, "ceiling": statistics.median(ceilings), "layouts": layouts}


def show(found: dict[str, Any], console: Console) -> None:
    """The table."""
    title = f"two processes against one ({found['seconds_one']:.2f} s a step); machine ceiling {found['ceiling']:.2f}"
    table = Table("layout", "efficiency", "of ceiling", "s a step", "MB sent", "s in gloo", "adapter", title=title)
    for name, row in found["layouts"].items():
        table.add_row(
            name,
            f"{row['efficiency']:.2f}",
            f"{row['efficiency'] / found['ceiling']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['communication_seconds']:.2f}",
            f"{row['adapter_share']:.2%}",
        )
    console.print(table)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each layout in a round")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    args = parser.parse_args()
    console = Console(width=110)
    found = measure(args.rounds, args.steps, console)
    show(found, console)
    result = {
        **{f"efficiency_{name}": round(row["efficiency"], 3) for name, row in found["layouts"].items()},
        "adapter_share": round(max(row["adapter_share"] for row in found["layouts"].values()), 5),
        "machine_ceiling": round(found["ceiling"], 3),
        "details": found,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
