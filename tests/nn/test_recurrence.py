"""The three forms of a linear recurrence agree in float64: values, gradients, states, documents."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d

from lightbulb.kernels.linear_recurrence import reference
from lightbulb.kernels.linear_recurrence.reference import parallel, segment_sum
from lightbulb.nn.recurrence import document_starts
from lightbulb.nn.short_conv import causal_conv, next_window
from lightbulb.ops import linear_recurrence, state_dtype


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor


def inputs(length: int, groups: int = 2, varies: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """Two samples, four heads, states of 3 x 5."""
    torch.manual_seed(length)
    query, key = torch.randn(2, 2, groups, length, 3)
    decay = -torch.rand(2, 4, length) if varies else -torch.rand(4)
    tensors = (query, key, torch.randn(2, 4, length, 5), decay)
    return Inputs(*(t.to(dtype).requires_grad_(varies or t is not decay) for t in tensors))


def chunkwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    chunk_size: int,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return linear_recurrence(query, key, value, log_decay, state, starts, chunk_size)


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if state is None:
        shape = (*value.shape[:2], query.shape[3], value.shape[3])
        state = torch.zeros(shape, dtype=state_dtype(value.dtype))
    return reference.linear_recurrence(query, key, value, log_decay, state, starts)


def state() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)


def starts(length: int) -> Tensor:
    """Documents of several lengths, one of a single token, and one that begins with the sequence."""
    found = torch.zeros(2, length, dtype=torch.bool)
    found[0, 2::3] = True
    found[0, -1] = found[1, 0] = found[1, length // 2] = True
    return found


def gradients(results: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    return list(
        torch.autograd.grad(results, wanted, [torch.randn(r.shape, dtype=torch.float64).to(r.dtype) for r in results])
    )


def assert_close(found: object, wanted: object, tolerance: float = 1e-10) -> None:
    for ours, theirs in zip(found, wanted, strict=True):  # type: ignore[call-overload]
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equality_parallel_is_recurrent(groups: int, varies: bool, with_documents: bool) -> None:
    given, begins = inputs(11, groups, varies), starts(11) if with_documents else None
    wanted = [t for t in given if t.requires_grad]
    found, other = parallel(*given, begins), recurrent(*given, None, begins)[0]
    assert_close([found], [other])
    assert_close(gradients((found,), wanted), gradients((other,), wanted))


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (8, 4), (13, 4), (7, 1), (5, 64)])
def test_equality_chunkwise_is_recurrent(
    length: int, chunk_size: int, groups: int, varies: bool, with_documents: bool
) -> None:
    given, first, begins = inputs(length, groups, varies), state(), starts(length) if with_documents else None
    wanted = [t for t in (*given, first) if t.requires_grad]
    found, other = chunkwise(*given, chunk_size, first, begins), recurrent(*given, first, begins)
    assert_close(found, other)
    assert_close(gradients(found, wanted), gradients(other, wanted))


def test_gradients_against_finite_differences() -> None:
    given, first, begins = inputs(5), state(), starts(5)
    assert torch.autograd.gradcheck(lambda *t: chunkwise(*t[:4], 2, t[4], begins), (*given, first))


@pytest.mark.parametrize("cuts", [[3, 8], [1] * 11, [10, 1], [4, 4, 3]], ids=str)
def test_equality_streaming_is_one_pass(cuts: list[int]) -> None:
    given = inputs(11)
    whole, last = chunkwise(*given, 4)
    memory, parts = None, []
    for piece in zip(*(t.split(cuts, dim=2) for t in given), strict=True):
        part, memory = chunkwise(*piece, 4, memory)
        parts.append(part)
    assert memory is not None
    assert_close([torch.cat(parts, 2), memory], [whole, last])


@pytest.mark.parametrize("varies", [False, True])
def test_equality_documents_are_separate_runs(varies: bool) -> None:
    given = inputs(10, varies=varies)
    wanted = [t for t in given if t.requires_grad]
    begins = document_starts(torch.tensor([[0] * 4 + [1] * 6] * 2))
    for span in (slice(0, 4), slice(4, 10)):
        found = chunkwise(*given, 3, None, begins)[0][:, :, span]
        alone = recurrent(*(t[:, :, span] if t.ndim > 1 else t for t in given))[0]
        assert_close([found], [alone])
        assert_close(gradients((found,), wanted), gradients((alone,), wanted))


def test_equality_no_decay_is_linear_attention() -> None:
    query, key, value, _ = inputs(9, 4)
    wanted = (query @ key.transpose(2, 3)).tril() @ value
    for decay in (torch.zeros(4, dtype=torch.float64), torch.zeros(2, 4, 9, dtype=torch.float64)):
        assert_close([chunkwise(query, key, value, decay, 4)[0]], [wanted])


def test_equality_full_decay_keeps_the_current_token_only() -> None:
    query, key, value, _ = inputs(9, 4)
    found = chunkwise(query, key, value, torch.full((4,), -1e4, dtype=torch.float64), 4)[0]
    assert_close([found], [(query * key).sum(-1, keepdim=True) * value])


@pytest.mark.parametrize("step", [-1e30, -1e4, -60.0])
def test_gradients_stay_finite_and_right_where_everything_fades(step: float) -> None:
    given = inputs(12, dtype=torch.float32)
    with torch.no_grad():
        given.log_decay[:, :, 5:7] = step
    found = gradients(chunkwise(*given, 4), list(given))
    exact = [t.detach().double().requires_grad_() for t in given]
    assert_close(found, [t.float() for t in gradients(recurrent(*exact), exact)], 1e-5)


def test_small_decays_behind_a_large_one_are_not_lost() -> None:
    """Subtracting float32 sums would leave 5e-4 of the small decays' 1e-3."""
    given = inputs(16, dtype=torch.float32)
    with torch.no_grad():
        given.log_decay[:] = -1e-3
        given.log_decay[:, :, 1] = -1e4
    found = chunkwise(*given, 16)[0]
    wanted = recurrent(*(t.double() for t in given))[0]
    assert_close([found.double()], [wanted], 1e-5)


