"""This process on its machine: device, threads, memory allocator, rank, precision."""

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from lightbulb.nn.precision import has_amx
from lightbulb.parallel.rendezvous import adopt_environment, meet, read_place

Precision = Literal["fp32", "bf16", "fp64"]
"""Dtype of weights and activations; fp64, on the CPU only, is for proofs of models in which rounding is a step."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30
_BF16_CPU_MIN_DIM = 512  # below, conversions cost more than AMX saves (measured on Sapphire Rapids)


def local_rank() -> int:
    """Rank on this machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def pick_device() -> torch.device:
    """This rank's CUDA device when there is one, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def pick_precision(device: torch.device, dim: int) -> Precision:
    """bf16 where the device is fast at it for a model of this width, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if has_amx() and dim >= _BF16_CPU_MIN_DIM else "fp32"


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of giving it back to the system after every tensor.

    glibc unmaps large blocks as soon as they are freed, so that each training step takes tens of thousands of page
    faults; on CPU this alone cost a third of the speed. Returns whether the allocator could be told.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def share_cores() -> None:
    """Give each rank of this machine its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or _world_size())
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks, 1))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = 600.0) -> Iterator[None]:
    """``torch.distributed`` for the ranks the launcher started, or for this process alone.

    After an error the group stays as it is: closing one that has lost a rank can wait forever.

    Args:
        device: decides between NCCL and gloo.
        timeout_seconds: longest a collective may take.

    Raises:
        LaunchError: the launcher's variables are missing or contradict each other, or the ranks cannot meet.
    """
    adopt_environment()
    place = read_place()
    store = dist.HashStore() if place is None else meet(place, logging.getLogger(__name__).warning)
    rank, world_size = (0, 1) if place is None else place[:2]
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield
    dist.destroy_process_group()
