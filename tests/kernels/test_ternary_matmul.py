"""Ternary products: every instruction set of the C++ against whole numbers, packing, and the quantisation of inputs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.native import is_built
from lightbulb.kernels.ternary_matmul import made_ready, native, reference, ternary_linear, ternary_matmul
from lightbulb.kernels.ternary_matmul.packing import (
    FORMATS,
    PER_BYTE,
    TernaryWeight,
    as_rows,
    interleave,
    pack_codes,
    unpack_codes,
)
from lightbulb.kernels.ternary_matmul.quantise import token_codes as plain_codes
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.lowbit import bounded_codes, quantisation, token_codes

needs_cpp = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
SHAPES = [(1, 64, 16), (1, 37, 19), (2, 640, 33), (3, 129, 70), (5, 1, 1), (13, 700, 48), (131, 83, 35), (0, 20, 16)]


@pytest.fixture(params=range(len(native.LEVELS)), ids=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Compute with one instruction set."""
    if not is_built():
        pytest.skip("no C++ compiler here when LightBulb was installed")
    if request.param > native.best_level():
        pytest.skip(f"this processor has no {native.LEVELS[request.param]}")
    native.force_level(request.param)
    yield request.param
    native.force_level(None)


def whole(low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    return torch.randint(low, high + 1, shape, generator=generator)


def weight_of(codes: Tensor, form: Any, scale: Tensor | None = None) -> TernaryWeight:
    """Packed, in rows; scales are powers of two, so that products with them round nothing."""
    scale = torch.tensor([0.5]).expand(*codes.shape[:-2], 1).contiguous() if scale is None else scale
    return TernaryWeight(pack_codes(codes, form), scale, codes.shape[-1], form)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equality_with_whole_numbers(
    shape: tuple[int, int, int], form: Any, threads: int, level: int, with_threads: Callable[[int], None]
) -> None:
    with_threads(threads)
    rows, inputs, outputs = shape
    x, codes = whole(-127, 127, rows, inputs), whole(-1, 1, outputs, inputs)
    token_scale = 2.0 ** whole(-3, 3, rows, 1)
    found = ternary_matmul(x.to(torch.int8), token_scale, interleave(weight_of(codes, form)))
    assert found.dtype == torch.float32
    assert torch.equal(found, (x @ codes.t()).float() * 0.5 * token_scale)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("code", [-1, 0, 1])
@pytest.mark.parametrize("value", [-127, 0, 127])
@pytest.mark.parametrize("rows", [1, 3])
def test_equality_at_the_extremes(value: int, code: int, form: Any, rows: int, level: int) -> None:
    """Sums as large as they get, over more groups than are added up at a time."""
    x, codes = torch.full((rows, 44_001), value), torch.full((17, 44_001), code)
    found = ternary_matmul(x.to(torch.int8), 1.0, interleave(weight_of(codes, form)))
    assert torch.equal(found, torch.full((rows, 17), 0.5 * value * code * 44_001))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 1, 0], [0, 0, 0, 0], [140, 1, 2, 0]], ids=str)
def test_equality_of_experts(counts: list[int], form: Any, level: int) -> None:
    """Each expert has its rows, and two matrices side by side with scales of their own."""
    x, codes = whole(-127, 127, sum(counts), 50), whole(-1, 1, 4, 42, 50)
    scale = 2.0 ** whole(-4, 4, 4, 2)
    found = ternary_matmul(x.to(torch.int8), 0.25, interleave(weight_of(codes, form, scale)), counts)
    experts = zip(x.split(counts), codes, scale.repeat_interleave(21, 1), strict=True)
    assert torch.equal(found, torch.cat([(own @ matrix.t()) * each * 0.25 for own, matrix, each in experts]))


@needs_cpp
@pytest.mark.parametrize("form", FORMATS)
def test_rows_apart_and_results_of_every_value(form: Any) -> None:
    """Rows of a wider tensor; the same bits in every call; nothing outside the result is touched."""
    wide, codes = whole(-127, 127, 6, 200).to(torch.int8), whole(-1, 1, 21, 77)
    weight = interleave(weight_of(codes, form))
    found = [ternary_matmul(wide[:, 60:137], 1.0, weight) for _ in range(2)]
    assert torch.equal(found[0], (wide[:, 60:137].long() @ codes.t()) * 0.5)
    assert torch.equal(*found)
    turned = wide[:, 60:137].t().contiguous().t()
    assert torch.equal(ternary_matmul(turned, 1.0, weight), found[0])


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_scales_of_any_value(value: float, level: int) -> None:
    x, weight = whole(-127, 127, 2, 30).to(torch.int8), interleave(weight_of(whole(-1, 1, 5, 30), "2bit"))
    expected = ternary_matmul(x, 1.0, weight) * torch.tensor([[1.0], [value]])
    found = ternary_matmul(x, torch.tensor([[1.0], [value]]), weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the mode, the form of the weight and the dtype of codes and scales."""
    x, codes, counts = whole(-127, 127, 7, 61), whole(-1, 1, 3, 18, 61), [4, 0, 3]
    rows = weight_of(codes, form, torch.tensor([[1.0], [2.0], [0.25]], dtype=dtype))
    expected = reference.ternary_matmul(x, torch.full((7, 1), 0.5, dtype=dtype), rows, counts)
    for weight in (rows, interleave(rows), made_ready(rows)):
        monkeypatch.setenv(choice.VARIABLE, kernels)
        for given in (x.to(torch.int8), x.to(dtype)):
            found = ternary_matmul(given, 0.5, weight, counts)
            assert found.dtype == dtype and torch.equal(found, expected)


def test_parts_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch unpacks a few rows at a time."""
    monkeypatch.setattr("lightbulb.kernels.ternary_matmul._UNPACKED", 100)
    x, codes = whole(-127, 127, 4, 33), whole(-1, 1, 11, 33)
    assert torch.equal(ternary_matmul(x.to(torch.int8), 1.0, weight_of(codes, "base3")), (x @ codes.t()) * 0.5)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1, 4, 5, 19, 20, 23])
