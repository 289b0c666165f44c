"""Block-sparse attention against dense and compiled attention, by mask, length and density.

``python -m lightbulb.kernels.block_sparse_attention.benchmark``. On a GPU: the Triton kernels, PyTorch's flash kernel
over all of the past, and FlexAttention of the same mask. Rates count the pairs of listed tiles: 4 operations for each
pair and feature in the forward, 10 in the backward; the limit is a large matrix product. On the CPU: the torch form and
PyTorch's dense attention. The crossover is the part of the score matrix in listed tiles from which dense attention
takes less time, found by widening a window.
"""

import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.kernels.block_sparse_attention import (
    CROSSOVER_DENSITY,
    CROSSOVER_LENGTH,
    Sight,
    Tiles,
    block_sparse_attention,
    listed_density,
)
from lightbulb.kernels.timing import arguments, interleaved, named, ratio, report, show

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_BLOCK = 64
_HEADS = 16
_WINDOW, _NARROW, _STRIDE, _DOCUMENTS = 1024, 512, 16, 8
_PRODUCTS = {"forward": 4, "forward and backward": 14}


def main() -> None:
    """Measure, print tables and a line of JSON."""
    options = arguments(__doc__, 9, lengths={"type": int, "nargs": "+"})
    on_gpu = torch.cuda.is_available()
    lengths = options.lengths or ([4096, 16384, 65536] if on_gpu else [2048])
    result: dict[str, Any] = {"op": "block_sparse_attention"}
    if on_gpu:
        result |= compare(lengths, options.rounds)
    else:
        print("skipped: the kernels, flash and FlexAttention, which need a GPU")
    result |= crossover([*([512, 1024, 2048] if on_gpu else []), *lengths[:2]], options.rounds)
    report("", [], result)


def compare(lengths: list[int], rounds: int) -> dict[str, float]:
    """The kernels, flash and FlexAttention, by mask."""
    limit, table = product_rate(), []
    result: dict[str, float] = {}
    for length in lengths:
        for width in (64, 128):
            for name, mask in masks(length).items():
                tiles, flex = Tiles(mask.sight, length, _BLOCK), compiled(mask, length)
                for way, products in _PRODUCTS.items():
                    inputs = tensors(length, width, way != "forward")
                    density = listed_density(inputs[0][0], tiles)
                    contenders = {"ours": tiled(tiles), "flash": dense, "flex": flex}
                    seconds = interleaved({who: step(core, *inputs) for who, core in contenders.items()}, rounds)
                    rate = products * width * _HEADS * density * length**2 / statistics.median(seconds["ours"])
                    found = {who: ratio(seconds, who) for who in ("flash", "flex")}
                    row = {"length": length, "width": width, "mask": name, "pass": way, "density": density}
                    # Flash computes half of the matrix: at its rate, ours would be 0.5 / density times as fast.
                    row |= {"TFLOP/s": rate / 1e12, "of product": rate / limit, "vs flash": found["flash"]}
                    table.append(row | {"of flash rate": found["flash"] * 2 * density, "vs flex": found["flex"]})
                    key = f"{name}_{length}_{width}_{way.split()[-1]}"
                    result |= {f"{key}_vs_{who}": round(value, 3) for who, value in found.items()}
    show(f"block-sparse attention, {_HEADS} heads, bfloat16", table)
    return result


