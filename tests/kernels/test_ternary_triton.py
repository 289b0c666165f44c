"""The ternary products' Triton kernels: codes bit for bit, products exact, gradients those of fake quantisation."""

from typing import Any

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import ternary_matmul
from lightbulb.kernels.ternary_matmul import kernel, reference
from lightbulb.kernels.ternary_matmul.packing import FORMATS, TernaryWeight, interleave, pack_codes
from lightbulb.kernels.ternary_matmul.quantise import Quantisation
from lightbulb.nn import lowbit
from lightbulb.nn.groups import SINGLE

SHAPES = [(1, 1, 1), (3, 5, 2), (8, 67, 130), (17, 129, 40), (70, 256, 64), (2, 531, 65)]
PLAIN = lowbit.quantisation(8, None, False)[:4]
DTYPES = [torch.float32, torch.bfloat16]


def tokens(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of very different magnitude, which lie apart in memory."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, 2 * width, generator=generator) * torch.logspace(-6, 4, rows)[:, None]
    return x.to(device, dtype)[:, :width]


def ternary(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8).to(device)


def packed_of(codes: Tensor) -> Tensor:
    """Four codes to a byte, the last filled up with zeros."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4)) + 1
    return (codes.int() << torch.arange(0, 8, 2, device=codes.device)).sum(-1).to(torch.uint8)


def in_order(found: kernel.Tokens, width: int) -> Tensor:
    """Codes ``[rows, width]``; what lies beyond the width must be zero."""
    codes = found.codes.transpose(1, 2).flatten(1)
    assert not codes[:, width:].any()
    return codes[:, :width]


def exact(codes: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor) -> Tensor:
    """The product in whole numbers, scaled as the kernel does, by the weight's scale first."""
    sums = codes.long().cpu() @ weight.long().cpu().mT
    return sums.float().to(scale.device) * scale * token_scale[:, None]


@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (9, 64), (33, 517), (2, 4100)])
def test_tokens_have_the_codes_of_the_definition(
    rows: int, width: int, dtype: torch.dtype, norm_eps: float | None, device: torch.device
) -> None:
    x = tokens(rows, width, dtype, device)
    codes, scale, inverse_root = lowbit.token_codes(x, 8, SINGLE, norm_eps)
    found = kernel.quantise(x, *lowbit.quantisation(8, norm_eps, False)[:4])
    assert torch.equal(in_order(found, width).float(), codes)
    assert torch.equal(found.sums, found.codes.sum((1, 2), dtype=torch.int32))
    if inverse_root is None:
        assert found.inverse_root is None
        # torch on CUDA divides by a number by multiplying with its inverse
        torch.testing.assert_close(found.scale, scale[:, 0], rtol=0 if device.type == "cpu" else 1.2e-7, atol=0)
    else:
        torch.testing.assert_close(found.scale, scale[:, 0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found.inverse_root, inverse_root[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 67), (0, 9)])
def test_codes_of_others_are_arranged_alike(rows: int, width: int, device: torch.device) -> None:
    x = tokens(rows, width, torch.float32, device)
    codes, scale, _ = lowbit.token_codes(x, 8, SINGLE, None)
    wanted, found = kernel.quantise(x, *PLAIN), kernel.arrange(codes.to(torch.int8), scale)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.sums, wanted.sums)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits(bits: int, device: torch.device) -> None:
    x = tokens(5, 67, torch.float32, device)
    codes, scale, _ = lowbit.token_codes(x, bits, SINGLE, None)
    found = kernel.quantise(x, *lowbit.quantisation(bits, None, False)[:4])
    assert torch.equal(in_order(found, 67).float(), codes)
    torch.testing.assert_close(found.scale, scale[:, 0], rtol=1.2e-7, atol=0)


