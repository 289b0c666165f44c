"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: small calls of odd sizes in another process.

A kernel adds a function ``call_<op>`` that calls it over its shapes; results are compared in its own tests.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightbulb.kernels import native
from lightbulb.kernels.adamw import native as adamw
from lightbulb.kernels.causal_attention import native as causal_attention
from lightbulb.kernels.cross_entropy import IGNORE
from lightbulb.kernels.cross_entropy import native as cross_entropy
from lightbulb.kernels.experts import native as experts
from lightbulb.kernels.linear_recurrence import native as linear_recurrence
from lightbulb.kernels.rms_norm import native as rms_norm
from lightbulb.kernels.rope import native as rope
from lightbulb.kernels.softmax import native as softmax
from lightbulb.kernels.swiglu import native as swiglu
from lightbulb.kernels.ternary_matmul import native as ternary
from lightbulb.kernels.ternary_matmul.packing import FORMATS, TernaryWeight, interleave, pack_codes
from lightbulb.kernels.ternary_matmul.quantise import Quantisation

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16)
FLAGS = ["-std=c++17", "-O1", "-DLB_CLONES=", "-fopenmp", "-fPIC", "-shared", "-fsanitize=address,undefined"]
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


def call_ternary_matmul() -> None:
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
    for (rows, width), dtype in itertools.product([(0, 8), (1, 1), (3, 7), (5, 1030)], DTYPES):
        gate, up, grad = (torch.randn(rows, width).mul_(50).to(dtype) for _ in range(3))
        swiglu.forward(gate, up, torch.empty_like(gate))
        swiglu.backward(grad, gate, up, torch.empty_like(gate), torch.empty_like(up))


def call_adamw() -> None:
    for dtype, sizes in itertools.product(adamw.GRADIENTS, [(1,), (7, 33), (1030, 0, 16)]):
        params, exp_avgs, exp_avg_sqs = ([torch.rand(size) for size in sizes] for _ in range(3))
        grads = [torch.randn(size, dtype=dtype) for size in sizes]
        copies = [None if index == 1 else torch.empty(size, dtype=torch.bfloat16) for index, size in enumerate(sizes)]
        factors = [(1e-3, 1.0)] * len(sizes)
        adamw.update(params, grads, exp_avgs, exp_avg_sqs, copies, factors, 1e-4, (0.9, 0.95), 1e-8)


def call_causal_attention() -> None:
    for dtype in causal_attention.DTYPES:
        for batch, heads, kv_heads, length, width in ((1, 1, 1, 1, 1), (2, 4, 2, 37, 5), (1, 3, 1, 130, 48)):
            query, out, grad, grad_query = (torch.randn(batch, heads, length, width, dtype=dtype) for _ in range(4))
            key, value, *grads = (torch.randn(batch, kv_heads, length, width, dtype=dtype) for _ in range(4))
            lse = torch.empty(batch, heads, length)
            causal_attention.forward(query, key, value, out, lse)
            causal_attention.backward(query, key, value, grad, grad_query, *grads, lse)


def call_cross_entropy() -> None:
    for dtype, (rows, width) in itertools.product(cross_entropy.DTYPES, [(1, 1), (3, 17), (5, 1031)]):
        logits, labels = torch.randn(rows, width + 3).to(dtype)[:, :width], torch.arange(rows) * 7 - 4
        labels[0] = IGNORE
        cross_entropy.run(logits, labels, 2, torch.empty(rows), torch.empty(rows), 1e-4, True, True)


def call_experts() -> None:
    for dtype, dim in itertools.product(experts.DTYPES, (1, 19, 520)):
        rows, grad = torch.randn(6, dim).to(dtype), torch.randn(3, dim).to(dtype)
        order, gates = torch.tensor([5, 0, 3, 1, 4, 2]), torch.rand(3, 2)
        for weights in (gates, None):
            experts.sum_rows(rows, order.argsort().view(3, 2), weights)
        experts.sum_rows_grad(grad, rows[:4], order[:4], gates)  # two pairs were dropped


def call_linear_recurrence() -> None:
    for dtype, (groups, heads, length, state, width) in itertools.product(
        linear_recurrence.DTYPES, [(1, 1, 1, 1, 1), (2, 6, 37, 5, 19), (1, 5, 130, 33, 64)]
    ):
        query, key = (torch.randn(2, groups, length, state).to(dtype) for _ in range(2))
        value, grad = (torch.randn(2, heads, length, width).to(dtype) for _ in range(2))
        first, starts = torch.randn(2, heads, state, width), torch.rand(2, length) < 0.1
        inputs = (query, key, value, -torch.rand(2, heads, length))
        for size in (16, 64):
            _, _, entering = linear_recurrence.forward(*inputs, first, starts, size, True)
            assert entering is not None
            linear_recurrence.backward(grad, first, *inputs, starts, entering, size, True)
        linear_recurrence.steps(*inputs, first, starts)


def call_rms_norm() -> None:
    for (rows, dim), dtype, has_weight in itertools.product([(1, 1), (3, 19), (40, 1030)], DTYPES, (False, True)):
        x, delta = (torch.randn(rows, dim + 3).to(dtype)[:, :dim] for _ in range(2))
        weight = torch.randn(dim) if has_weight else None
        for other in (None, delta):
            _, total, scale = rms_norm.forward(x, other, weight, 1e-6)
            rms_norm.backward(delta, other, total, weight, scale, has_weight)


def call_rope() -> None:
    for (length, batch, heads, width), dtype in itertools.product([(1, 1, 1, 2), (5, 2, 3, 38)], DTYPES):
        x, angles = torch.randn(length, batch, heads, width).to(dtype), torch.randn(length, 1, 1, width // 2)
        cos, sin = (f(angles).expand(length, batch, heads, -1) for f in (torch.cos, torch.sin))
        out = torch.empty(batch, heads, length, width, dtype=dtype).permute(2, 0, 1, 3)
        for backwards in (False, True):
            rope.rotate(x, cos, sin, out, backwards)


def call_softmax() -> None:
    for shape, dtype in itertools.product([(1, 1, 1, 1), (2, 3, 5, 19), (1, 2, 3, 1030)], DTYPES):
        scores, grad = (torch.randn(shape).to(dtype) for _ in range(2))
        mask, sink = torch.rand(shape) < 0.5, torch.randn(shape[:3])
        softmax.forward(scores, None, None, scores, None)
        softmax.forward(scores, mask, sink, scores, torch.empty(shape[:3]))
        softmax.backward(grad, scores, grad, torch.empty(shape[:3]))


CALLS: dict[str, Callable[[], None]] = {
    name.removeprefix("call_"): call for name, call in sorted(globals().items()) if name.startswith("call_")
}


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
    sources = sorted((ROOT / "kernels").glob("*/native.cpp"))
    objects = [str(path.with_name(f"{source.parent.name}.o")) for source in sources]

    def compiled(source: Path, target: str) -> None:
        call("g++", *FLAGS, f"-I{ROOT / 'kernels/native'}", "-c", str(source), "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources, objects))
    call("g++", *FLAGS, *objects, "-o", str(path))
    return path


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_kernel_is_called() -> None:
    assert CALLS.keys() == {path.parent.name for path in (ROOT / "kernels").glob("*/native.py")}


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
