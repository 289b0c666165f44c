"""The C++ kernels for CPUs: one optional shared library, called by address, without torch's headers.

``setup.py`` compiles every ``native.cpp`` of the operations into ``lightbulb/kernels/_native``; where there is no
compiler the package installs without it, and torch computes. Functions choose the widest instructions the processor has
when they are loaded or called.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightbulb.kernels.choice import is_reference

ABSENT = "no C++ kernels: install a C++ compiler (Debian: g++) and install LightBulb again; torch computes meanwhile"

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Types of the arguments of C++ kernels."""

_LEVELS = {4: "AVX-512 (x86-64-v4)", 3: "AVX2 (x86-64-v3)", 1: "SSE2 (x86-64)", 0: "the compiler's default"}


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent.parent
    for path in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                continue
    return None


def is_built() -> bool:
    """Whether the shared library is there and loads."""
    return _library() is not None


def takes_native(*tensors: Tensor) -> bool:
    """Whether C++ kernels may compute with these: all on the CPU, none in float64."""
    return is_built() and not is_reference() and all(t.is_cpu and t.dtype != torch.float64 for t in tensors)


def facts() -> tuple[str, bool]:
    """The instruction set whose version of the functions this processor runs, and whether they use several threads."""
    level, openmp = ctypes.c_int64(), ctypes.c_int64()
    function("native_facts", POINTER, POINTER)(ctypes.addressof(level), ctypes.addressof(openmp))
    return _LEVELS[level.value], bool(openmp.value)


@cache
def function(name: str, *argument_types: Any) -> Callable[..., None]:
    """A function of the library without a result. Tensors are passed by :meth:`torch.Tensor.data_ptr`."""
    library = _library()
    assert library is not None, ABSENT
    found = library[name]
    found.argtypes, found.restype = argument_types, None
    return found
