"""The C++ form of what costs most in preparing data, in an optional shared library; without it numpy computes the same
numbers."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np


@cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where it was not compiled or does not load."""
    for path in (Path(__file__).parent.parent / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                continue
    return None


@cache
def function(name: str) -> Callable[..., None]:
    """A function without a result; arrays are passed by address, numbers as 64-bit integers."""
    found = library()
    assert found is not None
    called = found[name]
    called.restype = None

    def call(*arguments: Any) -> None:
        called(*(_passed(argument) for argument in arguments))

    return call


def _passed(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return argument.ctypes.data_as(ctypes.c_void_p)
    return argument if isinstance(argument, bytes) else ctypes.c_int64(argument)
