"""Show what is installed, what stands in for what is missing, and the machine: `lightbulb doctor [--imports]`.

Exits with 1 when something required is missing, of a wrong version or, with --imports, does not load.
"""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

GIB = 1 << 30


class Part(NamedTuple):
    """A package and what happens without it."""

    package: str
    module: str
    without: str


PARTS = (
    Part("torch", "torch", "nothing runs"),
    Part("torchvision", "torchvision", "streaming does not load; install the version that belongs to torch"),
    Part("megatron-core", "megatron.core", "no training, and no inference"),
    Part("mosaicml-streaming", "streaming", "shards can be neither written nor read"),
    Part("deepspeed", "deepspeed", "no deepspeed launcher: start ranks with torchrun or srun"),
    Part("triton", "triton", "kernels run as their torch reference: slower on CUDA, no difference on CPU"),
    Part("flash-attn", "flash_attn", "attention by torch's own kernels, flash among them on CUDA"),
    Part("mamba-ssm", "mamba_ssm", "Mamba layers scan in torch: slower on CUDA"),
    Part("causal-conv1d", "causal_conv1d", "short convolutions by torch's conv1d: slower on CUDA"),
    Part("transformer-engine", "transformer_engine", "torch's layers and optimizer steps: no FP8, slower on CUDA"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb doctor", description=__doc__)
    parser.add_argument("--imports", action="store_true", help="also import every package (takes half a minute)")
    options = parser.parse_args(argv)
    packages, problems = Table("package", "found", "remark"), 0
    for part in PARTS:
        found, remark, is_problem = examine(part, options.imports)
        packages.add_row(part.package, found, remark, style="red" if is_problem else None)
        problems += is_problem
    machine = Table(show_header=False)
    for name, value in machine_facts():
        machine.add_row(name, value)
    Console().print(packages, machine, f"required packages that need attention: {problems or 'none'}")
    return 1 if problems else 0


def examine(part: Part, try_import: bool) -> tuple[str, str, bool]:
    """Version found, remark, and whether something required is wrong."""
    requirement = requirements().get(part.package)
    try:
        version = metadata.version(part.package)
        if try_import:
            importlib.import_module(part.module)
    except metadata.PackageNotFoundError:
        return "missing", part.without, requirement is not None
    except (ImportError, RuntimeError, OSError) as error:
        return version, f"does not load ({error}), so: {part.without}", requirement is not None
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return version, f"needs {requirement.specifier}; pip install '{requirement}'", True
    return version, "", False


def requirements() -> dict[str, Requirement]:
    """The packages LightBulb cannot do without, by name."""
    listed = map(Requirement, metadata.requires("lightbulb") or [])
    return {requirement.name: requirement for requirement in listed if requirement.marker is None}


def machine_facts() -> Iterator[tuple[str, str]]:
    """Devices, number formats, memory and disk."""
    yield "Python, torch", f"{sys.version.split()[0]}, {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if not torch.cuda.is_available():
        yield "GPU", "none: runs on the CPU with gloo"
    yield "CPU", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, bf16 {cpu_bf16()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    for name, folder in (("shared memory", Path("/dev/shm")), ("disk here", Path.cwd())):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            yield name, f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free ({folder})"


def cpu_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU has for bf16, and what ``precision: auto`` makes of it."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if "amx_bf16" in flags:
        return "by AMX (precision auto takes it for wide models)"
    return f"{'by AVX-512' if 'avx512_bf16' in flags else 'without instructions known'} (precision auto takes fp32)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
