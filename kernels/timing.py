"""Timing in turns: what is compared runs in the same loop, so that a slow minute of the machine hits all sides."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]

_FLUSH_BYTES = 1 << 28  # more than any GPU's cache


def arguments(doc: str, rounds: int = 15, **own: dict[str, Any]) -> argparse.Namespace:
    """The arguments of a benchmark: ``--threads``, which are set, and ``--rounds``.

    Args:
        doc: what the help says.
        rounds: default.
        own: further ones, each with what ``add_argument`` takes.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    for name, how in own.items():
        parser.add_argument(f"--{name}", **how)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def interleaved(contenders: Mapping[str, Run], rounds: int = 15, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every round of each contender, the order turning from round to round.

    On a GPU: time between events, the cache flushed before. On one CPU thread: CPU time of the thread, which
    neighbours on the machine disturb least. On more: wall time.
    """
    seconds_of = _gpu_seconds if torch.cuda.is_available() else _cpu_seconds
    for _ in range(warmup):
        for run in contenders.values():
            run()
    names, seconds = list(contenders), {name: [] for name in contenders}  # type: ignore[var-annotated]
    for round_number in range(rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(seconds_of(contenders[name]))
    return seconds


def ratio(seconds: Mapping[str, list[float]], peer: str, ours: str = "ours") -> float:
    """How many times faster than the peer: the median over rounds of its time by ours."""
    return statistics.median(theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True))


def memory_bound(op: str, title: str, steps: Mapping[str, tuple[Mapping[str, Run], int]], rounds: int) -> None:
    """Compare elementwise operations, whose limit is a copy that moves as many bytes, and :func:`report` them.

    Args:
        op: name of the operation.
        title: what was computed.
        steps: name to contenders, among them "ours", and the bytes that must be read and written.
        rounds: of each step.
    """
    table: list[dict[str, Any]] = []
    result: dict[str, Any] = {"op": op}
    for name, (contenders, moved) in steps.items():
        seconds = interleaved({**contenders, "copy": _copy(moved)}, rounds)
        row = {"step": name, "ms": statistics.median(seconds["ours"]) * 1e3}
        row |= {f"vs {peer}": ratio(seconds, peer) for peer in contenders if peer != "ours"}
        table.append(row | {"of limit": ratio(seconds, "copy")})
        result |= {
            f"{name} {key}".replace(" ", "_"): round(value, 4) for key, value in table[-1].items() if key != "step"
        }
    report(title, table, result)


def graphed(run: Run) -> Run:
    """The same as a CUDA graph, so that launching costs next to nothing; on the CPU unchanged."""
    if not torch.cuda.is_available():
        return run
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bytes_per_second(size: int = 1 << 27) -> float:
    """What this machine reads and writes in a copy, on the threads in use: the limit of what memory bounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(interleaved({"copy": lambda: target.copy_(source)}, 7)["copy"])


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of the rows, all with the same keys."""
    print(title)
    if rows:
        names = list(rows[0])
        cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
        for row in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def named(step: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The ratios ("vs PEER") and fractions ("of LIMIT") of a row as ``STEP_vs_PEER`` and ``STEP_of_LIMIT``, the names
    that the plot of all kernels reads."""
    found = {key: value for key, value in row.items() if key.startswith(("vs ", "of ")) and isinstance(value, float)}
    return {f"{step} {key}".replace(" ", "_"): round(value, 4) for key, value in found.items()}


def report(title: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """:func:`show` the rows, then print the result with :func:`machine` as one line of JSON, the last."""
    show(title, rows)
    print(json.dumps(result | machine()))


def _copy(moved: int) -> Run:
    """A copy that reads and writes so many bytes in all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _cpu_seconds(run: Run) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


def _gpu_seconds(run: Run) -> float:
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
