"""The Triton kernels: inputs to 8 bits, weights to 2, and their product in whole numbers on the tensor cores.

W2A8 as BitNet b1.58 defines it (Ma et al. 2024, arXiv:2402.17764). The weights' bytes go from memory to registers as
they are; a shift and a mask make four tiles of digits (code + 1) of each, and the ``+ 1`` is taken out at the end with
the sum of each token's codes. So that the tiles of inputs that meet them are contiguous too, inputs are quantised into
four planes, plane ``k`` holding the features ``4 i + k``. Sums are int32 and therefore exact in any order: how a
product is cut into programs changes no bit of it.

A product of T tokens reads ``out x in / 4`` bytes of weights and ``T x in`` of inputs, writes ``2 x T x out`` in
bfloat16, and does ``2 x T x out x in`` operations on 8-bit numbers: up to some hundred tokens memory bounds it. Packing
costs ``2.25 x out x in`` bytes once a forward in training, quantising ``3 x T x in``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ALIGN = 16  # bytes that one thread loads at a time
_PROGRAMS = 128  # an H100 has 132 multiprocessors
_HAS_WORDS = torch.version.hip is None and not triton.knobs.runtime.interpret  # NVIDIA's assembly


class Tokens(NamedTuple):
    """Quantised inputs.

    Attributes:
        codes: ``[rows, 4, places]`` int8; ``codes[r, k, i]`` is feature ``4 i + k``, zero from the last feature on.
        scale: ``[rows]`` float32.
        sums: ``[rows]`` int32, of each row's codes.
        inverse_root: ``[rows]`` float32, the factor of the norm; None without one.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    inverse_root: Tensor | None


class Tile(NamedTuple):
    """How a product is cut: outputs and rows of a program, bytes of a step along the inputs."""

    outputs: int
    rows: int
    bytes: int
    warps: int
    stages: int


TILES = (
    Tile(64, 8, 128, 4, 4),
    Tile(64, 16, 128, 4, 4),
    Tile(64, 32, 128, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 256, 64, 8, 3),
)
"""Each with more rows than the one before; see :func:`tile_of`."""


