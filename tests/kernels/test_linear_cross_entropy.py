"""Linear cross-entropy: rows by Triton, C++ and torch, and the whole, against the naive twin in float64."""

import math

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice, cross_entropy
from lightbulb.kernels.cross_entropy import IGNORE, kernel, linear_cross_entropy, native, reference, rows
from lightbulb.kernels.native import is_built

BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}
SHAPES = [(1, 1), (3, 2), (7, 130), (5, 1031)]
needs_compiler = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")


def logits_and_labels(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits whose rows lie apart in memory, poisoned between; every third label is to be ignored."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    wide = torch.full((shape[0], shape[1] + 5), float("nan"), dtype=dtype)
    wide[:, : shape[1]] = torch.randn(shape, generator=generator).mul_(3)
    labels = torch.randint(0, shape[1], (shape[0],), generator=generator)
    labels[2::3] = IGNORE
    return wide.to(device)[:, : shape[1]], labels.to(device)


def expected(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum."""
    exact = logits.double().detach().requires_grad_()
    losses = reference.linear_cross_entropy(
        exact, torch.eye(exact.shape[1], dtype=exact.dtype, device=exact.device), labels, z_loss
    )
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


def check_rows(
    runner, logits: Tensor, labels: Tensor, z_loss: float, steps: list[tuple[bool, bool]], bound: float
) -> None:
    wanted, wanted_grad = expected(logits, labels, z_loss)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse, target = (torch.full((len(logits),), float("nan"), dtype=wide, device=logits.device) for _ in range(2))
    before = torch.as_strided(logits, (len(logits), logits.stride(0)), logits.stride())[:, logits.shape[1] :]
    for measures, writes in steps:
        runner(logits, labels, 0, lse, target, z_loss, measures, writes)
    losses = (lse - target + z_loss * lse.square()).masked_fill(labels == IGNORE, 0.0)
    torch.testing.assert_close(losses.double(), wanted, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(logits.double(), wanted_grad, rtol=bound, atol=bound)
    assert before.isnan().all()  # what lies between the rows is not touched


ONCE, APART = [(True, True)], [(True, False), (False, True)]


@pytest.mark.parametrize("steps", [ONCE, APART], ids=["once", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_rows(
    shape: tuple[int, int], dtype: torch.dtype, steps: list, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_LARGEST_BLOCK", 512)  # so that the long rows take several
    logits, labels = logits_and_labels(shape, dtype, device)
    check_rows(kernel.run, logits, labels, 0.01, steps, BOUNDS[dtype])


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [ONCE, APART], ids=["once", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_rows(shape: tuple[int, int], dtype: torch.dtype, steps: list, threads: int, with_threads) -> None:
    with_threads(threads)
    logits, labels = logits_and_labels(shape, dtype, torch.device("cpu"))
    check_rows(native.run, logits, labels, 0.01, steps, BOUNDS[dtype])


@pytest.mark.parametrize("steps", [ONCE, APART], ids=["once", "apart"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_torch_rows(dtype: torch.dtype, steps: list) -> None:
    logits, labels = logits_and_labels((70, 33), dtype, torch.device("cpu"))
    check_rows(rows._run, logits, labels, 0.01, steps, BOUNDS[dtype])


def inputs(tokens: int, dim: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim + width)
    hidden = torch.randn(tokens, 2 * dim, generator=generator).to(device, dtype)[:, ::2]  # not side by side
    weight = torch.randn(width, dim, generator=generator).to(device, dtype)
    labels = torch.randint(0, width, (tokens,), generator=generator).to(device)
    labels[1::4] = IGNORE
    return [hidden, weight, labels]


def gradients(function, hidden: Tensor, weight: Tensor, labels: Tensor, even: bool, **options) -> list[Tensor]:
    """Losses, and the gradients of a sum in which all tokens count the same, or not."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    losses = function(*leaves, labels, **options)
    count = torch.linspace(0.5, 2.0, len(labels), dtype=losses.dtype, device=losses.device)
    total = losses.mul(0.3).sum() if even else (losses * count).sum()
    return [losses.detach(), *torch.autograd.grad(total, leaves)]


def assert_near(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= bound * exact.norm() + 1e-12


@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, even: bool, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 8)
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK_BYTES", 0)  # chunks of 8 tokens
    hidden, weight, labels = inputs(21, 6, 37, dtype)
    wanted = gradients(
        reference.linear_cross_entropy, hidden.double(), weight.double(), labels, even=even, z_loss=z_loss
    )
    found = gradients(linear_cross_entropy, hidden, weight, labels, even=even, z_loss=z_loss)
    assert_near(found, wanted, {torch.bfloat16: 0.02}.get(dtype, 4 * BOUNDS[dtype]))
    assert [t.dtype for t in found[1:]] == [dtype, dtype]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_chunks_do_not_change_the_result(dtype: torch.dtype, even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(300, 6, 37, dtype)
    whole = gradients(linear_cross_entropy, *arguments, even=even)
    again = gradients(linear_cross_entropy, *arguments, even=even)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 7)
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK_BYTES", 0)
    found = gradients(linear_cross_entropy, *arguments, even=even)
    bound = {torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    assert_near(found, [t.double() for t in whole], bound)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_parts_of_the_vocabulary(dtype: torch.dtype, even: bool) -> None:
    """Three parts, put together by hand: every part is given what the parts' statistics come to."""
    hidden, weight, labels = inputs(19, 5, 24, dtype)
    labels[0], labels[1] = 8, 15  # at the borders of the second part
    wanted = gradients(reference.linear_cross_entropy, hidden.double(), weight.double(), labels, even=even, z_loss=0.01)
    parts = [(8 * index, weight[8 * index : 8 * index + 8]) for index in range(3)]
    seen: list[tuple[Tensor, Tensor]] = []

    def note(lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((lse.clone(), target.clone()))
        return lse, target

    for first, part in parts:
        linear_cross_entropy(hidden, part, labels, first=first, combine=note)
    lse = torch.stack([lse for lse, _ in seen]).logsumexp(0)
    target = torch.stack([target for _, target in seen]).sum(0)
    found = [
        gradients(
            linear_cross_entropy,
            hidden,
            part,
            labels,
            even=even,
            z_loss=0.01,
            first=first,
            combine=lambda *_: (lse, target),
        )
        for first, part in parts
    ]
    together = [sum(t.double() for _, t, _ in found), torch.cat([t for *_, t in found])]
    bound = {torch.bfloat16: 0.02}.get(dtype, 4 * BOUNDS[dtype])
    for losses, *_ in found:
        assert_near([losses], wanted[:1], bound)
    assert_near(together, wanted[1:], bound)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(needed: tuple[bool, bool]) -> None:
    hidden, weight, labels = inputs(9, 4, 11, torch.float64)
    wanted = gradients(reference.linear_cross_entropy, hidden, weight, labels, even=False)
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip((hidden, weight), needed, strict=True)]
    (linear_cross_entropy(*leaves, labels) * torch.linspace(0.5, 2.0, 9, dtype=torch.float64)).sum().backward()
    for leaf, need, exact in zip(leaves, needed, wanted[1:], strict=True):
        assert torch.allclose(leaf.grad, exact) if need else leaf.grad is None


@pytest.mark.parametrize("grad_mode", [True, False])
def test_no_gradient_is_computed_where_none_can_be_asked_for(grad_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(9, 4, 11, torch.float32)
    products: list[bool] = []
    add = rows.add_product
    monkeypatch.setattr(rows, "add_product", lambda *factors: (products.append(True), add(*factors)))
    with torch.set_grad_enabled(grad_mode):
        losses = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert bool(products) == grad_mode == losses.requires_grad
    assert torch.allclose(losses, reference.linear_cross_entropy(hidden, weight, labels), atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_predict(tokens: int) -> None:
    hidden, weight, labels = inputs(tokens, 4, 11, torch.float32)
    losses, *grads = gradients(
        linear_cross_entropy, hidden, weight, torch.full_like(labels, IGNORE), even=True, z_loss=1.0
    )
    assert losses.shape == (tokens,) and not losses.any()
    assert not any(grad.any() for grad in grads)


def extreme_rows() -> list[tuple[str, list[float]]]:
    inf = float("inf")
    return [
        ("certain", [1e4, -1e4, 0.0]),
        ("wrong", [-1e4, 1e4, 0.0]),
        ("equal", [1e4, 1e4, 1e4]),
        ("hidden", [1.0, -inf, -inf]),
        ("impossible", [-inf, 1.0, 2.0]),
        ("infinite", [0.0, inf, 1.0]),
        ("not a number", [0.0, float("nan"), 1.0]),
        ("nothing", [-inf, -inf, -inf]),
    ]


@pytest.mark.parametrize("runner", ["triton", "native", "torch"])
@pytest.mark.parametrize(("name", "values"), extreme_rows(), ids=[name for name, _ in extreme_rows()])
def test_extremes(name: str, values: list[float], runner: str, device: torch.device) -> None:
    """As PyTorch's own: infinities and what is no number pass on, nothing else becomes one."""
    if runner == "native" and not is_built():
        pytest.skip("no C++ compiler here when LightBulb was installed")
    run = {"triton": kernel.run, "native": native.run, "torch": rows._run}[runner]
    place = device if runner == "triton" else torch.device("cpu")
    logits, label = torch.tensor([values], device=place), torch.zeros(1, dtype=torch.int64, device=place)
    exact = logits.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, label, reduction="none")
    wanted_grad = torch.autograd.grad(wanted.sum(), exact)[0]
    lse, target = torch.empty(1, device=place), torch.empty(1, device=place)
    run(logits, label, 0, lse, target, 0.0, True, True)
    loss = float(lse - target)
    if math.isnan(float(wanted)):
        assert not math.isfinite(loss)
    else:
        # A log-sum-exp of 1e4 is rounded to a thousandth.
        rounding = 1e-3 if max(values) == 1e4 else 1e-6
        torch.testing.assert_close(torch.tensor([loss]), wanted.detach().cpu(), rtol=1e-6, atol=rounding)
        torch.testing.assert_close(logits, wanted_grad, rtol=0.0, atol=rounding)


def test_a_part_without_probability_does_not_spoil_the_others() -> None:
    """A rank whose logits are all -inf: its log-sum-exp is -inf, and its gradient zero."""
    runs = [rows._run] + ([native.run] if is_built() else [])
    for run in runs:
        logits, label = torch.full((1, 4), float("-inf")), torch.tensor([9])
        lse, target = torch.empty(1), torch.empty(1)
        run(logits, label, 0, lse, target, 0.0, True, False)
        assert float(lse) == float("-inf") and float(target) == 0.0
        run(logits, label, 0, torch.tensor([2.0]), torch.tensor([1.0]), 0.0, False, True)
        assert torch.equal(logits, torch.zeros(1, 4))


def test_one_column_has_no_loss_but_the_z_loss() -> None:
    hidden, weight = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[3.0]])
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0]), z_loss=0.5)
    losses.sum().backward()
    assert float(losses) == pytest.approx(18.0) and float(hidden.grad) == pytest.approx(18.0)


def test_no_memory_of_tokens_times_vocabulary() -> None:
    """What the forward leaves for the backward is as large as the inputs, not as the logits."""
    hidden, weight, labels = inputs(600, 4, 512, torch.float32)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert max(kept) <= max(hidden.numel(), weight.numel())


def test_compiles_for_hopper() -> None:
    signature = {"logits": "*bf16", "labels": "*i64", "lse": "*fp32", "target": "*fp32"}
    signature |= {"stride": "i32", "width": "i32", "first": "i32", "z_loss": "fp32"}
    kernels = []
    for width, measures, writes in (
        (32000, True, True),
        (32000, True, False),
        (128256, False, True),
        (5000, True, True),
    ):
        block, warps = kernel.tiling(width)
        constants = {"MEASURES": measures, "WRITES": writes, "BLOCK": block}
        path = "lightbulb.kernels.cross_entropy.kernel:rows_kernel"
        kernels.append({"kernel": path, "signature": signature, "constants": constants, "warps": warps})
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