def test_equality_segment_sum_is_its_definition() -> None:
    steps = torch.randn(2, 6, dtype=torch.float64)
    found = segment_sum(steps)
    for i in range(6):
        for j in range(6):
            wanted = steps[:, j + 1 : i + 1].sum(1) if j <= i else torch.full((2,), -torch.inf, dtype=steps.dtype)
            assert torch.allclose(found[:, i, j], wanted)


def test_bfloat16_is_within_rounding() -> None:
    lower = inputs(50, 1, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in lower]
    found, wanted = chunkwise(*lower, 16), recurrent(*exact)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    results = [*found, *gradients(found[:1], list(lower))]
    torch.manual_seed(2)
    grad = torch.randn(found[0].shape, dtype=torch.float64).bfloat16().double()
    for ours, theirs in zip(results, [*wanted, *torch.autograd.grad(wanted[0], exact, grad)], strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def convolution(length: int, width: int) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = ((length, 2, 6), (6, width), (6,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_equality_short_convolution_is_pytorchs(length: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightbulb.nn.short_conv._BLOCK", 2 * 2 * 6)  # two positions a block
    x, weight, bias = given = convolution(length, width)
    found = causal_conv(*given)
    wanted = conv1d(x.permute(1, 2, 0), weight[:, None], bias, padding=width - 1, groups=6)
    wanted = wanted[..., :length].permute(2, 0, 1)
    assert_close([found], [wanted])
    assert_close(gradients((found,), given), gradients((wanted,), given))


def test_equality_short_convolution_of_documents_is_separate_runs() -> None:
    x, weight, bias = given = convolution(9, 4)
    begins = torch.zeros(2, 9, dtype=torch.bool)
    begins[0, [2, 3]] = begins[1, 6] = True
    found = causal_conv(x, weight, bias, begins)
    alone = [
        torch.cat([causal_conv(part, weight, bias) for part in x[:, sample : sample + 1].split(cuts)])
        for sample, cuts in enumerate(([2, 1, 6], [6, 3]))
    ]
    wanted = torch.cat(alone, dim=1)
    assert_close([found], [wanted])
    assert_close(gradients((found,), given), gradients((wanted,), given))


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [2, 7], [8, 1]], ids=str)
def test_equality_short_convolution_continues(cuts: list[int]) -> None:
    x, weight, bias = convolution(9, 4)
    window, parts = x.new_zeros(2, 3, 6), []
    for part in x.split(cuts):
        parts.append(causal_conv(part, weight, bias, None, window))
        window = next_window(part, window)
    assert_close([torch.cat(parts)], [causal_conv(x, weight, bias)])
