"""Rotary positions: the Triton kernel and the C++ rows against the naive twin in float64."""

from collections.abc import Callable

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.native import is_built
from lightbulb.kernels.rope import kernel, native, reference, rotate

SHAPES = [(1, 1, 1, 2), (5, 2, 3, 6), (33, 1, 2, 64), (7, 3, 1, 34), (0, 1, 2, 4)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
CPU = torch.device("cpu")

Shape = tuple[int, int, int, int]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, by: str = "position") -> list[Tensor]:
    """Gradient, x, cosines and sines; x is a part of something wider that is NaN elsewhere."""
    length, batch, heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.full((length, batch, heads + 1, width + 3), float("nan"))
    wide[:, :, :heads, :width] = torch.randn(shape, generator=generator)
    grad = torch.randn(batch, heads, length, width, generator=generator).permute(2, 0, 1, 3)
    angles = {"position": (length, 1, 1), "sample": (length, batch, 1), "head": (length, 1, heads)}[by]
    turns = torch.rand(*angles, width // 2, generator=generator) * 6.28
    cos, sin = turns.cos().to(device), turns.sin().to(device)
    return [grad.to(device, dtype), wide.to(device, dtype)[:, :, :heads, :width], cos, sin]


def expected(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    x = x.detach().double().requires_grad_()
    y = reference.rotate(x, cos.double(), sin.double())
    return [y.detach(), *torch.autograd.grad(y, x, grad.double())]


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=bound)


def both_ways(module: object, grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    half = (*x.shape[:3], x.shape[3] // 2)
    cos, sin = cos.expand(half), sin.expand(half)
    length, batch, heads, width = x.shape
    y = grad.new_full((batch, heads, length, width), float("nan")).permute(2, 0, 1, 3)
    back = grad.new_full(x.shape, float("nan"))
    module.rotate(x, cos, sin, y, backwards=False)  # type: ignore[attr-defined]
    module.rotate(grad, cos, sin, back, backwards=True)  # type: ignore[attr-defined]
    return [y, back]


@pytest.mark.parametrize("by", ["position", "sample", "head"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape: Shape, dtype: torch.dtype, by: str, device: torch.device) -> None:
    t = inputs(shape, dtype, device, by)
    check(both_ways(kernel, *t), expected(*t), BOUNDS[dtype])


@pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
@pytest.mark.parametrize("by", ["position", "sample", "head"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape: Shape, dtype: torch.dtype, by: str, with_threads: Callable[[int], None]) -> None:
    t = inputs(shape, dtype, CPU, by)
    found = []
    for threads in (1, 2):
        with_threads(threads)
        found.append(both_ways(native, *t))
    check(found[0], expected(*t), BOUNDS[dtype])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, x, cos, sin = inputs((5, 2, 3, 6), dtype, CPU)
    x = x.detach().requires_grad_()
    y = rotate(x, cos, sin)
    assert y.permute(1, 2, 0, 3).is_contiguous()
    check([y.detach(), *torch.autograd.grad(y, x, grad)], expected(grad, x, cos, sin), 2 * BOUNDS.get(dtype, 1e-13))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_features_that_lie_apart(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, x, cos, sin = inputs((4, 2, 3, 8), torch.float32, CPU, "sample")
    apart = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in (x, cos)]
    apart[0].requires_grad_()
    y = rotate(*apart, sin)
    check([y.detach(), *torch.autograd.grad(y, apart[0], grad)], expected(grad, x, cos, sin), BOUNDS[torch.float32])


def test_compiles_for_hopper() -> None:
    strides = [f"{tensor}_{axis}" for tensor in ("x", "out", "angle") for axis in ("position", "sample", "head")]
    signature = dict.fromkeys([*strides, "length", "heads", "half"], "i32")
    signature |= dict.fromkeys(("x", "out"), "*bf16") | dict.fromkeys(("cos", "sin"), "*fp32")
    kernels = []
    for width in (32, 128, 256):
        positions, half = kernel.tile(width // 2)
        constants = {"BACKWARDS": True, "POSITIONS": positions, "HALF": half}
        path = "lightbulb.kernels.rope.kernel:rotate_kernel"
        kernels.append({"kernel": path, "signature": signature, "constants": constants})
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
