"""Ranks that would not train the same thing are refused at the start.

Two nodes with different checkouts, configs or package versions train something that is neither, and nothing fails.
Every rank states what it runs; one digest is compared, and only where it differs the facts themselves are.
"""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from lightbulb import ops
from lightbulb.config import Config, flatten
from lightbulb.parallel.collective import RankError

PACKAGES = ("torch", "triton", "megatron-core", "mosaicml-streaming", "safetensors", "numpy", "tokenizers")
"""Packages whose version can change the numbers or the files."""
MAX_NAMED = 5
"""One refusal names at most this many differences."""

_ROOT = Path(__file__).resolve().parent.parent


def check_same_on_all_ranks(config: Config) -> None:
    """Compare config, code and package versions (a collective).

    Raises:
        RankError: on every rank, naming each key that differs with its values and their ranks.
    """
    facts = facts_of(config)
    digest = xxhash.xxh3_128_hexdigest(repr(sorted(facts.items())))
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    raise RankError(refusal(gathered))


def facts_of(config: Config, root: Path = _ROOT) -> dict[str, str]:
    """What must be the same everywhere: config keys, own source files, package versions, what kernels compute."""
    facts = {f"config {key}": repr(value) for key, value in flatten(config.model_dump(mode="json")).items()}
    facts |= {f"version of {name}": version for name, version in _versions()}
    facts |= {
        f"environment {ops.VARIABLE}": os.environ.get(ops.VARIABLE) or "not set",
        "C++ kernels": "built" if ops.is_built() else "not built",
    }
    for path in sorted(root.rglob("*.py")):
        facts[f"code {path.relative_to(root.parent)}"] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    return facts


def refusal(facts: list[dict[str, str]]) -> str:
    """The differences between ranks, in words; ``facts`` by rank."""
    keys = sorted(set().union(*facts))
    different = [key for key in keys if len({fact.get(key) for fact in facts}) > 1]
    lines = [f"{key}: {_by_value([fact.get(key, 'absent') for fact in facts])}" for key in different[:MAX_NAMED]]
    if len(different) > MAX_NAMED:
        lines.append(f"and {len(different) - MAX_NAMED} more")
    return (
        "the ranks were not started alike; give all the same config file, overrides, checkout and packages\n  "
        + "\n  ".join(lines)
    )


def _by_value(values: list[str]) -> str:
    """``0.001 on rank 0, 2; 0.002 on rank 1``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on rank {_span(listed)}" for value, listed in ranks.items())


def _span(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]} and {len(ranks) - 2} more"


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "missing"
