"""Which rows of which expert each tile of a product has: made on the device, so that nobody waits for counts."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """Sizes of a tile of the result, the step of the sum, warps, and loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def launch(self) -> dict[str, Any]:
        """The arguments of a launch that belong to the tile."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


TABLE = {
    # (kind of product, tile of rows): two accumulators for gate and up; the backward one reads both in its epilogue.
    ("linear", 128): Tiles(128, 256, 64, 8, 3),
    ("linear", 64): Tiles(64, 256, 64, 8, 3),
    ("linear", 16): Tiles(16, 128, 128, 4, 4),
    ("swiglu", 128): Tiles(128, 128, 64, 8, 4),
    ("swiglu", 64): Tiles(64, 128, 64, 4, 4),
    ("swiglu", 16): Tiles(16, 64, 128, 4, 4),
    ("swiglu_grad", 128): Tiles(128, 128, 64, 8, 4),
    ("swiglu_grad", 64): Tiles(64, 128, 64, 4, 4),
    ("swiglu_grad", 16): Tiles(16, 64, 128, 4, 4),
    ("weight_grad", 128): Tiles(128, 256, 64, 8, 4),
    # Waiting for where a row lies takes some of the stages: five leave three loads of numbers in flight.
    ("gathered_weight_grad", 128): Tiles(128, 256, 64, 8, 5),
}
"""Tiles for Hopper: 128 x 256 keeps its tensor cores busy, and three or four loads in flight fit its shared memory."""


def row_tile(rows: int, experts: int) -> int:
    """Rows of a tile, from the mean rows of an expert: half-empty tiles cost as much as full ones."""
    mean = rows / max(experts, 1)
    return 128 if mean > 96 else (64 if mean > 24 else 16)


class Schedule(NamedTuple):
    """Which rows each tile has.

    Attributes:
        table: ``[tiles, 3]`` int32: expert, first row, end of the expert's rows. Unused tiles begin where they end.
        ends: ``[E]`` int32: where each expert's rows end.
        tile: rows of a tile.
    """

    table: Tensor
    ends: Tensor
    tile: int


@triton.jit
def schedule_kernel(ends, table, experts, tiles, TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the table, some tiles in a program: see :class:`Schedule`."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    needed = tl.where(expert < experts, (end - start + TILE - 1) // TILE, 0)
    last = tl.cumsum(needed, 0)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The expert of a tile is the number of those whose tiles all come before.
    mine = tl.sum(((last[None, :] <= slot[:, None]) & (expert < experts)[None, :]).to(tl.int32), 1)
    is_mine = expert[None, :] == mine[:, None]
    inside = slot - tl.sum(tl.where(is_mine, (last - needed)[None, :], 0), 1)
    first = tl.sum(tl.where(is_mine, start[None, :], 0), 1) + inside * TILE
    end_of_mine = tl.sum(tl.where(is_mine, end[None, :], 0), 1)
    used = mine < experts
    tl.store(table + slot * 3, tl.where(used, mine, 0), mask=slot < tiles)
    tl.store(table + slot * 3 + 1, tl.where(used, first, 0), mask=slot < tiles)
    tl.store(table + slot * 3 + 2, tl.where(used, end_of_mine, 0), mask=slot < tiles)


def schedule(ends: Tensor, rows: int, tile: int | None = None) -> Schedule:
    """Tiles for ``rows`` rows of which expert e has those up to ``ends[e]`` (int32)."""
    experts = len(ends)
    tile = tile or row_tile(rows, experts)
    tiles = rows // tile + min(experts, rows)  # no more are ever needed
    table = torch.empty(tiles, 3, dtype=torch.int32, device=ends.device)
    if tiles:
        padded, block = triton.next_power_of_2(experts), 32
        schedule_kernel[(triton.cdiv(tiles, block),)](
            ends, table, experts, tiles, TILE=tile, EXPERTS=padded, BLOCK=block, num_warps=4
        )
    return Schedule(table, ends, tile)
