"""All kernels against their peers and their limits on this machine: `python benchmarks/kernels.py`.

Runs every ``lightbulb.kernels.<op>.benchmark`` as a process of its own, one after the other, and collects the line of
JSON that each ends with. Writes kernels-DEVICE.json and kernels-DEVICE.png (DEVICE: cpu, or the GPU's name): how many
times faster than each peer, and which fraction of the physical limit. A benchmark that fails is named in the result,
and the exit code is 1.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

KERNELS = Path(__file__).parent.parent / "kernels"
RATIO = re.compile(r"(.+)_vs_(.+)")
FRACTION = re.compile(r"(.+)_(?:of_(?:the_)?|fraction_of_)(limit|copy_rate|copy|roof|peak|products|product)")


def main() -> int:
    """Measure, write both files; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the two files")
    parser.add_argument("--only", nargs="*", metavar="OP", help="operations to measure (default: all)")
    parser.add_argument("--timeout", type=float, default=1200.0, metavar="S", help="longest time of one operation")
    options = parser.parse_args()
    known = sorted(path.parent.name for path in KERNELS.glob("*/benchmark.py"))
    names = options.only or known
    if unknown := set(names) - set(known):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results, failed = {}, {}
    for name in names:
        started = time.monotonic()
        result = measure(name, options.timeout)
        if isinstance(result, dict):
            results[name] = result
        else:
            failed[name] = result
        said = "done" if name in results else f"FAILED: {failed[name]}"
        print(f"{name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    target = options.output / f"kernels-{device_slug()}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"operations": results, "failed": failed}, indent=1) + "\n")
    plot(results, target.with_suffix(".png"))
    print(f"wrote {target} and {target.with_suffix('.png')}")
    return 1 if failed else 0


def measure(name: str, timeout: float) -> dict[str, Any] | str:
    """The JSON of an operation's benchmark, whose table is passed on, or what went wrong."""
    command = [sys.executable, "-m", f"lightbulb.kernels.{name}.benchmark"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"took more than {timeout:.0f} s"
    *table, last = done.stdout.strip().splitlines() or [""]
    print("\n".join(table), flush=True)
    if done.returncode:
        return f"exit code {done.returncode}"
    try:
        return json.loads(last)
    except json.JSONDecodeError:
        return f"its last line is not JSON: {last[:100]!r}"


def device_slug() -> str:
    """``cpu``, or the GPU's name as part of a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def numbers(results: dict[str, dict[str, Any]], pattern: re.Pattern[str]) -> dict[str, dict[str, float]]:
    """What a pattern names: ``{"op step": {"peer": value}}``."""
    found: dict[str, dict[str, float]] = {}
    for operation, result in results.items():
        for key, value in result.items():
            match = pattern.fullmatch(key)
            if match and isinstance(value, int | float):
                found.setdefault(f"{operation} {match[1].replace('_', ' ')}", {})[match[2]] = value
    return found


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Ratios to peers and fractions of limits, a row for each step that was measured."""
    ratios, fractions = numbers(results, RATIO), numbers(results, FRACTION)
    steps = list(dict.fromkeys([*ratios, *fractions]))
    height = 1.5 + 0.22 * max(len(steps), 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    place = {step: len(steps) - index for index, step in enumerate(steps)}
    for axis, found, title in ((left, ratios, "times faster than"), (right, fractions, "fraction of")):
        for peer in dict.fromkeys(name for values in found.values() for name in values):
            points = [(values[peer], place[step]) for step, values in found.items() if peer in values]
            axis.plot(*zip(*points, strict=True), "o", label=peer.replace("_", " "))
        axis.axvline(1.0, color="gray", linewidth=1)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(title)
        if found:
            axis.legend(fontsize="small")
    left.set_xscale("log")
    left.set_yticks(list(place.values()), list(place), fontsize="small")
    right.set_xlim(left=0.0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
