"""RMSNorm, with and without a residual: the Triton kernels and the C++ rows against the naive twin in float64."""

from collections.abc import Callable

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.native import is_built
from lightbulb.kernels.rms_norm import add_rms_norm, kernel, native, reference, rms_norm

SHAPES = [(1, 1), (3, 7), (2, 16), (33, 40), (5, 1030), (0, 8)]
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
EPS = 1e-3
CPU = torch.device("cpu")
native_only = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")


def inputs(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Rows that lie apart in memory: each tensor is the left part of a wider one that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(rows * 1000 + dim)

    def draw() -> Tensor:
        wide = torch.full((rows, dim + 3), float("nan"))
        wide[:, :dim] = torch.randn(rows, dim, generator=generator) * 2
        return wide.to(device, dtype)[:, :dim]

    weight = (torch.rand(dim, generator=generator) + 0.5).to(device, dtype)
    return {name: draw() for name in ("x", "delta", "grad", "grad_total")} | {"weight": weight}


def expected(t: dict[str, Tensor], residual: bool, weighted: bool) -> list[Tensor]:
    """y, sums, gradients of x and weight, in float64 of the sums as rounded."""
    x, weight = t["x"].detach(), t["weight"].detach().double().requires_grad_()
    total = ((x.double() + t["delta"].double()).to(x.dtype) if residual else x).double().requires_grad_()
    y = reference.rms_norm(total, weight if weighted else None, EPS)
    grads = torch.autograd.grad(y, (total, weight), t["grad"].double(), allow_unused=True)
    grad_x = grads[0] + (t["grad_total"].double() if residual else 0.0)
    return [y.detach(), total.detach(), grad_x, *([grads[1]] if weighted else [])]


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        scale = exact.abs().amax().clamp(min=1.0).item() if exact.numel() else 1.0
        torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=bound * scale)


def run(module: object, t: dict[str, Tensor], residual: bool, weighted: bool, wide_weight: bool) -> list[Tensor]:
    weight = (t["weight"].float() if wide_weight else t["weight"]) if weighted else None
    y, total, scale = module.forward(t["x"], t["delta"] if residual else None, weight, EPS)  # type: ignore[attr-defined]
    more = t["grad_total"] if residual else None
    grad_x, grad_weight = module.backward(t["grad"], more, total, weight, scale, weighted)  # type: ignore[attr-defined]
    return [y, total, grad_x, *([grad_weight] if weighted else [])]


