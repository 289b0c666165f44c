"""Does growing a mixture of experts from a dense model pay? All ways LightBulb has, at equal total training FLOPs."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from growth.corpora import write_corpora
from growth.plan import Plan, Scale, Tuned
from growth.scheduling import Sweep
from growth.training import run_task

FULL = Scale(1_000_000, 1_600_000)
QUICK = Scale(400_000, 600_000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    manifest = write_corpora(arguments.corpora, arguments.work, 1_200_000)
    shares = {}
    for name, entry in manifest["splits"]["train"].items():
        domain = name.split("/")[0]
        shares[domain] = shares.get(domain, 0) + entry["tokens"]
    total = sum(shares.values())
    shares = {name: value / total for name, value in shares.items()}
    plan = Plan(QUICK if arguments.quick else FULL, Tuned(), shares, arguments.quick)
    for name in plan.arms:
        print(f"{name:28s} {plan.flops(name) / plan.budget:.4f}")
    digest = json.dumps({s: {n: g for n, g in d.items()} for s, d in manifest["splits"].items()}, sort_keys=True)
    keys = {seed: plan.keys(seed, digest) for seed in range(arguments.seeds)}
    sweep = Sweep(arguments.work, run_task, arguments.workers)
    names = arguments.only or list(plan.tasks)
    sweep.complete(plan.tasks, keys, names)
    for name, arm in plan.arms.items():
        values = [sweep.result(keys[seed][arm.task]) for seed in keys]
        if all(values):
            print(name, [round(v.get(arm.value) or 0, 4) for v in values], [round(v.get("start_bpb", 0), 4) for v in values])
    return 0


if __name__ == "__main__":
    sys.exit(main())