def test_equality_packed_codes_come_back(form: Any, size: int) -> None:
    codes = whole(-1, 1, 3, 2, size)
    packed = pack_codes(codes, form)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-size // PER_BYTE[form]))
    assert torch.equal(unpack_codes(packed, size, form, torch.int64), codes)
    assert torch.equal(pack_codes(unpack_codes(packed, size, form, torch.float32), form), packed)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 83), (3, 33, 20), (2, 2, 5, 7)], ids=str)
def test_equality_interleaved_codes_come_back(shape: tuple[int, ...], form: Any) -> None:
    weight = weight_of(whole(-1, 1, *shape), form)
    ready = interleave(weight)
    assert ready.codes.shape[-2:] == (16, 4) and ready.out == weight.out == shape[-2]
    back = as_rows(ready)
    assert torch.equal(back.codes, weight.codes) and back.interleaved == 0
    assert as_rows(back) is back


def test_every_base3_byte_comes_back() -> None:
    """All 243; the largest is 242, so a byte has to be unsigned."""
    codes = torch.cartesian_prod(*[torch.arange(-1, 2)] * 5)
    weight = weight_of(codes, "base3")
    assert sorted(weight.codes.flatten().tolist()) == list(range(243))
    assert torch.equal(as_rows(interleave(weight)).codes, weight.codes)


def inputs(dtype: torch.dtype, rows: int = 40, width: int = 203) -> Tensor:
    """Of many sizes; some rows are small whole numbers, whose codes lie halfway between two, some are tiny or zero."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x *= torch.logspace(-6, 4, rows)[:, None]
    x[::5] = (x[::5] / x[::5].abs().amax(-1, keepdim=True) * 12).round()
    x[3], x[4] = 0.0, 1e-30
    return x.to(dtype)


@needs_cpp
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_equality_codes_of_inputs_are_those_of_training(dtype: torch.dtype, norm_eps: float | None, bits: int) -> None:
    """The identity as weight shows code x scale of every input; without a norm all bits are the same."""
    x, how = inputs(dtype), quantisation(bits, norm_eps, False)
    weight = interleave(weight_of(torch.eye(203), "2bit", torch.ones(1)))
    codes, scale, _ = token_codes(x, bits, SINGLE, norm_eps)
    found = ternary_linear(x, how, weight)
    assert found.dtype == dtype
    bound = {"rtol": 2e-6 if dtype == torch.float32 else 8e-3, "atol": 0} if norm_eps else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, (codes * scale).to(dtype), **bound)
    plain = plain_codes(x, how)
    assert torch.equal(plain[0], codes) and torch.equal(plain[1], scale)


@needs_cpp
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_equality_codes_of_bounded_inputs(dtype: torch.dtype) -> None:
    x = torch.rand(9, 65, generator=torch.Generator().manual_seed(1)).mul_(1.2).sub_(0.1).to(dtype)
    weight = interleave(weight_of(torch.eye(65), "base3", torch.ones(1)))
    codes, scale = bounded_codes(x, 8)
    how = quantisation(8, None, True)
    assert torch.equal(ternary_linear(x, how, weight), (codes * scale).to(dtype))
    assert torch.equal(plain_codes(x, how)[0], codes)


@needs_cpp
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("counts", [None, [5, 0, 3]], ids=str)
def test_equality_quantising_inside_is_quantising_before(counts: list[int] | None, form: Any) -> None:
    codes = whole(-1, 1, 3, 50, 203) if counts else whole(-1, 1, 50, 203)
    weight, x, how = interleave(weight_of(codes, form)), inputs(torch.float32, 8), quantisation(8, None, False)
    token, scale, _ = token_codes(x, 8, SINGLE, None)
    expected = ternary_matmul(token.to(torch.int8), scale, weight, counts)
    assert torch.equal(ternary_linear(x, how, weight, counts), expected)
    assert torch.equal(ternary_linear(x, how, as_rows(weight), counts), expected)


@needs_cpp
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_inputs_that_are_not_finite_spoil_their_token_only(value: float, norm_eps: float | None) -> None:
    x = inputs(torch.float32, 6, 30)
    x[2, 7] = value
    weight = interleave(weight_of(whole(-1, 1, 9, 30), "2bit"))
    if value != value:
        assert ternary_linear(x, quantisation(8, None, True), weight)[2].isnan().all()
    found = ternary_linear(x, quantisation(8, norm_eps, False), weight)
    assert found[2].isnan().all() and found[[0, 1, 3, 4, 5]].isfinite().all()