def crossover(lengths: list[int], rounds: int) -> dict[str, float]:
    """Windows of growing width against dense causal attention and, on a GPU, against a mask too, forward and
    backward."""
    width, table = 64, []
    result: dict[str, float] = {}
    for length in lengths:
        found: dict[str, list[tuple[float, float]]] = {}
        for part in (16, 8, 4, 2, 1):
            tiles = Tiles(window(length, length // part), length, _BLOCK)
            contenders = {"ours": tiled(tiles), "dense": dense}
            if torch.cuda.is_available() and length <= 16384:
                contenders["masked"] = masked(tiles)
            inputs = tensors(length, width, True)
            seconds = interleaved({who: step(core, *inputs) for who, core in contenders.items()}, rounds)
            density = listed_density(inputs[0][0], tiles)
            row = {"length": length, "window": length // part, "density": density}
            for who in ("dense", "masked"):
                if who in seconds:
                    row[f"vs {who}"] = ratio(seconds, who)
                    found.setdefault(who, []).append((density, row[f"vs {who}"]))
            table.append(row)
            result |= named(f"{length} window {length // part}", row)
        for who, points in found.items():
            result[f"crossover_{length}_{who}"] = round(crossing(points), 3)
    result |= {"density_in_use": CROSSOVER_DENSITY, "length_in_use": CROSSOVER_LENGTH}
    show("windows against dense causal attention, forward and backward", table)
    return result


def crossing(points: list[tuple[float, float]]) -> float:
    """Where the ratio of times, given by rising density, falls below 1: 0 if it is never above, 1 if never below."""
    before: tuple[float, float] | None = None
    for density, faster in points:
        if faster < 1:
            if before is None:
                return 0.0
            share = (before[1] - 1) / (before[1] - faster)
            return before[0] + share * (density - before[0])
        before = density, faster
    return 1.0


class Mask(NamedTuple):
    """One mask, for ours and for FlexAttention."""

    sight: Sight
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def masks(length: int) -> dict[str, Mask]:
    """What is compared: a band, a band with strided blocks, and packed documents."""
    wide, narrow = window(length, _WINDOW), window(length, _NARROW)
    place, size = wide.stop - 1, length // _DOCUMENTS

    def in_stride(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        back = row // _BLOCK - column // _BLOCK
        return (row >= column) & ((row - column < _NARROW) | ((back > 0) & (back % _STRIDE == 0)))

    return {
        "band": Mask(wide, lambda sample, head, row, column: (row >= column) & (row - column < _WINDOW)),
        "stride": Mask(Sight(torch.zeros_like(place), place + 1, narrow.start, None, _STRIDE), in_stride),
        "documents": Mask(
            Sight(place // size * size, place + 1),
            lambda sample, head, row, column: (row >= column) & (row // size == column // size),
        ),
    }


def window(length: int, size: int) -> Sight:
    """The last ``size`` keys of each query."""
    place = torch.arange(length, device="cuda" if torch.cuda.is_available() else "cpu")[None]
    return Sight((place - size + 1).clamp(min=0), place + 1)


def tiled(tiles: Tiles) -> Attention:
    """Ours, without the detour."""
    return lambda q, k, v: block_sparse_attention(q, k, v, tiles, detours=False)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention over all of the past."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(tiles: Tiles) -> Attention:
    """PyTorch's attention with a mask."""
    mask = tiles.sight.mask(tiles.keys, tiles.block_size)[None]
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def compiled(mask: Mask, length: int) -> Attention:
    """FlexAttention of the same mask."""
    flex = _flex()
    torch.compiler.reset()  # it stops compiling a function after some variants
    blocks = flex.create_block_mask(mask.visible, None, None, length, length, device=mask.sight.start.device.type)
    run = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=blocks)


def _flex() -> ModuleType:
    from torch.nn.attention import flex_attention  # it brings the compiler, which takes seconds

    return flex_attention


def tensors(length: int, width: int, needs_grad: bool) -> tuple[list[Tensor], Tensor | None]:
    """Queries, keys, values; and a gradient where one is needed."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    heads = _HEADS if on_gpu else 4
    inputs = [torch.randn(1, heads, length, width, device=device, dtype=dtype) for _ in range(4)]
    return [t.requires_grad_(needs_grad) for t in inputs[:3]], inputs[3] if needs_grad else None


def step(core: Attention, inputs: list[Tensor], grad: Tensor | None) -> Callable[[], object]:
    """One forward, or forward and backward."""
    if grad is None:
        return lambda: core(*inputs)
    return lambda: torch.autograd.grad(core(*inputs), inputs, grad)


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a large product in bfloat16."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(interleaved({"product": lambda: a @ b}, 7)["product"])


if __name__ == "__main__":
    main()