def test_ties_go_to_the_smaller_code(device: torch.device) -> None:
    x = torch.tensor([[127.0, 63.5, -63.5, 0.5, 1.5, 2.5, -0.5, 126.5]], device=device)
    found = in_order(kernel.quantise(x, *PLAIN), 8)
    assert found.tolist() == lowbit.token_codes(x, 8, SINGLE, None)[0].int().tolist()
    assert found[0, :4].tolist() == [127, 63, -63, 0]


def test_extreme_tokens(device: torch.device) -> None:
    x = torch.zeros(4, 9, device=device)
    x[1, 3], x[2, 8], x[3] = float("inf"), float("nan"), 3e38
    found = kernel.quantise(x, *PLAIN)
    assert in_order(found, 9)[0].eq(0).all() and found.scale[0] > 0
    y = kernel.multiply(found, packed_of(ternary(6, 9, device=device)), torch.ones(1, device=device), torch.float32)
    assert y[0].eq(0).all() and not y[1:3].isfinite().any()
    assert in_order(found, 9)[3].eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 130), (2, 3, 4, 1030)], ids=str)
def test_weights_are_packed_as_the_definition_rounds(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    weight.view(-1)[0] = 0.0
    codes, scale = lowbit.weight_codes(weight, "ternary", SINGLE)
    assert torch.equal(kernel.pack(weight, scale), packed_of(codes.to(torch.int8)))
    turned = torch.empty(shape[::-1], device=device, dtype=dtype).permute(*reversed(range(len(shape)))).copy_(weight)
    assert torch.equal(kernel.pack(turned, scale), packed_of(codes.to(torch.int8)))


def test_weights_halfway_become_zero(device: torch.device) -> None:
    weight = torch.tensor([[0.5, -0.5, 0.50001, -0.50001, 1.5, 9.0]], device=device)
    codes = torch.tensor([[0, 0, 1, -1, 1, 1]], dtype=torch.int8, device=device)
    assert torch.equal(kernel.pack(weight, torch.ones(1, 1, device=device)), packed_of(codes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_exact(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    rows, width, outputs = shape
    weight, scale = ternary(outputs, width, device=device), torch.tensor([0.37], device=device)
    found = kernel.quantise(tokens(rows, width, torch.float32, device), *PLAIN)
    y = kernel.multiply(found, packed_of(weight), scale, dtype, splits=1)
    wanted = exact(in_order(found, width), weight, scale, found.scale)
    # The interpreter cuts what it rounds to bfloat16; a GPU rounds to the nearest.
    cuts = dtype == torch.bfloat16 and device.type == "cpu"
    torch.testing.assert_close(y, wanted.to(dtype), rtol=2**-7 if cuts else 0, atol=0)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize(("rows", "width"), [(1, 4099), (5, 2048), (9, 1000)])
def test_splits_change_no_bit(rows: int, width: int, splits: int, device: torch.device) -> None:
    packed, scale = packed_of(ternary(70, width, device=device)), torch.tensor([0.37], device=device)
    found = kernel.quantise(tokens(rows, width, torch.float32, device), *PLAIN)
    whole = kernel.multiply(found, packed, scale, torch.float32, splits=1)
    assert torch.equal(kernel.multiply(found, packed, scale, torch.float32, splits=splits), whole)


def test_matrices_side_by_side_have_their_own_scales(device: torch.device) -> None:
    weight, scale = ternary(3, 30, 50, device=device), torch.tensor([0.5, 2.0, 0.0], device=device)
    found = kernel.quantise(tokens(4, 50, torch.float32, device), *PLAIN)
    for splits in (1, 4):
        y = kernel.multiply(found, packed_of(weight), scale[:, None, None], torch.float32, splits=splits)
        parts = [exact(in_order(found, 50), w, s, found.scale) for w, s in zip(weight, scale, strict=True)]
        assert torch.equal(y, torch.cat(parts, 1))
        joined = kernel.multiply(found, packed_of(weight).flatten(0, 1), scale, torch.float32, splits=splits)
        assert torch.equal(joined, y)


@pytest.mark.parametrize("counts", [[3], [0, 0, 1], [5, 0, 1, 70, 0], [1] * 9, [0, 140, 0]], ids=str)
def test_experts(counts: list[int], device: torch.device) -> None:
    experts, rows = len(counts), sum(counts)
    weight, scale = ternary(experts, 2, 20, 37, device=device), torch.rand(experts, 2, 1, 1).to(device) + 0.1
    found = kernel.quantise(tokens(rows, 37, torch.float32, device), *PLAIN)
    ends = torch.tensor(counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    y = kernel.multiply(found, packed_of(weight), scale, torch.float32, ends)
    first = 0
    for expert, count in enumerate(counts):
        part = slice(first, first + count)
        for half in range(2):
            codes = in_order(found, 37)[part]
            wanted = exact(codes, weight[expert, half], scale[expert, half, 0], found.scale[part])
            assert torch.equal(y[part, 20 * half : 20 * (half + 1)], wanted)
        first += count


def test_no_rows(device: torch.device) -> None:
    packed, scale = packed_of(ternary(2, 6, 9, device=device)), torch.ones(2, device=device)
    found = kernel.quantise(torch.empty(0, 9, device=device), *lowbit.quantisation(8, 1e-6, False)[:4])
    assert kernel.multiply(found, packed, scale, torch.bfloat16).shape == (0, 12)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    assert kernel.multiply(found, packed, scale, torch.bfloat16, ends).shape == (0, 6)


def test_tiles_hold_the_rows_and_fill_the_device() -> None:
    assert [kernel.tile_of(rows, 1 << 20).rows for rows in (1, 8, 9, 40, 100, 130, 4096)] == [
        8,
        8,
        16,
        64,
        128,
        256,
        256,
    ]
    assert kernel.tile_of(256, 4096).rows == 64 and kernel.tile_of(512, 4096).rows == 128


@pytest.mark.parametrize("tile", kernel.TILES, ids=lambda tile: f"{tile.outputs}x{tile.rows}")
def test_tiles_change_no_bit(tile: kernel.Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = ternary(130, 270, device=device), torch.tensor([0.37], device=device)
    found = kernel.quantise(tokens(20, 270, torch.float32, device), *PLAIN)
    monkeypatch.setattr(kernel, "tile_of", lambda rows, outputs: tile)
    y = kernel.multiply(found, packed_of(weight), scale, torch.float32)
    assert torch.equal(y, exact(in_order(found, 270), weight, scale, found.scale))


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The door takes Triton for tensors of any device: without a GPU, in the interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr(ternary_matmul, "takes_native", lambda *tensors: False)
        monkeypatch.setattr(ternary_matmul, "takes_triton", lambda *tensors: tensors[-1].dtype != torch.float64)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("scale_of_tokens", [0.25, None], ids=["number", "each"])
@pytest.mark.parametrize("counts", [None, [3, 0, 6]], ids=str)
def test_packed_weights(counts: list[int] | None, scale_of_tokens: float | None, device: torch.device) -> None:
    """Codes of others by packed weights, those that were interleaved for a CPU too; base 3 takes torch."""
    codes = torch.randint(-127, 128, (9, 61), generator=torch.Generator().manual_seed(0)).to(device, torch.int8)
    weights = ternary(3, 18, 61, device=device) if counts else ternary(18, 61, device=device)
    scale = torch.tensor([[1.0, 0.5], [2.0, 0.0], [0.25, 4.0]] if counts else [0.5, 2.0], device=device)
    each = scale_of_tokens or torch.linspace(-2, 2, 9, device=device)[:, None]
    for form in FORMATS:
        rows = TernaryWeight(pack_codes(weights, form), scale, 61, form)
        wanted = reference.ternary_matmul(codes, each, rows, counts)
        for weight in (rows, ternary_matmul.made_ready(interleave(rows))):
            assert not weight.interleaved
            found = ternary_matmul.ternary_matmul(codes, each, weight, counts)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
    assert torch.equal(packed_of(weights), pack_codes(weights, "2bit")), "training packs as files do"


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("how", [PLAIN, (127, 126.99, 1e-8, 1e-6), (127, 0.0, 0.0, None, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers(dtype: torch.dtype, how: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, whose rows lie apart or transposed, are quantised on the way; the plain form gives the same."""
    how, counts = Quantisation(*how), [4, 0, 3]
    weight = TernaryWeight(
        pack_codes(ternary(3, 20, 37, device=device), "2bit"), torch.ones(3, 1).to(device), 37, "2bit"
    )
    x = tokens(7, 37, dtype, device) if not how.is_bounded else tokens(7, 37, dtype, device).sigmoid()
    x[5, 30] = float("nan")
    given = [x, x.t().contiguous().t()]
    launches: list[Any] = []
    multiply = kernel.multiply
    monkeypatch.setattr(kernel, "multiply", lambda *a: launches.append(a) or multiply(*a))
    found = [ternary_matmul.ternary_linear(each, how, weight, counts) for each in given]
    assert len(launches) == 2 and found[0].dtype == dtype and found[0][5].isnan().all()
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(ternary_matmul, "takes_triton", lambda *tensors: False)
    wanted = ternary_matmul.ternary_linear(x, how, weight, counts)
    assert len(launches) == 2
    cuts = dtype == torch.bfloat16 and device.type == "cpu"  # as above
    torch.testing.assert_close(found[0], wanted, rtol=2**-7 if cuts else 1e-6, atol=0, equal_nan=True)


@pytest.mark.skipif("not config.getoption('--device').startswith('cuda')", reason="the interpreter has no assembly")
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 60, 128, 300])
def test_assembly_does_as_the_plain_form(
    rows: int, words: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_HAS_WORDS", words)
    weight, scale = ternary(300, 1024, device=device), torch.tensor([0.37], device=device)
    found = kernel.quantise(tokens(rows, 1024, torch.float32, device), *PLAIN)
    y = kernel.multiply(found, packed_of(weight), scale, torch.float32)
    assert torch.equal(y, exact(in_order(found, 1024), weight, scale, found.scale))


def test_compiles_for_hopper() -> None:
    path = "lightbulb.kernels.ternary_matmul.kernel:"
    numbers = ("rows", "outputs", "bytes_", "places", "split_bytes", "rows_per_scale", "experts", "x_stride", "width")
    sizes = dict.fromkeys((*numbers, "weight_stride", "splits"), "i32")
    floats = dict.fromkeys(("least", "eps", "top", "levels"), "fp32")
    pointers = {"codes": "*i8", "packed": "*u8", "token_scales": "*fp32", "sums": "*i32", "scales": "*fp32"}
    signature = sizes | floats | pointers | {"out": "*bf16", "ends": "*i32", "x": "*bf16", "weight": "*bf16"}
    signature |= {"inverse_roots": "*fp32", "partial": "*i32"}
    kernels = [
        {"kernel": f"{path}quantise_kernel", "signature": signature, "constants": {"NORM": True, "BLOCK": 2048}},
        {"kernel": f"{path}pack_kernel", "signature": signature, "constants": {"BLOCK": 1024}},
        {"kernel": f"{path}finish_kernel", "signature": signature, "constants": {"BLOCK": 1024}},
    ]  # fmt: skip
    for tile in kernel.TILES:
        for experts, split in ((0, False), (64, False), (0, True))[: 3 if tile.rows == 8 else 1 + (tile.rows == 64)]:
            out = signature | {"out": "*i32" if split else "*bf16"}
            constants = {"EXPERTS": experts, "SPLIT": split, "WORDS": True}
            constants |= {"OUTPUTS": tile.outputs, "ROWS": tile.rows, "BYTES": tile.bytes}
            item = {"kernel": f"{path}multiply_kernel", "signature": out, "constants": constants}
            kernels.append(item | {"warps": tile.warps, "stages": tile.stages})
    found = compile_all(kernels)
    assert len(found) == len(kernels)
    for item in found:
        assert "error" not in item and item["shared"] <= SHARED_LIMIT, item
