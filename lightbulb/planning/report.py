"""The choice of a layout in words and numbers, for `lightbulb doctor --config`."""

from typing import Any

import torch

from lightbulb.config import load_config
from lightbulb.parallel.host import pick_precision
from lightbulb.planning.layout import GIB, USABLE, Choice, choose_layout
from lightbulb.planning.survey import memory_per_rank
from lightbulb.train.config import RunConfig

MAX_SHOWN = 6
"""Rejected layouts that are listed."""


def plan(path: str, ranks: int | None, ranks_per_node: int | None, memory_gib: float | None) -> dict[str, Any]:
    """Choose degrees for a run file.

    Args:
        path: the run file.
        ranks: processes over all machines; None for this machine's GPUs, or one.
        ranks_per_node: processes of one machine; None for all.
        memory_gib: of one rank's device; None to ask this machine.

    Returns:
        ``fits``, ``reason``, ``lines`` to print and, when there is one, ``parallel`` and ``gib`` by kind.

    Raises:
        ConfigError: the run file cannot be used.
    """
    run = load_config(RunConfig, path)
    ranks = ranks or torch.cuda.device_count() or 1
    per_node = ranks_per_node or ranks
    rank_bytes = memory_gib * GIB if memory_gib else float(memory_per_rank(per_node))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = run.train.precision if run.train.precision != "auto" else pick_precision(device, run.model.dim)
    choice = choose_layout(run, ranks, per_node, rank_bytes, precision == "bf16")
    if choice is None:
        reason = f"no layout splits model and batch over {ranks} ranks; change --ranks or train.global_batch_size"
        return {"fits": False, "reason": reason, "lines": []}
    lines = [
        f"layout of {path} on {ranks} ranks ({precision}, {rank_bytes / GIB:.1f} GiB a rank, {USABLE:.0%} used)",
        *(f"  rejected: {sentence}" for sentence in choice.rejected[:MAX_SHOWN]),
    ]
    if len(choice.rejected) > MAX_SHOWN:
        lines.append(f"  and {len(choice.rejected) - MAX_SHOWN} more")
    lines.append(f"  {'chosen' if choice.fits else 'needs least'}: {choice.parallel.label()}, {_breakdown(choice)}")
    values = choice.parallel.model_dump()
    lines.append(f"  parallel: {{{', '.join(f'{axis}: {values[axis]}' for axis in ('tensor', 'pipeline', 'expert'))}}}")
    reason = "" if choice.fits else (
        f"even {choice.parallel.label()} needs {choice.memory.total / GIB:.1f} GiB a rank; use more ranks, bf16, a "
        "smaller train.micro_batch_size or a smaller model"
    )  # fmt: skip
    gib = {kind: round(value / GIB, 3) for kind, value in choice.memory._asdict().items()}
    return {"fits": choice.fits, "reason": reason, "lines": lines, "parallel": values, "gib": gib}


def _breakdown(choice: Choice) -> str:
    parts = ", ".join(f"{kind} {value / GIB:.2f}" for kind, value in choice.memory._asdict().items())
    return f"{choice.memory.total / GIB:.1f} GiB a rank ({parts})"
