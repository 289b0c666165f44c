"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: small calls of odd sizes in another process.

A kernel adds a function to ``CALLS`` that calls it over its shapes; results are compared in its own tests.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightbulb.kernels import native
from lightbulb.kernels.swiglu import native as swiglu
from lightbulb.kernels.ternary_matmul import native as ternary
from lightbulb.kernels.ternary_matmul.packing import FORMATS, TernaryWeight, interleave, pack_codes
from lightbulb.kernels.ternary_matmul.quantise import Quantisation

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fPIC", "-shared", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
OVERFLOW = """
import ctypes, sys
call = ctypes.CDLL(sys.argv[1]).swiglu_f32
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
rows, short = (ctypes.c_void_p(malloc(ctypes.c_size_t(count * 64 * 4))) for count in (4, 3))
numbers = [ctypes.c_int64(number) for number in (64, 4, 64, 1)]
call(rows, numbers[0], rows, numbers[0], short, *numbers)
"""


def call_ternary() -> None:
    token = Quantisation(127, 127.0, 1e-5, 1e-6)
    for form, level in itertools.product(FORMATS, range(ternary.best_level() + 1)):
        ternary.force_level(level)
        for rows, inputs, outputs in ((0, 5, 3), (1, 1, 1), (1, 83, 33), (2, 20, 16), (9, 1301, 47), (131, 64, 15)):
            codes = torch.randint(-1, 2, (outputs, inputs))
            weight = interleave(TernaryWeight(pack_codes(codes, form), torch.ones(1), inputs, form))
            x = torch.randint(-127, 128, (rows, inputs)).to(torch.int8)
            ternary.product(x, torch.ones(rows, 1), weight, None, torch.float32)
            for dtype, how in itertools.product(ternary.DTYPES, (token, Quantisation(127, is_bounded=True))):
                ternary.product(x.to(dtype), how, weight, None, dtype)
        codes = torch.randint(-1, 2, (3, 10, 37))
        experts = interleave(TernaryWeight(pack_codes(codes, form), torch.ones(3, 2), 37, form))
        for counts in ([2, 0, 1], [0, 0, 0], [0, 130, 5]):
            x = torch.randn(sum(counts), 37)
            x[:1] = float("nan")
            ternary.product(x, token, experts, counts, torch.bfloat16)


def call_swiglu() -> None:
    for (rows, width), dtype in itertools.product([(0, 8), (1, 1), (3, 7), (5, 1030)], swiglu.DTYPES):
        gate, up, grad = (torch.randn(rows, width).mul_(50).to(dtype) for _ in range(3))
        swiglu.forward(gate, up, torch.empty_like(gate))
        swiglu.backward(grad, gate, up, torch.empty_like(gate), torch.empty_like(up))


CALLS: dict[str, Callable[[], None]] = {"swiglu": call_swiglu, "ternary_matmul": call_ternary}


def asan_library() -> str | None:
    """The runtime that has to be loaded before Python, if the compiler has it."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    return str(path.resolve()) if path.is_absolute() else None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All C++ kernels in one library with checks."""
    if asan_library() is None:
        pytest.skip("no g++ with AddressSanitizer here")
    path = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    sources = [str(source) for source in sorted((ROOT / "kernels").glob("*/native.cpp"))]
    command = ["g++", *FLAGS, f"-I{ROOT / 'kernels/native'}", *sources, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Leaks are Python's and torch's own; memory of the kernels is in vectors, which end with their function.
    options = {"LD_PRELOAD": str(asan_library()), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def done(library: Path) -> subprocess.CompletedProcess[str]:
    """A process that makes all calls, one kernel after the other."""
    return run(__file__, str(library))


@pytest.mark.parametrize("name", CALLS)
def test_no_access_outside_and_nothing_undefined(done: subprocess.CompletedProcess[str], name: str) -> None:
    assert name in done.stdout.split(), done.stderr[-3000:]


def test_the_sanitizer_is_at_work(library: Path) -> None:
    """A result one row longer than its memory ends the process with a report."""
    failed = run("-c", OVERFLOW, str(library))
    assert failed.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in failed.stderr, failed.stderr[-3000:]


def main() -> None:
    """In the process under test: take the library with checks, and call."""
    library = ctypes.CDLL(sys.argv[1])
    native._library = lambda: library  # type: ignore[assignment]
    for name, call in CALLS.items():
        call()
        print(name, flush=True)


if __name__ == "__main__":
    main()