@pytest.mark.parametrize(("residual", "weighted"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(
    shape: tuple[int, int], dtype: torch.dtype, residual: bool, weighted: bool, device: torch.device
) -> None:
    t = inputs(*shape, dtype, device)
    found = run(kernel, t, residual, weighted, wide_weight=False)
    check(found, expected(t, residual, weighted), BOUNDS[dtype])
    assert all(map(torch.equal, found, run(kernel, t, residual, weighted, wide_weight=False)))


def test_triton_with_several_turns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", 2)
    t = inputs(70, 300, torch.float32, device)
    check(run(kernel, t, True, True, wide_weight=False), expected(t, True, True), BOUNDS[torch.float32])


@native_only
@pytest.mark.parametrize(("residual", "weighted"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (150, 33)], ids=str)
def test_native(
    shape: tuple[int, int], dtype: torch.dtype, residual: bool, weighted: bool, with_threads: Callable[[int], None]
) -> None:
    t = inputs(*shape, dtype, CPU)
    found = []
    for threads in (1, 2, 5):
        with_threads(threads)
        found.append(run(native, t, residual, weighted, wide_weight=True))
    check(found[0], expected(t, residual, weighted), BOUNDS[dtype])
    for more in found[1:]:
        assert all(map(torch.equal, found[0], more)), "the bits depend on the number of threads"


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    t = inputs(6, 10, dtype, CPU)
    bound = 3 * BOUNDS.get(dtype, 1e-13)
    leaves = {name: t[name].detach().view(2, 3, 10).requires_grad_() for name in ("x", "delta")}
    leaves["weight"] = t["weight"].detach().requires_grad_()
    weight = leaves["weight"] if weighted else None
    y = rms_norm(leaves["x"], weight, EPS)
    wanted = [w.view(2, 3, 10) if w.ndim == 2 else w for w in expected(t, False, weighted)]
    grads = torch.autograd.grad(y, [leaves["x"], *([weight] if weighted else [])], t["grad"].view(2, 3, 10))
    check([y.detach(), leaves["x"].detach(), *grads], wanted, bound)

    y, total = add_rms_norm(leaves["x"], leaves["delta"], weight, EPS)
    wanted = [w.view(2, 3, 10) if w.ndim == 2 else w for w in expected(t, True, weighted)]
    incoming = t["grad"].view(2, 3, 10), t["grad_total"].view(2, 3, 10)
    parameters = [weight] if weight is not None else []
    grad_x, grad_delta, *rest = torch.autograd.grad((y, total), [leaves["x"], leaves["delta"], *parameters], incoming)
    check([y.detach(), total.detach(), grad_x, *rest], wanted, bound)
    assert torch.equal(grad_x, grad_delta)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_is_enough(used: int) -> None:
    t = inputs(4, 9, torch.float32, CPU)
    x, delta, weight = (t[name].detach().clone().requires_grad_() for name in ("x", "delta", "weight"))
    result = add_rms_norm(x, delta, weight, EPS)[used]
    grads = torch.autograd.grad(result, (x, delta, weight), t["grad"], allow_unused=True)
    total = (x + delta).detach().double().requires_grad_()
    exact = reference.rms_norm(total, weight.detach().double(), EPS) if used == 0 else total
    wanted = torch.autograd.grad(exact, total, t["grad"].double())[0]
    check(list(grads[:2]), [wanted, wanted], BOUNDS[torch.float32])
    assert (grads[2] is None) == (used == 1)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_frozen_weight_and_inputs_of_which_one_learns(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    t = inputs(4, 9, torch.float32, CPU)
    delta = t["delta"].detach().clone().requires_grad_()
    y, total = add_rms_norm(t["x"], delta, t["weight"], EPS)
    torch.autograd.backward((y, total), (t["grad"], t["grad_total"]))
    check([delta.grad], [expected(t, True, True)[2]], BOUNDS[torch.float32])
    assert t["weight"].grad is None and t["x"].grad is None


@native_only
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    x = torch.zeros(5, 35, dtype=dtype)
    x[1, 34], x[2, 0], x[3, 17] = float("nan"), float("inf"), 1e18
    ones = torch.ones(35)
    y, total, scale = native.forward(x, None, ones, 1e-6)
    assert torch.equal(y[0], x[0]) and y[1].isnan().all() and y[2, 0].isnan()
    torch.testing.assert_close(y[3, 17].float(), torch.tensor(35.0).sqrt(), rtol=BOUNDS[dtype], atol=0)
    grad_x, grad_weight = native.backward(torch.ones_like(x), None, x, ones, scale, True)
    torch.testing.assert_close(grad_x[0].float(), torch.full((35,), 1e3), rtol=BOUNDS[dtype], atol=0)
    assert grad_weight is not None and grad_weight[34].isnan() and grad_weight[1].isnan()


def test_compiles_for_hopper() -> None:
    kernels = []
    for dim in (128, 4096, kernel.MAX_DIM):
        rows, width, warps = kernel.tile(dim)
        shape = {"ROWS": rows, "DIM": width, "ADD": True, "WEIGHT": True}
        sizes = dict.fromkeys(("x_stride", "delta_stride", "rows", "dim"), "i32")
        forward = dict.fromkeys(("x", "delta", "weight", "total", "y"), "*bf16") | sizes
        backward = dict.fromkeys(("grad", "grad_total", "x", "weight", "grad_x"), "*bf16") | sizes
        backward |= dict.fromkeys(("grad_stride", "grad_total_stride", "turns"), "i32") | {"partial": "*fp32"}
        for name, signature, more in (
            ("forward", forward | {"eps": "fp32"}, {}),
            ("backward", backward, {"PARTIAL": True}),
        ):
            path = f"lightbulb.kernels.rms_norm.kernel:{name}_kernel"
            signature = signature | {"scale": "*fp32"}
            kernels.append({"kernel": path, "signature": signature, "constants": shape | more, "warps": warps})
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
