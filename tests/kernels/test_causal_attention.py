"""Causal attention: the C++ kernel against the naive twin in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.causal_attention import causal_attention, has_fast_causal_attention, native, reference
from lightbulb.kernels.native import is_built

BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}
SHAPES = [  # batch, heads, key heads, length, width
    (1, 1, 1, 1, 1),
    (2, 4, 2, 37, 5),
    (1, 2, 1, 64, 32),
    (1, 2, 2, 65, 16),
    (3, 3, 1, 130, 48),
    (1, 4, 4, 71, 33),
    (2, 2, 1, 200, 64),
    (0, 2, 1, 5, 8),
]
needs_compiler = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and gradient, each laid out in memory in its own way."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype)  # noqa: E731
    query = draw(batch, heads, length, width)
    key = draw(length, batch, kv_heads, width).permute(1, 2, 0, 3)
    value = draw(length, batch, kv_heads, 2 * width)[..., width:].permute(1, 2, 0, 3)
    return [query, key, value, draw(batch, heads, width, length).transpose(2, 3)]


def all_of(function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """The result and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(*tensors: Tensor) -> list[Tensor]:
    return all_of(reference.causal_attention, *(t.double() for t in tensors))


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= bound * exact.norm()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape: tuple[int, ...], dtype: torch.dtype, threads: int, with_threads: Callable[[int], None]) -> None:
    with_threads(threads)
    tensors = inputs(shape, dtype)
    assert has_fast_causal_attention(*tensors[:3])
    found = all_of(causal_attention, *tensors)
    check(found, expected(*tensors), BOUNDS[dtype])
    again = all_of(causal_attention, *tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_the_result_and_nothing_else(dtype: torch.dtype) -> None:
    query, key, value, grad = inputs((1, 2, 1, 70, 12), dtype)
    wide = [torch.full((*t.shape[:3], 17), float("nan"), dtype=dtype) for t in (query, query, key, value)]
    out, *grads = (t[..., :12] for t in wide)
    lse = torch.empty(1, 2, 70)
    native.forward(query, key, value, out, lse)
    native.backward(query, key, value, grad.contiguous(), *grads, lse)
    check([out, *grads], expected(query, key, value, grad), BOUNDS[dtype])
    assert all(t[..., 12:].isnan().all() for t in wide)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    tensors = inputs((2, 4, 2, 21, 6), dtype)
    assert has_fast_causal_attention(*tensors[:3]) == (kernels == "auto" and dtype != torch.float64 and is_built())
    check(all_of(causal_attention, *tensors), expected(*tensors), 4 * BOUNDS[dtype])


@needs_compiler
@pytest.mark.parametrize("place", [0, 9, 63, 64, 90])
def test_the_future_is_not_seen(place: int) -> None:
    """Changing one key changes nothing before it, to the last bit."""
    query, key, value, _ = inputs((1, 2, 1, 100, 16), torch.float32)
    before = causal_attention(query, key, value)
    key, value = key.clone(), value.clone()
    key[:, :, place], value[:, :, place] = 50.0, -50.0
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert not torch.equal(before[:, :, place:], after[:, :, place:])


@needs_compiler
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_and_extreme_scores(scale: float) -> None:
    tensors = inputs((1, 2, 1, 90, 16), torch.float32)
    tensors[0] *= scale
    found, wanted = all_of(causal_attention, *tensors), expected(*tensors)
    assert all(t.isfinite().all() for t in found)
    if scale == 0.0:
        check(found[:1], wanted[:1], 1e-6)  # means of the past
        assert torch.allclose(found[0][0, 0, -1], tensors[2][0, 0].mean(0), atol=1e-6)
    else:  # each query takes one value, of the key that wins in float32
        picked = (found[0][0, 0][:, None] - tensors[2][0, 0][None]).abs().amax(-1).amin(1)
        assert (picked < 1e-3).float().mean() > 0.9


@needs_compiler
def test_what_is_not_finite_is_passed_on() -> None:
    query, key, value, grad = inputs((1, 1, 1, 70, 8), torch.float32)
    query[0, 0, 66, 0] = float("nan")
    out = causal_attention(query, key, value)
    assert out[0, 0, 66].isnan().all() and out[0, 0, :66].isfinite().all() and out[0, 0, 67:].isfinite().all()


@needs_compiler
def test_keeps_no_scores() -> None:
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    query, key, value, _ = inputs((1, 1, 1, 300, 4), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        causal_attention(query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    assert max(kept) == query.numel()
