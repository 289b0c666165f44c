"""SwiGLU: the Triton kernels and the C++ rows against the naive twin in float64."""

from collections.abc import Callable

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.native import is_built
from lightbulb.kernels.swiglu import kernel, native, reference, swiglu, swiglu_, swiglu_grad_

SHAPES = [(1, 1), (3, 7), (17, 64), (5, 1030), (0, 8)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Gradient, gate and up; gate and up are halves of one tensor, so that their rows lie apart."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    both = torch.randn(rows, 2 * width, generator=generator).mul_(4).to(device, dtype)
    return [torch.randn(rows, width, generator=generator).to(device, dtype), *both.chunk(2, dim=1)]


def expected(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    y = reference.swiglu(gate, up)
    return [y.detach(), *torch.autograd.grad(y, (gate, up), grad.double())]


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    grad, gate, up = inputs(*shape, dtype, device)
    y, grad_gate, grad_up, hidden = (torch.full_like(grad, float("nan")) for _ in range(4))
    kernel.forward(gate, up, y)
    kernel.backward(grad, gate, up, grad_gate, grad_up, hidden)
    wanted = expected(grad, gate, up)
    check([y, grad_gate, grad_up, hidden], [*wanted, wanted[0]], BOUNDS[dtype])
    again = torch.full_like(grad, float("nan"))
    kernel.backward(grad, gate, up, again, grad_up)
    assert torch.equal(again, grad_gate)


@pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape: tuple[int, int], dtype: torch.dtype, threads: int, with_threads: Callable[[int], None]) -> None:
    with_threads(threads)
    grad, gate, up = inputs(*shape, dtype, torch.device("cpu"))
    # Poisoned, and wider than the result: what is not to be written must stay.
    outs = [torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype) for _ in range(4)]
    mine = [out[:, : shape[1]] for out in outs]
    native.forward(gate, up, mine[0])
    native.backward(grad, gate, up, *mine[1:])
    wanted = expected(grad, gate, up)
    check(mine, [*wanted, wanted[0]], BOUNDS[dtype])
    assert all(out[:, shape[1] :].isnan().all() for out in outs)


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, gate, up = (t.view(2, 3, 10) for t in inputs(6, 10, dtype, torch.device("cpu")))
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = swiglu(*leaves)
    # The twin rounds after each operation.
    bound = 4 * BOUNDS.get(dtype, 1e-13)
    check([y.detach(), *torch.autograd.grad(y, leaves, grad)], expected(grad, gate, up), bound)


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_in_place(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output over an input: the gradients over gate and up, the hidden rows over the gradient."""
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, gate, up = inputs(5, 1030, dtype, torch.device("cpu"))
    wanted, bound = expected(grad, gate, up), 4 * BOUNDS.get(dtype, 1e-13)
    check([swiglu_(gate.clone(), up.clone(), torch.empty_like(grad))], wanted[:1], bound)
    for target in (0, 1):
        both = [gate.clone(), up.clone()]
        check([swiglu_(*both, both[target])], wanted[:1], bound)
    swiglu_grad_(grad, gate, up, (gate, up), hidden=grad)
    check([grad, gate, up], wanted, bound)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_columns_that_lie_apart(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, gate, up = (t.t() for t in inputs(9, 5, torch.float32, torch.device("cpu")))
    y, *outs = (torch.full_like(grad, float("nan")) for _ in range(4))
    swiglu_(gate, up, y)
    swiglu_grad_(grad, gate, up, (outs[0], outs[1]), outs[2])
    wanted = expected(grad, gate, up)
    check([y, *outs], [*wanted, wanted[0]], 4 * BOUNDS[torch.float32])


@pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
def test_extremes() -> None:
    gate = torch.tensor([[0.0, -1e4, 1e4, float("inf"), -200.0, float("nan")]])
    out = torch.empty_like(gate)
    native.forward(gate, torch.ones_like(gate), out)
    assert out[0, :4].tolist() == [0.0, 0.0, 1e4, float("inf")]
    assert abs(out[0, 4]) < 1e-30 and out[0, 5].isnan()


def test_compiles_for_hopper() -> None:
    kernels = []
    for name, pointers, constants in (
        ("forward", ("gate", "up", "out"), {}),
        ("backward", ("grad", "gate", "up", "grad_gate", "grad_up", "hidden"), {"HIDDEN": True}),
    ):
        strides = dict.fromkeys([f"{pointer}_stride" for pointer in pointers], "i32")
        signature = dict.fromkeys(pointers, "*bf16") | strides | {"width": "i32"}
        path = f"lightbulb.kernels.swiglu.kernel:{name}_kernel"
        kernels.append({"kernel": path, "signature": signature, "constants": {"BLOCK": 1024} | constants})
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
