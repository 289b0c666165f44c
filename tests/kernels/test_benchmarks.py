"""The recorded results of the kernels' benchmarks: whatever is measured is in the plot."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/kernels.py"))


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "kernels").glob("*/benchmark.py")))
def test_every_operation_is_in_the_plot(script: dict[str, Any], name: str) -> None:
    recorded = json.loads((ROOT / "docs/results/kernels-cpu.json").read_text())["operations"]
    assert script["numbers"]({name: recorded[name]}, script["RATIO"])
