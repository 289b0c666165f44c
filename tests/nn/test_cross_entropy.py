"""Cross-entropy of a linear head against PyTorch's on float64 logits."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.nn.functional import cross_entropy

from lightbulb.nn import cross_entropy as module
from lightbulb.nn import precision
from lightbulb.nn.cross_entropy import IGNORE, linear_cross_entropy
from lightbulb.nn.groups import SINGLE, Axis

DIM, VOCAB = 5, 12


def inputs(tokens: int, vocab: int = VOCAB, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (scale * torch.randn(tokens, DIM, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(vocab, DIM, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    labels[2::5] = IGNORE
    return hidden, weight, labels


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE, reduction="none")


def gradients(losses: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)
    return torch.autograd.grad((losses * weights).sum(), leaves)


@pytest.mark.parametrize("tokens", [1, 7, 33, 70])  # 32 rows are done at once
@pytest.mark.parametrize("vocab", [2, 13])
def test_values_and_gradients(tokens: int, vocab: int) -> None:
    hidden, weight, labels = inputs(tokens, vocab)
    wanted, found = naive(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels, SINGLE, 0)
    assert torch.allclose(found, wanted, atol=1e-12)
    for ours, theirs in zip(gradients(found, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, labels = inputs(4)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, SINGLE, 0), (hidden, weight))


def test_ignored_positions_cost_nothing_and_teach_nothing() -> None:
    hidden, weight, labels = inputs(6)
    losses = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), SINGLE, 0)
    assert torch.equal(losses, torch.zeros(6, dtype=torch.float64))
    assert not any(gradient.any() for gradient in gradients(losses, hidden, weight))


def test_a_second_backward_finds_the_same_gradient() -> None:
    hidden, weight, labels = inputs(9)
    total = linear_cross_entropy(hidden, weight, labels, SINGLE, 0).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(total, (hidden, weight)), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("scale", [1.0, 100.0])  # with 100, log-sum-exps of several hundred
def test_float32_is_within_rounding_of_float64(scale: float) -> None:
    hidden, weight, labels = inputs(40, 300, scale)
    wanted = naive(hidden, weight, labels)
    single = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    found = linear_cross_entropy(*single, labels, SINGLE, 0)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    if scale == 1.0:  # softmax magnifies the rounding of large logits, here as in any implementation
        for ours, theirs in zip(gradients(found, *single), gradients(wanted, hidden, weight), strict=True):
            assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_is_close_to_float32(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    hidden, weight, labels = (t.detach() for t in inputs(40, 300))
    half = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    single = [t.detach().float().requires_grad_() for t in half]
    found, wanted = (linear_cross_entropy(*leaves, labels, SINGLE, 0) for leaves in (half, single))
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 0.03
    for ours, theirs in zip(gradients(found, *half), gradients(wanted, *single), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_certain_prediction_keeps_its_small_gradient_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: True)
    hidden, weight = torch.tensor([[8.0]]).bfloat16().requires_grad_(), torch.tensor([[0.5], [-0.5]]).bfloat16()
    linear_cross_entropy(hidden, weight, torch.tensor([0]), SINGLE, 0).sum().backward()
    # softmax - 1 is -3.3e-4; from a softmax rounded to bfloat16 it would be 0.
    assert float(hidden.grad) == pytest.approx(-1.0 / (1.0 + 2.718281828**8), rel=0.01)


def test_what_is_not_finite_is_passed_on() -> None:
    hidden, weight, labels = inputs(4)
    broken = hidden.detach().clone()
    broken[1, 0] = float("inf")
    losses = linear_cross_entropy(broken, weight, labels, SINGLE, 0)
    assert not losses[1].isfinite() and losses[[0, 3]].isfinite().all()


class Meeting:
    """``all_reduce`` between threads that stand for the ranks of a group."""

    def __init__(self, size: int):
        self.parts: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size)
        self.rank = threading.local()

    def all_reduce(self, x: Tensor, op: Any = ReduceOp.SUM, group: Any = None) -> None:
        self.parts[self.rank.value] = x.clone()
        self.barrier.wait(10)
        parts = torch.stack([part for _, part in sorted(self.parts.items())])
        self.barrier.wait(10)
        x.copy_(parts.amax(0) if op == ReduceOp.MAX else parts.sum(0))

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def enter(rank: int) -> Any:
            self.rank.value = rank
            return work(rank)

        with ThreadPoolExecutor(self.barrier.parties) as pool:
            return list(pool.map(enter, range(self.barrier.parties)))


@pytest.mark.parametrize("scale", [1.0, 300.0])  # with 300, whole parts of the vocabulary have no probability
@pytest.mark.parametrize("size", [2, 3])
def test_a_vocabulary_split_over_ranks(size: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(size)
    monkeypatch.setattr(module, "all_reduce", meeting.all_reduce)
    hidden, weight, labels = inputs(9, scale=scale)

    def rank(index: int) -> tuple[Tensor, ...]:
        axis = Axis(SimpleNamespace(), index, size)  # type: ignore[arg-type]
        rows = axis.part(VOCAB)
        leaf, part = hidden.detach().requires_grad_(), weight.detach()[rows].requires_grad_()
        losses = linear_cross_entropy(leaf, part, labels, axis, rows.start)
        return losses, *gradients(losses, leaf, part)

    results = meeting.run(rank)
    wanted = naive(hidden, weight, labels)
    grad_hidden, grad_weight = gradients(wanted, hidden, weight)
    for losses, _, _ in results:
        assert torch.allclose(losses, wanted, rtol=1e-10, atol=1e-10)
    assert torch.allclose(sum(part for _, part, _ in results), grad_hidden, rtol=1e-10, atol=1e-10)
    assert torch.allclose(torch.cat([part for *_, part in results]), grad_weight, rtol=1e-10, atol=1e-9)
