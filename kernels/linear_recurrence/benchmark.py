"""Linear recurrences against their peers: ``python -m lightbulb.kernels.linear_recurrence.benchmark``.

On a GPU: flash-linear-attention (``pip install flash-linear-attention``) and mamba-ssm, where installed; the limit is
memory. On the CPU: plain torch, and for decoding the twin; the limit is the rate of a float32 matrix product.
"""

import importlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightbulb.kernels.linear_recurrence import linear_recurrence, plain, reference
from lightbulb.kernels.timing import arguments, copy_bytes_per_second, interleaved, ratio, report

_CHUNK = 64


class Shape(NamedTuple):
    """Sizes; ``varies``: the decay depends on the token (Mamba-2), else it is constant (retention)."""

    batch: int
    heads: int
    groups: int
    length: int
    state: int
    width: int
    varies: bool

    @property
    def name(self) -> str:
        kind = "mamba2" if self.varies else "retention"
        return f"{kind}_{self.state}x{self.width}_{self.length}"

    def flops(self) -> float:
        """Of forward and backward, without what a causal chunk need not multiply."""
        inside, through = _CHUNK * (2.0 * self.groups * self.state / self.heads + 1.5 * self.width), 6.0
        return 2.0 * self.batch * self.heads * self.length * (inside + through * self.state * self.width)

    def bytes(self) -> float:
        """What forward and backward must move on a GPU in bfloat16: rows in and out once in either pass, and a state
        in and out for each chunk."""
        rows = self.batch * self.length * (7 * self.groups * self.state + 7 * self.heads * self.width)
        return 2.0 * (rows + 4.0 * self.batch * self.heads * self.length * self.state * self.width / _CHUNK)


CPU_SHAPES = [
    Shape(4, 4, 4, 512, 64, 64, False),
    Shape(1, 4, 4, 2048, 64, 128, False),
    Shape(4, 8, 1, 512, 64, 64, True),
    Shape(1, 8, 1, 2048, 128, 64, True),
]
GPU_SHAPES = [
    Shape(32768 // length, 2048 // width, 2048 // width, length, width, width, False)
    for width in (64, 128, 256)
    for length in (2048, 4096, 16384)
] + [Shape(16, 64, 1, 2048, 128, 64, True), Shape(2, 64, 1, 16384, 128, 64, True)]


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    on_gpu, table = torch.cuda.is_available(), []
    result: dict[str, float] = {}
    for shape in GPU_SHAPES if on_gpu else CPU_SHAPES:
        for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
            row = training(shape, dtype, options.rounds)
            table.append({"shape": shape.name, "dtype": str(dtype).removeprefix("torch.")} | row)
    for shape in [] if on_gpu else CPU_SHAPES:
        table.append({"shape": shape.name, "dtype": "decode"} | decoding(shape, options.rounds))
    for row in table:
        result |= {f"{row['shape']}_{row['dtype']}_{k.replace(' ', '_')}": v for k, v in row.items() if k[:2] == "vs"}
    names = dict.fromkeys(name for row in table for name in row)
    skipped = [name for name in ("fla", "mamba_ssm") if not on_gpu or not _has(name)]
    print("skipped:", ", ".join(skipped) or "nothing")
    rows = [{name: row.get(name, "") for name in names} for row in table]
    report("linear recurrence, forward and backward", rows, {"op": "linear_recurrence"} | result)


def training(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Forward and backward of each contender."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = inputs(shape, dtype, device)
    wanted = [t for t in leaves if t.requires_grad]
    grad = torch.randn_like(leaves[2])
    runs = {name: _both(f, leaves, wanted, grad) for name, f in contenders(shape, device).items()}
    if device == "cpu":
        square = torch.randn(512, 512)
        runs["product"] = lambda: square @ square
    seconds = interleaved(runs, rounds)
    mine = statistics.median(seconds["ours"])
    if device == "cpu":
        limit = shape.flops() * statistics.median(seconds["product"]) / (2 * 512**3)
    else:
        limit = shape.bytes() / copy_bytes_per_second()
    peers = {f"vs {name}": round(ratio(seconds, name), 3) for name in runs if name not in ("ours", "product")}
    return {"ms": mine * 1e3, "of limit": limit / mine} | peers


def decoding(shape: Shape, rounds: int) -> dict[str, Any]:
    """One token on the CPU."""
    query, key, value, decay = (t.detach() for t in inputs(shape._replace(length=1), torch.float32, "cpu"))
    state = torch.randn(shape.batch, shape.heads, shape.state, shape.width)
    step = {
        "ours": lambda: linear_recurrence(query, key, value, decay, state),
        "twin": lambda: reference.linear_recurrence(query, key, value, decay, state, None),
    }
    seconds = interleaved({name: _repeated(run) for name, run in step.items()}, rounds)
    return {"ms": statistics.median(seconds["ours"]) * 50, "vs twin": round(ratio(seconds, "twin"), 3)}


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key, value and log decay, positions before heads in memory."""
    sizes = [(shape.groups, shape.state)] * 2 + [(shape.heads, shape.width)]
    leaves = [
        torch.randn(shape.batch, shape.length, heads, width, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for heads, width in sizes
    ]
    if shape.varies:
        decay = torch.rand(shape.batch, shape.length, shape.heads, device=device).mul_(-0.1).transpose(1, 2)
        return [*leaves, decay.requires_grad_()]
    return [*leaves, torch.log1p(-torch.exp2(-5.0 - torch.arange(shape.heads, device=device).double()))]


def contenders(shape: Shape, device: str) -> dict[str, Callable[..., Tensor]]:
    """Ours and the peers that are installed, each with our arguments."""
    runs = {"ours": lambda *given: linear_recurrence(*given, chunk_size=_CHUNK)[0]}
    if device == "cpu":
        empty = torch.zeros(shape.batch, shape.heads, shape.state, shape.width)
        return runs | {"torch": lambda *given: plain.linear_recurrence(*given, empty, None, _CHUNK)[0]}
    if _has("fla"):
        runs["fla"] = _fla(shape)
    if shape.varies and _has("mamba_ssm"):
        runs["mamba_ssm"] = _mamba_ssm()
    return runs


def _fla(shape: Shape) -> Callable[..., Tensor]:
    share = shape.heads // shape.groups
    if shape.varies:
        gated = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

        def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
            q, k = (t.transpose(1, 2).repeat_interleave(share, 2) for t in (q, k))
            return gated(q, k, v.transpose(1, 2), decay.transpose(1, 2), scale=1.0)[0].transpose(1, 2)

        return run
    retention = importlib.import_module("fla.ops.retention").chunk_retention
    return lambda q, k, v, decay: retention(*(t.transpose(1, 2) for t in (q, k, v)), scale=1.0)[0].transpose(1, 2)


def _mamba_ssm() -> Callable[..., Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        x, dt, b, c = (t.transpose(1, 2) for t in (v, -decay, k, q))
        return scan(x, dt, -torch.ones(v.shape[1], device=v.device), b, c, chunk_size=256).transpose(1, 2)

    return run


def _has(package: str) -> bool:
    """Whether it imports, which for packages of GPU kernels is more than being installed."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):  # absent, a library that does not load, no GPU
        return False
    return True


def _both(run: Callable[..., Tensor], leaves: list[Tensor], wanted: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(*leaves), wanted, grad)


def _repeated(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: [run() for _ in range(20)]


if __name__ == "__main__":
    main()
