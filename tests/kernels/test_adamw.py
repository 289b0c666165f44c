"""AdamW: the Triton kernel and the C++ pass against the naive twin in float64, and against torch's optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.adamw import adamw, is_one_pass, kernel, native, reference
from lightbulb.kernels.native import is_built

SIZES = [1, 15, 1024, 1031, 0, 70]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GRADIENTS = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")


def state(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", sizes: list[int] | None = None
) -> list[list[Tensor]]:
    """Weights, gradients (of the dtype), both moments and copies."""
    generator = torch.Generator().manual_seed(7)
    sizes = SIZES if sizes is None else sizes
    params, grads, exp_avgs, exp_avg_sqs = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(4))
    copies = [torch.full((n,), float("nan"), dtype=torch.bfloat16) for n in sizes]
    grads = [g.to(dtype) for g in grads]
    everything = [params, grads, exp_avgs, [v.square() for v in exp_avg_sqs], copies]
    return [[t.to(device) for t in tensors] for tensors in everything]


def expected(before: list[list[Tensor]], steps: list[float], settings: dict[str, Any]) -> list[list[Tensor]]:
    """Weights and moments after the twin's step in float64."""
    wide = [[t.double() for t in tensors] for tensors in before]
    for index, step in enumerate(steps):
        tensors = [own[index] for own in wide[:4]]
        reference.update(*tensors, None, step, *settings.values())
    return [wide[0], wide[2], wide[3]]


def check(after: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    """Weights and moments to a few units in the last place of the largest terms; copies are the weights, rounded."""
    params, _, exp_avgs, exp_avg_sqs, copies = after
    for mine, exact in zip((params, exp_avgs, exp_avg_sqs), wanted, strict=True):
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=4e-7, atol=2e-7)
    for copy, param in zip(copies, params, strict=True):
        torch.testing.assert_close(copy, param.to(copy.dtype), rtol=0 if copy.is_cuda else 2**-7, atol=0)


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_triton(step: int, dtype: torch.dtype, device: torch.device) -> None:
    now = state(dtype, device)
    wanted = expected(now, [step] * len(SIZES), SETTINGS)
    factors = 3e-3 / (1 - 0.9**step), (1 - 0.95**step) ** -0.5
    for tensors in zip(*now, strict=True):
        kernel.update(*tensors, factors, 3e-4, (0.9, 0.95), 1e-8)
    check(now, wanted)


def test_triton_writes_no_copy_that_is_not_there(device: torch.device) -> None:
    now = state(device=device)
    wanted = expected(now, [1] * len(SIZES), SETTINGS)
    for param, grad, exp_avg, exp_avg_sq, copy in zip(*now, strict=True):
        kernel.update(param, grad, exp_avg, exp_avg_sq, None, (3e-2, 0.05**-0.5), 3e-4, (0.9, 0.95), 1e-8)
        copy.copy_(param)
    check(now, wanted)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("steps", [[1] * 6, [1000] * 6, [1, 2, 3, 4, 5, 6]], ids=str)
def test_native(steps: list[float], dtype: torch.dtype, threads: int, with_threads: Callable[[int], None]) -> None:
    with_threads(threads)
    now = state(dtype)
    grads = [g.clone() for g in now[1]]
    wanted = expected(now, steps, SETTINGS)
    adamw(*now, steps, **SETTINGS)
    check(now, wanted)
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(now[4], now[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now[1], grads, strict=True))


@needs_native
def test_native_stays_inside_its_tensors() -> None:
    guarded = [torch.full((41,), 7.0) for _ in range(3)] + [torch.full((41,), 7.0, dtype=torch.bfloat16)]
    param, exp_avg, exp_avg_sq, copy = (t[3:36] for t in guarded)
    adamw([param], [torch.ones(33)], [exp_avg], [exp_avg_sq], [copy], [1], **SETTINGS)
    assert all(t[:3].eq(7).all() and t[36:].eq(7).all() and not t[3:36].eq(7).any() for t in guarded)


