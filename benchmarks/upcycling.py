"""Does it pay to grow a mixture of experts from a dense model? LightBulb's ways, at equal total training FLOPs.

One small dense model (the seed) is trained on five domains of real text. Then every arm may spend the same FLOPs on
what it makes of the seed, branches included: go on as it is, branch by clusters and vote (c-BTM), become a mixture of
copies (sparse upcycling, Drop-Upcycling) or of branches (Branch-Train-MiX, with attention experts, with a trunk that
branches share every so many steps). Held-out bits per byte are compared with continued dense training within a seed.

::

    python benchmarks/upcycling.py --quick --json                         # two seeds in ten minutes on two cores
    python benchmarks/upcycling.py --corpora DIR --output docs/results    # three seeds, all arms
    python benchmarks/upcycling.py --corpora DIR --tune                   # how the learning rates were chosen

Without ``--corpora`` (whose files growth/texts.py names) the domains are what every machine with LightBulb has. Results
are kept in the work folder under a hash of all they depend on; killed, the same command goes on. With ``--json`` the
last line printed is JSON: ``[mean difference, standard deviation]`` of each arm, the seed and continued dense absolute.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core, before torch is loaded

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from growth.corpora import CLUSTERS, CONTEXT, VOCABULARY, domain_shares, write_corpora
from growth.plan import BASELINE, SEED_LENGTHS, Plan, Scale, Tuned
from growth.results import (
    arm_results,
    crossing,
    draw_communication,
    draw_differences,
    draw_seed_lengths,
    draw_shares,
    is_equal_flops,
    markdown,
    summary,
    table,
)
from growth.scheduling import Sweep, SweepError
from growth.training import run_task
from rich.console import Console

FULL, QUICK = Scale(1_000_000, 1_600_000), Scale(400_000, 640_000)
DOMAIN_BYTES = 1_200_000
TUNING_SEED = 99
GRID: list[tuple[dict[str, Any], Sequence[str]]] = [
    ({"lr": 2e-3}, ["continued_dense"]),
    ({"lr": 8e-3}, ["continued_dense"]),
    ({"moe_lr": 2e-3}, ["sparse_centroid"]),
    ({"moe_lr": 8e-3}, ["sparse_centroid"]),
    ({"branch_lr": 2e-3}, ["btx_centroid"]),
    ({"branch_rows": 2}, ["sync_8"]),
    ({"outer_lr": 0.7, "outer_momentum": 0.9}, ["sync_8"]),
    ({"keep_moments": True}, ["sparse_centroid", "btx_centroid"]),
    ({"router_scale": 3.0}, ["sparse_centroid"]),
]
"""Changes of :class:`Tuned` that were tried, and by which arms they are judged."""


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    options = _parser().parse_args(argv)
    work = options.work.expanduser().resolve()
    sweep = Sweep(work, run_task, options.workers)
    try:
        corpus = sweep.apart("corpora", write_corpora, options.corpora, work, DOMAIN_BYTES)
        scale = Scale(*options.tokens) if options.tokens else QUICK if options.quick else FULL
        plan = Plan(scale, Tuned(), domain_shares(corpus), options.quick)
        if options.tune:
            return tune(sweep, plan, corpus["digest"], options.output)
        seeds = options.seeds or ([0, 1] if options.quick else [0, 1, 2])
        keys = {seed: plan.keys(seed, corpus["digest"]) for seed in seeds}
        wanted = [plan.arms[name].task for name in options.arms or plan.arms]
        if not options.report:
            sweep.complete(plan.tasks, keys, wanted)
    except (FileNotFoundError, KeyError, SweepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    results = arm_results(plan, seeds, lambda task, seed: sweep.result(keys[seed][task]))
    Console(width=160).print(table(results))
    print(crossing(results, plan))
    line = summary(results, plan, seeds)
    if options.output is not None:
        write(options.output, plan, results, line, corpus)
    if options.json:
        print(json.dumps(line))
    return 0


def tune(sweep: Sweep, plan: Plan, corpus: str, output: Path | None) -> int:
    """Try every change of the grid on a seed that is not reported, and print what it gives beside no change; written
    to ``cbtx-tuning.md`` in a folder for results too."""
    tried: list[tuple[dict[str, Any], Sequence[str]]] = [({}, sorted({arm for _, arms in GRID for arm in arms})), *GRID]
    rows = ["| change | arm | bits/byte |", "| --- | --- | --- |"]
    for change, arms in tried:
        changed = Plan(plan.scale, replace(plan.tuned, **change), plan.shares, quick=False)
        keys = {TUNING_SEED: changed.keys(TUNING_SEED, corpus)}
        sweep.complete(changed.tasks, keys, [changed.arms[name].task for name in arms])
        for name in arms:
            arm = changed.arms[name]
            found = sweep.result(keys[TUNING_SEED][arm.task])
            assert found is not None
            setting = ", ".join(f"{field} = {value}" for field, value in change.items()) or "none"
            rows.append(f"| {setting} | {arm.label} | {found[arm.value]:.4f} |")
            print(rows[-1], flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "cbtx-tuning.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0


def write(folder: Path, plan: Plan, results: dict[str, Any], line: dict[str, Any], corpus: dict[str, Any]) -> None:
    """All figures as JSON, the table as Markdown, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "summary": line,
        "scale": asdict(plan.scale),
        "tuned": asdict(plan.tuned),
        "corpus": {"domains": corpus["domains"], "context": CONTEXT, "vocabulary": VOCABULARY, "clusters": CLUSTERS},
        "budget_flops": plan.budget,
        "parameters": {"dense": plan.dense.cost().params, "mixture": plan.mixture.cost().params},
        "active_parameters": {"dense": plan.dense.cost().active_params, "mixture": plan.mixture.cost().active_params},
        "largest_flops_gap": max(is_equal_flops(plan).values()),
        "python": platform.python_version(),
        "arms": results,
    }
    (folder / "cbtx.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "cbtx-table.md").write_text(markdown(results) + "\n", encoding="utf-8")
    draw_differences(results, folder / "cbtx.png")
    draw_communication(results, folder / "cbtx-communication.png")
    draw_shares(results, folder / "cbtx-shares.png")
    if any(f"{prefix}.{BASELINE}" in results for prefix in SEED_LENGTHS):
        draw_seed_lengths(results, SEED_LENGTHS, folder / "cbtx-seed-length.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Growing mixtures of experts from a dense model, at equal FLOPs.")
    parser.add_argument("--corpora", type=Path, metavar="DIR", help="texts of three domains (see growth/texts.py)")
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling"), help="corpora, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="repetitions (default 0 1 2, quick 0 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="tasks at once")
    parser.add_argument("--quick", action="store_true", help="smaller, and only the arms of the JSON line")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("SEED", "BUDGET"), help="another scale")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (with what they need)")
    parser.add_argument("--report", action="store_true", help="train nothing; show what is done")
    parser.add_argument("--tune", action="store_true", help="try other settings on a seed of their own")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write cbtx.json, its table and pictures here")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
