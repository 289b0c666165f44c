"""Softmax with mask and sink: the Triton kernels and the C++ rows against the naive twin in float64."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.native import is_built
from lightbulb.kernels.softmax import kernel, native, reference, softmax

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 9, 33), (2, 1, 3, 1030)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
CPU = torch.device("cpu")
CASES = ["plain", "mask", "sink", "both"]

Shape = tuple[int, int, int, int]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, case: str) -> list[Tensor | None]:
    """Gradient, scores, mask and sink; hidden scores are NaN; the first row of a head sees nothing."""
    batch, heads, rows, keys = shape
    generator = torch.Generator().manual_seed(sum(shape))
    grad, scores = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = sink = None
    if case in ("mask", "both"):
        mask = torch.rand(batch, 1, rows, keys, generator=generator) < 0.6
        mask[0, 0, 0] = False
        scores = scores.masked_fill(~mask, float("nan"))
        mask = mask.to(device)
    if case in ("sink", "both"):
        sink = torch.randn(heads, 1, generator=generator).to(device)
    return [grad.to(device, dtype), (scores * 3).to(device, dtype), mask, sink]


def expected(grad: Tensor, scores: Tensor, mask: Tensor | None, sink: Tensor | None) -> list[Tensor]:
    scores = scores.detach().double().nan_to_num().requires_grad_()
    sinks = [] if sink is None else [sink.detach().double().requires_grad_()]
    y = reference.softmax(scores, mask, *sinks)
    return [y.detach(), *torch.autograd.grad(y, [scores, *sinks], grad.double())]


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        scale = exact.abs().amax().clamp(min=1.0).item()
        torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=bound * scale)


def by_module(
    module: ModuleType, grad: Tensor, scores: Tensor, mask: Tensor | None, sink: Tensor | None
) -> list[Tensor]:
    """Output and gradients; outputs are poisoned, the gradient is computed from the weights as rounded."""
    wide_mask = None if mask is None else mask.expand(scores.shape)
    wide_sink = None if sink is None else sink.expand(scores.shape[:3])
    out, back = (torch.full_like(scores, float("nan")) for _ in range(2))
    share, dots = (scores.new_full(scores.shape[:3], float("nan"), dtype=torch.float32) for _ in range(2))
    module.forward(scores, wide_mask, wide_sink, out, None if sink is None else share)
    module.backward(grad, out, back, dots)
    return [out, back, *([] if sink is None else [(-share * dots).sum_to_size(sink.shape)])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape: Shape, dtype: torch.dtype, case: str, device: torch.device) -> None:
    t = inputs(shape, dtype, device, case)
    found = by_module(kernel, *t)
    check(found, expected(*t), 3 * BOUNDS[dtype])
    assert all(map(torch.equal, found, by_module(kernel, *t)))


@pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape: Shape, dtype: torch.dtype, case: str, with_threads: Callable[[int], None]) -> None:
    t = inputs(shape, dtype, CPU, case)
    found = []
    for threads in (1, 2):
        with_threads(threads)
        found.append(by_module(native, *t))
    check(found[0], expected(*t), 3 * BOUNDS[dtype])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    grad, scores, mask, sink = inputs((2, 3, 5, 7), dtype, CPU, case)
    bound, wanted = 4 * BOUNDS.get(dtype, 1e-13), expected(grad, scores, mask, sink)
    leaves = [scores.nan_to_num().requires_grad_(), *([] if sink is None else [sink.to(dtype).requires_grad_()])]
    y = softmax(leaves[0], mask, *leaves[1:])
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    if dtype == torch.bfloat16 and sink is not None:  # the sink was rounded
        wanted = expected(grad, scores, mask, sink.to(dtype))
    check(found, wanted, bound)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_rows_that_lie_unevenly_and_fewer_axes(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    bound = BOUNDS[torch.float32]
    scores = torch.randn(3, 4, 2, 6).transpose(0, 2)[..., :5]
    wanted = scores.double().softmax(-1)
    check([softmax(scores), softmax(scores[0, 0]), softmax(scores[0])], [wanted, wanted[0, 0], wanted[0]], bound)
    keys_apart = torch.randn(5, 6).t()
    check([softmax(keys_apart)], [keys_apart.double().softmax(-1)], bound)
    mask = torch.tensor([True])
    assert torch.equal(softmax(scores, mask), softmax(scores))
    assert softmax(scores, ~mask).eq(0.0).all()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_limits_of_the_sink(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    scores = torch.randn(2, 4, 40)
    low, high = torch.full((2, 4), float("-inf")), torch.full((2, 4), 300.0)
    torch.testing.assert_close(softmax(scores, sink=low), softmax(scores), rtol=1e-6, atol=0)
    assert softmax(scores, sink=high).eq(0.0).all()
    off_by_one = softmax(scores, sink=torch.zeros(1))
    torch.testing.assert_close(off_by_one, scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)))
    torch.testing.assert_close(softmax(scores + 80, sink=torch.zeros(1)), softmax(scores), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_extremes(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    scores = torch.zeros(5, 20)
    scores[0, 3], scores[1, 19], scores[2], scores[3, 0] = float("-inf"), float("nan"), float("-inf"), -1e30
    scores[4] = torch.linspace(1e38, -1e38, 20)
    weights = softmax(scores)
    assert weights[0, 3] == 0.0 and torch.allclose(weights[0, :3], torch.tensor(1 / 19))
    assert weights[1].isnan().all() and weights[2].eq(0.0).all() and weights[3, 0] == 0.0
    assert weights[4].tolist() == [1.0] + [0.0] * 19
    sink = torch.zeros(3, requires_grad=True)
    softmax(torch.zeros(0, 3, 4), sink=sink).sum().backward()
    assert sink.grad is not None and sink.grad.eq(0.0).all()


def test_compiles_for_hopper() -> None:
    broadcast = [f"{tensor}_{axis}" for tensor in ("mask", "sink") for axis in ("outer", "middle", "inner")]
    sizes = dict.fromkeys((*broadcast, "stride", "out_stride", "grad_stride", "middle", "inner", "rows", "keys"), "i32")
    values = dict.fromkeys(("scores", "grad", "weights", "out"), "*bf16") | {"mask": "*i1"}
    signature = sizes | values | dict.fromkeys(("sink", "share", "dots"), "*fp32")
    kernels = []
    for keys in (64, 2048, kernel.MAX_KEYS):
        rows, width, warps = kernel.tile(keys)
        for name, more in (("forward", {"MASK": True, "SINK": True}), ("backward", {})):
            path = f"lightbulb.kernels.softmax.kernel:{name}_kernel"
            constants = {"ROWS": rows, "KEYS": width} | more
            kernels.append({"kernel": path, "signature": signature, "constants": constants, "warps": warps})
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
