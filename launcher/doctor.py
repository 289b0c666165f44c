"""Show what is installed, what stands in for what is missing, and the machine.

::

    lightbulb doctor                             # packages, programs, devices, kernels
    lightbulb doctor --self-test                 # also trains a tiny model on one rank and on two
    lightbulb doctor --config RUN.yaml --ranks 8 # also the layout it would choose, with the memory of a rank

Exits with 1 when something required is missing, of a wrong version or, with --imports, does not load; when the self
test fails; and when no layout fits. Next: `lightbulb preprocess`, `lightbulb pretrain`.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb import ops
from lightbulb.planning import survey

GIB = survey.GIB


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb doctor", description="Show what this machine has and lacks.")
    parser.add_argument("--imports", action="store_true", help="also import every package (takes half a minute)")
    parser.add_argument("--self-test", action="store_true", help="also train a tiny model on one rank and on two")
    parser.add_argument("--config", metavar="FILE", help="also choose a layout for this run file")
    parser.add_argument("--ranks", type=int, help="with --config: processes (default: GPUs, or 1)")
    parser.add_argument("--ranks-per-node", type=int, help="with --config: processes of one machine (default: all)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="with --config: of a rank (default: this machine's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    findings = survey.examine_all(options.imports)
    report: dict[str, Any] = {
        "packages": [finding._asdict() for finding in findings],
        "programs": [finding._asdict() for finding in survey.programs()],
        "machine": dict(survey.machine_facts()),
        "kernels": kernels(),
        "problems": [f"{f.name}: {f.found} {f.remark}".strip() for f in findings if f.is_problem],
    }
    report["problems"] += [report["kernels"]["problem"]] if report["kernels"]["problem"] else []
    if options.config:
        report["layout"] = plan(options)
        report["problems"] += [] if report["layout"]["fits"] else [f"layout: {report['layout']['reason']}"]
    if options.self_test:
        report["self_test"] = self_test()
        report["problems"] += [] if report["self_test"]["passed"] else [f"self test: {report['self_test']['detail']}"]
    print(json.dumps(report)) if options.json else show(report)
    return 1 if report["problems"] else 0


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The layout for a run file; what is missing on this machine may keep it from being chosen."""
    try:
        layouts = importlib.import_module("lightbulb.planning.report")  # needs what the survey may find missing
        return layouts.plan(options.config, options.ranks, options.ranks_per_node, options.memory)
    except (ImportError, ValueError, OSError) as error:
        return {"fits": False, "reason": str(error), "lines": []}


def kernels() -> dict[str, Any]:
    """What LightBulb's own operations are computed with here; a problem if the environment asks for what is none."""
    try:
        return {"machine": ops.describe.machine(), "operations": ops.describe.operations(), "problem": None}
    except ValueError as error:
        return {"machine": {}, "operations": {}, "problem": str(error)}


def self_test() -> dict[str, Any]:
    """The outcome of :mod:`lightbulb.planning.self_test` in a process of its own."""
    command = [sys.executable, "-m", "lightbulb.planning.self_test"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"passed": False, "seconds": 0.0, "detail": cause}
    return json.loads(lines[-1])


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console()
    for title in ("packages", "programs"):
        table = Table(title[:-1], "found", "remark")
        for item in report[title]:
            table.add_row(item["name"], item["found"], item["remark"], style="red" if item["is_problem"] else None)
        console.print(table)
    kernels_here = report["kernels"]["machine"] | report["kernels"]["operations"]
    for heading, section in ((None, report["machine"]), ("kernels", kernels_here)):
        table = Table(show_header=False, title=heading)
        for name, value in section.items():
            table.add_row(name, value)
        console.print(table)
    if "layout" in report:
        console.print(*report["layout"]["lines"], sep="\n", soft_wrap=True)
    if "self_test" in report:
        verdict = "passed" if report["self_test"]["passed"] else "FAILED"
        console.print(f"self test {verdict} in {report['self_test']['seconds']} s: {report['self_test']['detail']}")
    console.print(
        f"required packages that need attention: {sum(p['is_problem'] for p in report['packages']) or 'none'}"
    )
    for problem in report["problems"]:
        console.print(f"error: {problem}", soft_wrap=True, style="red")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