@triton.jit
def quantise_kernel(
    x, codes, scales, sums, inverse_roots, x_stride, width, places, least, eps, top, levels,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. Compiled without fused multiply-adds: a product must be rounded before it is rounded to a code."""
    row = tl.program_id(0).to(tl.int64)
    plane, offset = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
    largest = tl.zeros([4, BLOCK], tl.float32)
    squares = tl.zeros([4, BLOCK], tl.float32)
    nans = tl.zeros([4, BLOCK], tl.int32)
    for start in range(0, places, BLOCK):
        feature = (start + offset) * 4 + plane
        v = tl.load(x + row * x_stride + feature, mask=feature < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(v))
        squares += v * v
        nans |= (v != v).to(tl.int32)
    most = tl.maximum(tl.max(tl.max(largest, 1), 0), least)
    most = tl.where(tl.max(tl.max(nans, 1), 0) > 0, float("nan"), most)
    scale = tl.div_rn(most, levels)
    factor = tl.div_rn(1.0, most) * top
    if NORM:
        inverse_root = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(tl.sum(squares, 1), 0), width.to(tl.float32)) + eps))
        tl.store(inverse_roots + row, inverse_root)
        scale *= inverse_root
    total = tl.zeros([4, BLOCK], tl.int32)
    for start in range(0, places, BLOCK):
        feature = (start + offset) * 4 + plane
        v = tl.load(x + row * x_stride + feature, mask=feature < width, other=0.0).to(tl.float32) * factor
        v = tl.where(v == v, v, 0.0)  # the scale already says that the row is not finite
        code = ((v + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 x 2^23: to the nearest, ties to even
        total += code
        place = codes + row * (4 * places) + plane * places + start + offset
        tl.store(place, code.to(tl.int8), mask=start + offset < places)
    tl.store(scales + row, scale)
    tl.store(sums + row, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def pack_kernel(weight, scales, packed, weight_stride, width, bytes_, rows_per_scale, BLOCK: tl.constexpr):
    """One block of bytes of one row of a weight."""
    row = tl.program_id(0).to(tl.int64)
    byte, place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 4)[None, :]
    feature = byte[:, None] * 4 + place
    w = tl.load(weight + row * weight_stride + feature, mask=feature < width, other=0.0).to(tl.float32)
    # The nearest whole number, ties to even, between -1 and 1: only beyond one half it is not 0.
    w = tl.div_rn(w, tl.load(scales + row // rows_per_scale))
    digit = 1 + (w > 0.5).to(tl.int32) - (w < -0.5).to(tl.int32)
    tl.store(packed + row * bytes_ + byte, tl.sum(digit << (2 * place), 1).to(tl.uint8), mask=byte < bytes_)


@triton.jit
def _digits(packed, WORDS: tl.constexpr):
    """The four digits of each byte, as int8; where WORDS, one instruction works on four bytes."""
    if WORDS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            and.b32 $0, $4, 0x03030303;
            shr.b32 t, $4, 2;
            and.b32 $1, t, 0x03030303;
            shr.b32 t, $4, 4;
            and.b32 $2, t, 0x03030303;
            shr.b32 t, $4, 6;
            and.b32 $3, t, 0x03030303;
            }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        a, b = (packed & 3).to(tl.int8), ((packed >> 2) & 3).to(tl.int8)
        return a, b, ((packed >> 4) & 3).to(tl.int8), (packed >> 6).to(tl.int8)


@triton.jit
def _expert(ends, block, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of the block of rows: its expert (``experts`` past the last block), first row, and where the expert's end."""
    index = tl.arange(0, EXPERTS)
    stop = tl.load(ends + index, mask=index < experts, other=0)
    start = tl.load(ends + index - 1, mask=(index > 0) & (index < experts), other=0)
    blocks = tl.where(index < experts, (stop - start + ROWS - 1) // ROWS, 0)
    before = tl.cumsum(blocks, 0) - blocks
    mine = (block >= before) & (block < before + blocks)
    expert = tl.min(tl.where(mine, index, experts))
    first = tl.sum(tl.where(mine, start + (block - before) * ROWS, 0))
    return expert, first, tl.sum(tl.where(mine, stop, 0))


@triton.jit
def multiply_kernel(
    codes, packed, token_scales, sums, scales, out, ends,
    rows, outputs, bytes_, places, split_bytes, rows_per_scale, experts,
    EXPERTS: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of outputs x rows. The weights are the first factor, which tensor cores take from registers."""
    if EXPERTS > 0:
        expert, first, rows = _expert(ends, tl.program_id(1), experts, ROWS, EXPERTS)
        if expert >= experts:
            return
        expert = expert.to(tl.int64)
    else:
        expert, first = tl.zeros([], tl.int64), tl.program_id(1) * ROWS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = first + tl.arange(0, ROWS)
    byte = tl.arange(0, BYTES)
    output_in, row_in = output < outputs, row < rows
    matrix_row = expert * outputs + output.to(tl.int64)
    row64 = row.to(tl.int64)
    begin = tl.program_id(2) * split_bytes
    w_places = packed + matrix_row[:, None] * bytes_ + (begin + byte)[None, :]
    c_places = codes + row64[None, :] * (4 * places) + (begin + byte)[:, None]
    sum_ = tl.zeros([OUTPUTS, ROWS], tl.int32)
    for step in range(begin, tl.minimum(begin + split_bytes, bytes_), BYTES):
        byte_in = step + byte < bytes_
        w = tl.load(w_places, mask=output_in[:, None] & byte_in[None, :], other=0)
        digits = _digits(w, WORDS)
        for k in tl.static_range(4):
            c = tl.load(c_places + k * places, mask=row_in[None, :] & byte_in[:, None], other=0)
            sum_ = tl.dot(digits[k], c, sum_, out_dtype=tl.int32)
        w_places += BYTES
        c_places += BYTES
    inside = row_in[:, None] & output_in[None, :]
    if SPLIT:
        place = (tl.program_id(2) * rows.to(tl.int64) + row64[:, None]) * outputs + output[None, :]
        tl.store(out + place, tl.trans(sum_), mask=inside)
    else:
        # Without its digits' excess the sum is that of the products of codes.
        y = (tl.trans(sum_) - tl.load(sums + row, mask=row_in, other=0)[:, None]).to(tl.float32)
        y *= tl.load(scales + matrix_row // rows_per_scale, mask=output_in, other=0.0)[None, :]
        y *= tl.load(token_scales + row, mask=row_in, other=0.0)[:, None]
        tl.store(out + row64[:, None] * outputs + output[None, :], y, mask=inside)


@triton.jit
def finish_kernel(partial, token_scales, sums, scales, out, rows, outputs, splits, rows_per_scale, BLOCK: tl.constexpr):
    """Add the parts of a product whose inputs were split over programs, and scale."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = output < outputs
    total = tl.zeros([BLOCK], tl.int32)
    for split in range(splits):
        total += tl.load(partial + (split * rows.to(tl.int64) + row) * outputs + output, mask=inside, other=0)
    y = (total - tl.load(sums + row)).to(tl.float32)
    y *= tl.load(scales + output // rows_per_scale, mask=inside, other=0.0)
    tl.store(out + row * outputs + output, y * tl.load(token_scales + row), mask=inside)


def quantise(x: Tensor, levels: int, factor: float, least: float, norm_eps: float | None) -> Tokens:
    """Codes of rows, bit for bit those of :func:`lightbulb.nn.lowbit.token_codes`, where these numbers come from.

    Args:
        x: ``[rows, features]``, columns side by side.
        levels: the largest code, at most 127.
        factor: what a row's largest magnitude becomes before it is rounded; a little less than ``levels``.
        least: no largest magnitude is below.
        norm_eps: scales are divided by ``sqrt(mean(x^2) + norm_eps)``; None: they are not.
    """
    rows, width = x.shape
    places = triton.cdiv(triton.cdiv(width, 4), _ALIGN) * _ALIGN
    codes = torch.empty(rows, 4, places, dtype=torch.int8, device=x.device)
    scale, inverse_root = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    block = min(2048, triton.next_power_of_2(places))
    if rows:
        quantise_kernel[rows,](
            x, codes, scale, sums, inverse_root, x.stride(0), width, places, least, norm_eps or 0.0, factor,
            float(levels), NORM=norm_eps is not None, BLOCK=block, num_warps=8 if block > 512 else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Tokens(codes, scale, sums, None if norm_eps is None else inverse_root)


def arrange(codes: Tensor, scale: Tensor) -> Tokens:
    """What other code has quantised, ``codes [rows, features]`` int8 and ``scale [rows, 1]``, in planes."""
    places = triton.cdiv(triton.cdiv(codes.shape[1], 4), _ALIGN) * _ALIGN
    planes = torch.nn.functional.pad(codes, (0, 4 * places - codes.shape[1])).unflatten(1, (places, 4)).mT
    scale = scale.float().expand(len(codes), 1).reshape(-1).contiguous()
    return Tokens(planes.contiguous(), scale, codes.sum(1, dtype=torch.int32), None)


def pack(weight: Tensor, scale: Tensor) -> Tensor:
    """Ternary codes of ``weight [..., out, in]`` by scales ``[..., 1, 1]``, in bytes ``[..., out, ceil(in / 4)]``."""
    *matrices, outputs, width = weight.shape
    flat = weight.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 or width == 1 else flat.contiguous()
    packed = torch.empty(len(flat), triton.cdiv(width, 4), dtype=torch.uint8, device=weight.device)
    if packed.numel():
        block = min(1024, triton.next_power_of_2(packed.shape[1]))
        pack_kernel[len(flat), triton.cdiv(packed.shape[1], block)](
            flat, scale.float().contiguous(), packed, flat.stride(0), width, packed.shape[1], outputs, BLOCK=block
        )
    return packed.view(*matrices, outputs, -1)


def multiply(
    tokens: Tokens, packed: Tensor, scale: Tensor, dtype: torch.dtype, ends: Tensor | None = None, splits: int = 0
) -> Tensor:
    """``y[r] = W @ x[r]``, of several matrices side by side, or with the expert's that row r belongs to.

    Args:
        tokens: the inputs.
        packed: ``[..., out, bytes]`` uint8 contiguous, four codes to a byte; with ``ends`` one such for each expert.
        scale: of each matrix, or of equal parts of its outputs, in order.
        dtype: of the result.
        ends: ``[experts]`` int32 on the device: where each expert's rows end, the last at the last row. Nothing is
            read back from the device.
        splits: parts into which the inputs are cut, so that few outputs still fill the device; 0 chooses. Results are
            the same. Products with experts are not cut.

    Returns:
        ``[rows, out of all matrices]``.
    """
    rows, bytes_ = len(tokens.codes), packed.shape[-1]
    experts = 0 if ends is None else len(ends)
    outputs = packed.numel() // bytes_ // max(experts, 1)
    out = torch.empty(rows, outputs, dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    tile = tile_of(triton.cdiv(rows, max(experts, 1)), outputs * max(experts, 1))
    blocks = triton.cdiv(rows, tile.rows) + experts  # with experts: as many as there can be
    programs = blocks * triton.cdiv(outputs, tile.outputs)
    steps = triton.cdiv(bytes_, tile.bytes)
    if not splits:  # two programs on each multiprocessor, and no more bytes of partial sums than of weights
        splits = max(1, min(8, 2 * _PROGRAMS // programs, bytes_ // (8 * rows)))
    split_steps = steps if experts else triton.cdiv(steps, min(splits, steps))
    splits = triton.cdiv(steps, split_steps)
    scale = scale.reshape(-1).float()
    rows_per_scale = packed.numel() // bytes_ // len(scale)
    target = out if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.int32, device=out.device)
    multiply_kernel[triton.cdiv(outputs, tile.outputs), blocks, splits](
        tokens.codes, packed, tokens.scale, tokens.sums, scale, target, out if ends is None else ends,
        rows, outputs, bytes_, tokens.codes.shape[2], split_steps * tile.bytes, rows_per_scale, experts,
        EXPERTS=triton.next_power_of_2(experts) if experts else 0, SPLIT=splits > 1, WORDS=_HAS_WORDS,
        OUTPUTS=tile.outputs, ROWS=tile.rows, BYTES=tile.bytes, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        finish_kernel[rows, triton.cdiv(outputs, 1024)](
            target, tokens.scale, tokens.sums, scale, out, rows, outputs, splits, rows_per_scale, BLOCK=1024
        )
    return out


def tile_of(rows: int, outputs: int) -> Tile:
    """The smallest tile that holds all rows, or a smaller one where that leaves multiprocessors without work."""
    fitting = next((index for index, tile in enumerate(TILES) if rows <= tile.rows), len(TILES) - 1)
    for tile in reversed(TILES[3 : fitting + 1]):
        if triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs) >= _PROGRAMS:
            return tile
    return TILES[min(fitting, 3)]
