"""Ternary products against PyTorch and ggml: ``python -m lightbulb.kernels.ternary_matmul.benchmark --threads 1``.

``--ggml PATH`` names ggml's libraries (a folder, or libggml-cpu.so itself) and adds its TQ2_0 and TQ1_0. Where there is
a GPU it is measured instead (benchmark_gpu.py); hide it (``CUDA_VISIBLE_DEVICES=``) to measure the CPU.
"""

import ctypes
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.ternary_matmul import benchmark_gpu, made_ready, native, ternary_linear
from lightbulb.kernels.ternary_matmul.packing import FORMATS, TernaryWeight, pack_codes
from lightbulb.kernels.ternary_matmul.quantise import Quantisation
from lightbulb.kernels.timing import Run, arguments, interleaved, ratio, report

BATCHES = (1, 4, 64)
HOW = Quantisation(levels=127, factor=127.0, least=1e-5)
_WIDTH = 4096
GGML_TYPES = {"tq1_0": 34, "tq2_0": 35}


class Ggml:
    """Products of ggml, as a graph of one node over tensors in its own memory.

    Args:
        path: the folder of libggml-base.so and libggml-cpu.so, or the latter.
        threads: to compute with.
    """

    class _Params(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self, path: Path, threads: int):
        folder = path if path.is_dir() else path.parent
        ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.library, self.threads = ctypes.CDLL(str(folder / "libggml-cpu.so")), threads
        self._call("ggml_cpu_init", None)

    def product(self, kind: str, weight: Tensor, x: Tensor) -> tuple[Run, Tensor]:
        """What multiplies ``weight [out, in]``, quantised as a type, with ``x [rows, in]``, and where its result is."""
        size = weight.numel() * 4 + x.numel() * 16 + (len(x) * len(weight)) * 8 + (1 << 24)
        context = self._call("ggml_init", ctypes.c_void_p, self._Params(size, None, False))
        (outputs, inputs), rows = weight.shape, len(x)
        matrix = self._tensor(context, GGML_TYPES[kind], inputs, outputs)
        given = self._tensor(context, 0, inputs, rows)
        values, data = weight.float().contiguous(), self._call("ggml_get_data", ctypes.c_void_p, matrix)
        arguments = [data, *(ctypes.c_int64(n) for n in (outputs, inputs)), ctypes.c_void_p(None)]
        self._call(f"quantize_{kind}", ctypes.c_size_t, ctypes.c_void_p(values.data_ptr()), *map(_pointer, arguments))
        ctypes.memmove(self._call("ggml_get_data", ctypes.c_void_p, given), x.contiguous().data_ptr(), x.nbytes)
        node = self._call("ggml_mul_mat", ctypes.c_void_p, *map(_pointer, (context, matrix, given)))
        graph = self._call("ggml_new_graph", ctypes.c_void_p, _pointer(context))
        self._call("ggml_build_forward_expand", None, _pointer(graph), _pointer(node))
        compute = self.library.ggml_graph_compute_with_ctx
        handles = _pointer(context), _pointer(graph), ctypes.c_int(self.threads)
        compute(*handles)
        place = self._call("ggml_get_data", ctypes.c_void_p, _pointer(node))
        found = (ctypes.c_float * (rows * outputs)).from_address(place)
        return lambda: compute(*handles), torch.frombuffer(found, dtype=torch.float32).view(rows, outputs)

    def _tensor(self, context: int, kind: int, width: int, rows: int) -> Any:
        sizes = ctypes.c_int64(width), ctypes.c_int64(rows)
        return _pointer(
            self._call("ggml_new_tensor_2d", ctypes.c_void_p, _pointer(context), ctypes.c_int(kind), *sizes)
        )

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self.library[name]
        function.restype = result
        return function(*arguments)


def _pointer(value: Any) -> Any:
    return ctypes.c_void_p(value) if isinstance(value, int) else value