@needs_native
def test_threads_change_no_bit(with_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 3, 4):
        with_threads(threads)
        now = state(sizes=[5000, 1, 333])
        adamw(*now, [2] * 3, **SETTINGS)
        results.append(torch.cat([*now[0], *now[2], *now[3]]))
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.0)}, {"lr": 0.0}], ids=str)
def test_twenty_steps_of_torch(settings: dict[str, Any]) -> None:
    settings = SETTINGS | settings
    params, _, exp_avgs, exp_avg_sqs, copies = state(sizes=[1031, 16])
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, **settings, fused=True)
    for tensor in (*exp_avgs, *exp_avg_sqs):
        tensor.zero_()
    generator = torch.Generator().manual_seed(11)
    for step in range(1, 21):
        grads = [torch.randn(p.shape, generator=generator) * 10.0 ** (step % 5 - 3) for p in params]
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        adamw(params, grads, exp_avgs, exp_avg_sqs, copies, [step] * 2, **settings)
    for index, p in enumerate(theirs):
        # A unit in the last place, 1.2e-7, at each of twenty steps; almost all weights are equal.
        torch.testing.assert_close(params[index], p.detach(), rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(exp_avgs[index], optimizer.state[p]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(exp_avg_sqs[index], optimizer.state[p]["exp_avg_sq"], rtol=1e-5, atol=0)


@needs_native
def test_one_step_of_torch_to_the_last_places() -> None:
    params, grads, exp_avgs, exp_avg_sqs, copies = state(sizes=[100_000])
    before = [params[0].clone(), exp_avgs[0].clone(), exp_avg_sqs[0].clone()]
    leaf = params[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], **SETTINGS, fused=True)
    leaf.grad = grads[0].clone()
    moments = {"exp_avg": exp_avgs[0].clone(), "exp_avg_sq": exp_avg_sqs[0].clone()}
    optimizer.state[leaf] = {"step": torch.tensor(9.0), **moments}
    optimizer.step()
    adamw(params, grads, exp_avgs, exp_avg_sqs, copies, [10], **SETTINGS)
    found = (params[0], exp_avgs[0], exp_avg_sqs[0])
    for mine, theirs, old in zip(found, (leaf.detach(), *moments.values()), before, strict=True):
        # Last places of the larger term: where a sum nearly cancels, its own are no measure.
        place = torch.maximum(theirs.abs(), old.abs()) * 2**-23
        apart = (mine - theirs).abs() / place
        # An update much larger than its weight brings in the roundings of a product, a root and a quotient.
        assert apart.max() <= 8 and (apart > 1).float().mean() < 1e-2


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_door(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    now = [[t.to(dtype) for t in tensors] for tensors in state()[:4]] + [state()[4]]
    wanted = expected(now, [3] * len(SIZES), SETTINGS)
    adamw(*now, [3] * len(SIZES), **SETTINGS)
    check(now, wanted)
    assert is_one_pass(now[0][0]) == (kernels == "auto" and is_built() and dtype == torch.float32)


@pytest.mark.parametrize("grads", [torch.float32, torch.float16], ids=str)
def test_what_has_no_kernel(grads: torch.dtype) -> None:
    """Strided weights, gradients in half precision, weights without a copy among others."""
    params, own, exp_avgs, exp_avg_sqs, copies = state(sizes=[12, 6])
    params[0] = params[0].view(4, 3).t()
    own[0], exp_avgs[0], exp_avg_sqs[0] = (t[0].view(3, 4) for t in (own, exp_avgs, exp_avg_sqs))
    own = [g.to(grads) for g in own]
    wanted = expected([params, own, exp_avgs, exp_avg_sqs], [4, 4], SETTINGS)
    adamw(params, own, exp_avgs, exp_avg_sqs, [None, copies[1]], [4, 4], **SETTINGS)
    copies[0] = params[0].bfloat16()
    check([params, own, exp_avgs, exp_avg_sqs, copies], wanted)


@needs_native
def test_no_tensors() -> None:
    adamw([], [], [], [], [], [], **SETTINGS)


@needs_native
def test_extremes() -> None:
    params = [torch.ones(5)]
    grads = [torch.tensor([0.0, float("inf"), float("nan"), 1e30, 1e-30])]
    moments = [[torch.zeros(5)] for _ in range(2)]
    copies = [torch.zeros(5, dtype=torch.bfloat16)]
    native.update(params, grads, *moments, copies, [(1e-2, 1.0)], 0.0, (0.9, 0.95), 1e-8)
    assert params[0][0] == 1 and params[0][1:3].isnan().all() and params[0][3:].isfinite().all()
    assert copies[0][1:3].isnan().all() and copies[0][0] == 1


def test_compiles_for_hopper() -> None:
    pointers = dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), "*fp32") | {"copy": "*bf16"}
    numbers = dict.fromkeys(("step_size", "root", "lr_decay", "beta1", "first", "beta2", "second", "eps"), "fp32") | {
        "size": "i64"
    }
    path = "lightbulb.kernels.adamw.kernel:update_kernel"
    kernels = [
        {"kernel": path, "signature": pointers | numbers | {"grad": grad}, "constants": {"COPY": copy, "BLOCK": 1024}}
        for grad, copy in (("*fp32", True), ("*bf16", True), ("*fp32", False))
    ]
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
