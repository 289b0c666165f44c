"""What this machine has: packages, programs, devices, for `lightbulb doctor`.

Nothing of LightBulb is imported here, so that the survey also works where a package is missing.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

GIB = 1 << 30


class Part(NamedTuple):
    """A package and what happens without it."""

    package: str
    module: str
    without: str


class Finding(NamedTuple):
    """What was found of a package or program; ``is_problem`` when something required is wrong."""

    name: str
    found: str
    remark: str
    is_problem: bool


PARTS = (
    Part("torch", "torch", "nothing runs"),
    Part("torchvision", "torchvision", "streaming does not load; install the version that belongs to torch"),
    Part("megatron-core", "megatron.core", "no training, and no inference"),
    Part("mosaicml-streaming", "streaming", "shards cannot be read"),
    Part("deepspeed", "deepspeed", "no deepspeed launcher: start ranks with torchrun or srun"),
    Part("triton", "triton", "kernels run as their torch reference: slower on CUDA, no difference on CPU"),
    Part("flash-attn", "flash_attn", "attention by torch's own kernels, flash among them on CUDA"),
    Part("mamba-ssm", "mamba_ssm", "Mamba layers scan in torch: slower on CUDA"),
    Part("causal-conv1d", "causal_conv1d", "short convolutions by torch's conv1d: slower on CUDA"),
    Part("lm-eval", "lm_eval", "no tasks in lightbulb evaluate"),
    Part("transformer-engine", "transformer_engine", "torch's layers and optimizer steps: no FP8, slower on CUDA"),
)

PROGRAMS = (
    (("cc", "gcc", "clang"), "C compiler", "packages without a wheel and Triton kernels cannot be built"),
    (("g++", "c++", "clang++"), "C++ compiler", "C++ kernels run as their torch reference"),
    (("nvcc",), "CUDA compiler", "CUDA extensions cannot be built; those with a wheel work"),
    (("pdsh",), "pdsh", "deepspeed --hostfile reaches no other machine; use --no_ssh, torchrun or srun"),
    (("ssh",), "ssh", "deepspeed --hostfile reaches no other machine; use --no_ssh, torchrun or srun"),
    (("srun",), "srun", "no batch system: nothing else is affected"),
)
"""Names a program goes by, what it is, and what happens without it; none is required."""


def requirements() -> dict[str, Requirement]:
    """The packages LightBulb cannot do without, by name."""
    listed = map(Requirement, metadata.requires("lightbulb") or [])
    return {requirement.name: requirement for requirement in listed if requirement.marker is None}


def examine(part: Part, try_import: bool, required: dict[str, Requirement]) -> Finding:
    """The version found, what is wrong with it and what that costs."""
    requirement = required.get(part.package)
    try:
        version = metadata.version(part.package)
        if try_import:
            importlib.import_module(part.module)
    except metadata.PackageNotFoundError:
        return Finding(part.package, "missing", part.without, requirement is not None)
    except (ImportError, RuntimeError, OSError) as error:
        return Finding(part.package, version, f"does not load ({error}), so: {part.without}", requirement is not None)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        remark = f"needs {requirement.specifier}; pip install '{requirement}'"
        return Finding(part.package, version, remark, True)
    return Finding(part.package, version, "", False)


def examine_all(try_import: bool) -> list[Finding]:
    """Every package of :data:`PARTS`."""
    required = requirements()
    return [examine(part, try_import, required) for part in PARTS]


def programs() -> Iterator[Finding]:
    """Compilers and the launchers' helpers."""
    for names, what, without in PROGRAMS:
        path = next(filter(None, map(shutil.which, names)), None)
        yield Finding(what, path or "missing", "" if path else without, False)


def machine_facts() -> Iterator[tuple[str, str]]:
    """Devices, number formats, collectives, memory and disk."""
    yield "Python, torch", f"{sys.version.split()[0]}, {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if not torch.cuda.is_available():
        yield "GPU", "none: runs on the CPU with gloo"
    yield "collectives", collectives()
    yield "CPU", f"{cores()} of {os.cpu_count()} cores usable, bf16 {cpu_bf16()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    for name, folder in (("shared memory", Path("/dev/shm")), ("disk here", Path.cwd())):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            yield name, f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free ({folder})"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def memory_per_rank(ranks_here: int) -> int:
    """Bytes one of so many ranks on this machine may use: a GPU's memory, or a share of what is free."""
    if torch.cuda.is_available():
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return psutil.virtual_memory().available // ranks_here


def collectives() -> str:
    """gloo and NCCL, with NCCL's version."""
    gloo = "gloo" if dist.is_gloo_available() else "no gloo: no training on CPUs"
    if not dist.is_nccl_available():
        return f"{gloo}; no NCCL: no training on several GPUs"
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "without a GPU to use it"
    return f"{gloo}, NCCL {version}"


def cpu_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU has for bf16, and what ``precision: auto`` makes of it."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if "amx_bf16" in flags:
        return "by AMX (precision auto takes it for wide models)"
    return f"{'by AVX-512' if 'avx512_bf16' in flags else 'without instructions known'} (precision auto takes fp32)"