def reading(size: int) -> Run:
    """PyTorch's product of a float32 matrix of so many bytes with a vector: how fast memory is read, and caches
    as far as weights of this size lie in them."""
    matrix = torch.ones(size // (4 * _WIDTH), _WIDTH)
    vector = torch.ones(_WIDTH)
    return lambda: matrix @ vector


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(
        __doc__,
        shape={"type": int, "nargs": 2, "default": (4096, 16384), "metavar": ("IN", "OUT")},
        ggml={"type": Path, "help": "folder of libggml-cpu.so, or the file"},
    )
    if torch.cuda.is_available():
        print("the CPU: skipped, there is a GPU; CUDA_VISIBLE_DEVICES= hides it")
        return benchmark_gpu.main()
    if not is_built():
        raise SystemExit(ABSENT)
    inputs, outputs = options.shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)
    weights = {
        form: made_ready(TernaryWeight(pack_codes(codes, form), torch.ones(1), inputs, form)) for form in FORMATS
    }
    peers = {"torch_bf16": codes.bfloat16().t(), "int_mm": codes.t()}
    ggml = None if options.ggml is None else Ggml(options.ggml, options.threads)
    size, table = weights[FORMATS[0]].codes.nbytes, []
    result: dict[str, Any] = {"level": native.LEVELS[native.best_level()]}
    for batch in BATCHES:
        x = torch.randn(batch, inputs, generator=generator)
        runs: dict[str, Run] = {form: _ours(x, weight) for form, weight in weights.items()}
        runs |= _peers(x, peers) | _ggml(ggml, x, codes) | {"read": reading(size)}
        seconds = interleaved(runs, options.rounds)
        for form, weight in weights.items():
            mine = statistics.median(seconds[form])
            row: dict[str, Any] = {"batch": batch, "form": form, "ms": mine * 1e3}
            row |= {"GOP/s": 2 * batch * codes.numel() / mine / 1e9, "GB/s": weight.codes.nbytes / mine / 1e9}
            row |= {"of limit": ratio(seconds, "read", form) * weight.codes.nbytes / size}
            row |= {f"vs {peer}": ratio(seconds, peer, form) for peer in runs if peer not in (*weights, "read")}
            table.append({name: row.get(name, "") for name in (*_COLUMNS, *row)})
            result |= _named(form, batch, row)
    if ggml is None:
        print("ggml: skipped; --ggml PATH_OF_LIBGGML adds it")
    report(f"ternary products, {inputs} to {outputs}, inputs in float32 quantised inside", table, result)


_COLUMNS = ("batch", "form", "ms", "GOP/s", "GB/s", "of limit", "vs torch_bf16", "vs int_mm")


def _ours(x: Tensor, weight: TernaryWeight) -> Run:
    return lambda: ternary_linear(x, HOW, weight)


def _peers(x: Tensor, weights: dict[str, Tensor]) -> dict[str, Run]:
    """PyTorch's products: bfloat16, and int8 where it takes the shape, whose inputs are quantised for nothing."""
    half, codes = x.bfloat16(), x.mul(30).round().clamp(-127, 127).to(torch.int8)
    runs: dict[str, Run] = {"torch_bf16": lambda: half @ weights["torch_bf16"]}
    if len(x) > 16:
        runs["int_mm"] = lambda: torch._int_mm(codes, weights["int_mm"])
    return runs


def _ggml(ggml: Ggml | None, x: Tensor, codes: Tensor) -> dict[str, Run]:
    if ggml is None:
        return {}
    runs = {}
    for kind in GGML_TYPES:
        runs[kind], found = ggml.product(kind, codes, x)
        exact = x @ codes.t().float()
        assert (found - exact).norm() < 0.02 * exact.norm(), f"{kind} computes something else"
    return runs


def _named(form: str, batch: int, row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures by the names of the result; those of the 2-bit form without its name."""
    names = {f"batch{batch}_{name.replace(' ', '_')}": value for name, value in row.items() if name.startswith("vs ")}
    if batch == 1:
        names |= {"bytes_per_second": row["GB/s"] * 1e9, "fraction_of_limit": row["of limit"]}
    return {name if form == FORMATS[0] else f"{form}_{name}": value for name, value in names.items()}


if __name__ == "__main__":
    main()
