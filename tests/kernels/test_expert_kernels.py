"""Mixtures of experts: the Triton kernels, the C++ rows and the loops against the naive twins in float64."""

from collections.abc import Callable

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice, experts
from lightbulb.kernels.experts import fused, grouped, kernel, merged, permute, reference, row_kernel
from lightbulb.kernels.experts.schedule import TABLE, row_tile, schedule
from lightbulb.kernels.native import is_built

BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Of the error's norm over the result's: bfloat16 keeps 8 bits, and is rounded between the products."""
COUNTS = [[5], [2, 3], [0, 5, 0], [1, 0, 20, 1], [0, 0], [17, 16, 0, 1, 2], [0, 0, 0, 33]]
NEEDS_NATIVE = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def results(function: Callable[..., Tensor], inputs: list[Tensor], *others: object) -> list[Tensor]:
    """The value, and the gradient of each input for a fixed gradient of the value."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, *others)
    # Not contiguous, and of the value's dtype.
    grad = draw(y.shape[1], y.shape[0], dtype=torch.bfloat16, device=y.device).t().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    assert len(found) == len(wanted)
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape and mine.isfinite().all()
        assert (mine.double() - exact).norm() <= bound * exact.norm(), (mine, exact)


def in_double(inputs: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in inputs]


def swiglu_inputs(counts: list[int], dim: int, hidden: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = (sum(counts), dim), (len(counts), 2, hidden, dim), (len(counts), dim, hidden)
    return [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def mixture_inputs(
    tokens: int, top_k: int, choices: list[int], dim: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Tokens that choose among ``choices`` of 6 experts; gates in float32."""
    generator = torch.Generator().manual_seed(tokens)
    picks = torch.stack([torch.randperm(len(choices), generator=generator)[:top_k] for _ in range(tokens)])
    own = torch.tensor(choices)[picks].to(device)
    x, gate_up, down = swiglu_inputs([tokens, 0, 0, 0, 0, 0], dim, hidden, dtype, device)
    gates = torch.rand(tokens, top_k, generator=generator).to(device)
    return [x, gates, gate_up, down], own


def mixture(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the tensors that have gradients first."""
    return lambda x, gates, gate_up, down, own: function(x, gates, own, gate_up, down)


def flat(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda rows, gate_up, down, *rest: function(rows, gate_up.flatten(1, 2), down, *rest)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value holds NaN (integers: the least)."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(torch.iinfo(t.dtype).min)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("counts", [*COUNTS, [128, 129, 0, 127], [0] * 40 + [3] * 30])
def test_schedule(counts: list[int], tile: int, device: torch.device, poisoned: None) -> None:
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    table = schedule(ends, sum(counts), tile).table.tolist()
    covered = [(e, row) for e, first, end in table for row in range(first, min(first + tile, end))]
    assert covered == [(e, row) for row, e in enumerate(e for e, count in enumerate(counts) for _ in range(count))]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_triton_linear(counts: list[int], dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    rows = draw(70, sum(counts), dtype=dtype, device=device).t()
    weight = draw(len(counts), 70, 37, dtype=dtype, device=device).transpose(1, 2)
    wanted = results(reference.grouped_linear, in_double([rows, weight]), counts)
    check(results(fused.GroupedLinear.apply, [rows, weight], counts), wanted, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_triton_swiglu(counts: list[int], dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    inputs = swiglu_inputs(counts, 24, 70, dtype, device)
    wanted = results(reference.grouped_swiglu, in_double(inputs), counts)
    check(results(flat(fused.GroupedSwiGLU.apply), inputs, counts), wanted, BOUNDS[dtype])


MIXTURES = [(1, 1, [0]), (9, 2, [0, 1, 2, 3, 4, 5]), (40, 2, [5, 1]), (7, 3, [0, 2, 3, 5])]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", MIXTURES, ids=str)
def test_triton_mixture(
    shape: tuple[int, int, list[int]], dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    inputs, own = mixture_inputs(*shape, 24, 70, dtype, device)
    wanted = results(mixture(reference.mixture_swiglu), in_double(inputs), own)
    found = results(mixture(fused.MixtureSwiGLU.apply), [inputs[0], inputs[1], inputs[2].flatten(1, 2), inputs[3]], own)
    found[3] = found[3].view_as(inputs[2])
    check(found, wanted, BOUNDS[dtype])


@pytest.mark.parametrize("tile", [64, 128])
def test_large_tiles_give_what_small_ones_give(tile: int, device: torch.device, poisoned: None) -> None:
    counts, ends = [130, 0, 3], torch.tensor([130, 130, 133], dtype=torch.int32, device=device)
    rows, gate_up, down = swiglu_inputs(counts, 40, 130, torch.float32, device)
    found = []
    for plan in (schedule(ends, 133, tile), schedule(ends, 133, 16)):
        inner, hidden = kernel.swiglu(plan, rows, gate_up.flatten(1, 2))
        grads = kernel.swiglu_grad(plan, rows, down, inner)[:2]
        found.append([inner, hidden, *grads, kernel.linear(plan, hidden, down)])
    check(found[0], in_double(found[1]), 1e-6)


def test_no_tokens(device: torch.device, poisoned: None) -> None:
    inputs, own = mixture_inputs(3, 2, [1, 4], 8, 5, torch.float32, device)
    x, gates, gate_up, down = inputs
    found = results(mixture(fused.MixtureSwiGLU.apply), [x[:0], gates[:0], gate_up.flatten(1, 2), down], own[:0])
    assert [t.shape for t in found[:3]] == [(0, 8), (0, 8), (0, 2)]
    assert not found[3].any() and not found[4].any()


def test_triton_gives_the_same_bits(device: torch.device) -> None:
    inputs, own = mixture_inputs(20, 2, [0, 1, 3], 24, 40, torch.bfloat16, device)
    inputs[2] = inputs[2].flatten(1, 2)
    once, again = (results(mixture(fused.MixtureSwiGLU.apply), inputs, own) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_what_is_not_finite_stays_with_its_token(device: torch.device) -> None:
    inputs, own = mixture_inputs(20, 2, [0, 1, 3], 24, 40, torch.float32, device)
    inputs[2] = inputs[2].flatten(1, 2)
    function = mixture(fused.MixtureSwiGLU.apply)
    clean = function(*inputs, own)
    inputs[0][7] = float("nan")
    found = function(*inputs, own)
    others = torch.arange(20) != 7
    assert torch.equal(found[others], clean[others]) and found[7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_loops(counts: list[int], dtype: torch.dtype, poisoned: None) -> None:
    bound = BOUNDS.get(dtype, 1e-13)
    inputs = swiglu_inputs(counts, 9, 37, dtype, torch.device("cpu"))
    wanted = results(reference.grouped_swiglu, in_double(inputs), counts)
    check(results(flat(grouped.GroupedSwiGLU.apply), inputs, counts, dtype, True), wanted, bound)
    if dtype == torch.bfloat16:  # as where these products are slow
        check(results(flat(grouped.GroupedSwiGLU.apply), inputs, counts, torch.float32, True), wanted, bound)
    rows, weight = inputs[0], inputs[2].transpose(1, 2)
    wanted = results(reference.grouped_linear, in_double([rows, weight]), counts)
    check(results(grouped.GroupedLinear.apply, [rows, weight], counts), wanted, bound)


@pytest.mark.parametrize("features", [64, 3])
@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("counts", [[4], [1, 7, 2], [5, 5]], ids=str)
def test_merged(
    counts: list[int], dtype: torch.dtype, features: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "CPU_NUMBERS", 1)
    monkeypatch.setattr(merged, "_NARROWEST", features)
    monkeypatch.setattr(merged, "_memory", merged._Kept())  # as poisoned as the rest
    cpu, bound = torch.device("cpu"), BOUNDS.get(dtype, 1e-13)
    rows = draw(8, sum(counts), dtype=dtype, device=cpu).t()
    shares = draw(len(counts), 4, dtype=torch.promote_types(dtype, torch.float32), device=cpu).softmax(-1)
    gate, up, down = (draw(4, *shape, dtype=dtype, device=cpu) for shape in ((11, 8), (11, 8), (8, 11)))

    def swiglu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda rows, shares, gate, up, down: function(rows, shares, (gate, up, down), counts)

    inputs = [rows, shares, gate, up, down]
    check(
        results(swiglu(experts.merged_swiglu), inputs),
        results(swiglu(reference.merged_swiglu), in_double(inputs)),
        bound,
    )
    wanted = results(reference.merged_linear, in_double(inputs[:3]), counts)
    check(results(experts.merged_linear, inputs[:3], counts), wanted, bound)


def rows_inputs(dtype: torch.dtype, device: torch.device, dim: int, drops: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and gates of 7 tokens with 3 choices; order and inverse, two pairs dropped or none."""
    pairs = torch.randperm(21, generator=torch.Generator().manual_seed(dim))
    order = pairs[: 19 if drops else 21]
    inverse = torch.zeros(21, dtype=torch.int64)
    inverse[order] = torch.arange(len(order))
    gates = torch.rand(
        7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.promote_types(dtype, torch.float32)
    )
    gates.view(-1)[pairs[len(order) :]] = 0.0
    rows = draw(dim, len(order), dtype=dtype, device=device).t()
    return [rows, gates.to(device)], [order.to(device), inverse.to(device)]


@NEEDS_NATIVE
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize(("threads", "dim"), [(1, 1), (2, 17), (1, 600)])
def test_rows_there_and_back(
    dim: int, threads: int, dtype: torch.dtype, drops: bool, with_threads: Callable[[int], None], poisoned: None
) -> None:
    with_threads(threads)
    bound = BOUNDS.get(dtype, 1e-13)
    inputs, (order, inverse) = rows_inputs(dtype, torch.device("cpu"), dim, drops)
    wanted = results(reference.weighted_sum, in_double(inputs), order)
    check(results(permute.weighted_sum, inputs, order, inverse), wanted, bound)
    kept = inputs[1] > 0 if drops else None
    x = draw(7, dim, dtype=dtype, device=torch.device("cpu"))
    wanted = results(reference.spread, in_double([x]), order, 3)
    check(results(permute.spread, [x], order, inverse, kept, 3), wanted, bound)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("dim", [1, 70, 1030])
def test_triton_rows(dim: int, dtype: torch.dtype, drops: bool, device: torch.device, poisoned: None) -> None:
    (rows, gates), (order, inverse) = rows_inputs(dtype, device, dim, drops)
    rows = rows.contiguous()
    value, *grads = results(reference.weighted_sum, in_double([rows, gates]), order)
    grad = draw(dim, 7, dtype=torch.bfloat16, device=device).t().to(dtype).contiguous()
    found = [row_kernel.sum_rows(rows, inverse, gates) for inverse in (inverse.view(7, 3),)]
    check([*found, *row_kernel.sum_rows_grad(grad, rows, order, gates)], [value, *grads], BOUNDS[dtype])
    unweighted = rows.double()[inverse.view(7, 3)].sum(1)
    check([row_kernel.sum_rows(rows, inverse.view(7, 3), None)], [unweighted], BOUNDS[dtype])


@NEEDS_NATIVE
def test_native_rows_do_not_depend_on_threads(with_threads: Callable[[int], None]) -> None:
    inputs, (order, inverse) = rows_inputs(torch.bfloat16, torch.device("cpu"), 130, False)
    found = []
    for threads in (1, 3):
        with_threads(threads)
        found.append(results(permute.weighted_sum, inputs, order, inverse))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    # The twin rounds after each operation.
    bound = 2 * BOUNDS.get(dtype, 1e-13)
    inputs, own = mixture_inputs(33, 2, [0, 1, 3, 5], 16, 24, dtype, device)
    inputs[1] = inputs[1].to(torch.promote_types(dtype, torch.float32))
    wanted = results(mixture(reference.mixture_swiglu), in_double(inputs), own)
    check(results(mixture(experts.mixture_swiglu), inputs, own), wanted, bound)
    counts = [3, 0, 9, 1]
    inputs = swiglu_inputs(counts, 16, 24, dtype, device)
    wanted = results(reference.grouped_swiglu, in_double(inputs), counts)
    check(results(experts.grouped_swiglu, inputs, counts), wanted, bound)
    with torch.no_grad():
        check([experts.grouped_swiglu(*inputs, counts)], wanted[:1], bound)
    rows, weight = inputs[0], inputs[1][:, 0]
    wanted = results(reference.grouped_linear, in_double([rows, weight]), counts)
    check(results(experts.grouped_linear, [rows, weight], counts), wanted, bound)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_frozen_experts(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    rows, gate_up, down = swiglu_inputs([3, 0, 2], 8, 5, torch.float32, torch.device("cpu"))
    wanted = results(lambda r: reference.grouped_swiglu(r, gate_up.double(), down.double(), [3, 0, 2]), [rows.double()])
    check(results(lambda r: experts.grouped_swiglu(r, gate_up, down, [3, 0, 2]), [rows]), wanted, 1e-5)


def test_frozen_experts_on_a_gpu(device: torch.device) -> None:
    (x, gates, gate_up, down), own = mixture_inputs(9, 2, [0, 1, 3], 8, 5, torch.float32, device)

    def run(function: Callable[..., Tensor], up: Tensor, back: Tensor) -> Callable[..., Tensor]:
        return lambda x, gates: function(x, gates, own, up, back)

    wanted = results(run(reference.mixture_swiglu, gate_up.double(), down.double()), in_double([x, gates]))
    check(results(run(fused.MixtureSwiGLU.apply, gate_up.flatten(1, 2), down), [x, gates]), wanted, 1e-5)


@pytest.mark.parametrize(("rows", "count", "tile"), [(0, 8, 16), (4096, 128, 64), (32768, 8, 128), (131072, 128, 128)])
def test_tiles_follow_the_mean_rows_of_an_expert(rows: int, count: int, tile: int) -> None:
    assert row_tile(rows, count) == tile


def hopper_kernels(tiles: tuple[int, ...]) -> list[dict[str, object]]:
    """Every kernel with these tiles of rows, as for Mixtral: sizes are multiples of 16, rows are gathered."""
    floats = ("a", "weight", "out", "inner", "hidden", "grad", "grad_inner", "rows", "grad_rows")
    signature = dict.fromkeys(floats, "*bf16")
    signature |= dict.fromkeys(("gates", "grad_gates", "weights"), "*fp32")
    signature |= dict.fromkeys(("index", "grad_index", "a_index", "order"), "*i64")
    signature |= dict.fromkeys(("table", "ends"), "*i32")
    sizes = ("tiles", "experts", "columns", "depth", "width", "height", "dim")
    strides = ("a", "weight_e", "out", "grad", "weight_stride_e", "weight_stride_n", "weight_stride_k")
    signature |= dict.fromkeys((*sizes, *(s if "stride" in s else f"{s}_stride" for s in strides)), "i32")
    kernels: list[dict[str, object]] = []

    def add(path: str, tile: int, **constants: object) -> None:
        own = TABLE[path, tile]
        shape = {"BLOCK_M": own.rows, "BLOCK_N": own.columns, "BLOCK_K": own.depth, "GROUP": 8}
        name = f"lightbulb.kernels.experts.kernel:{path.removeprefix('gathered_')}_kernel"
        launch = {"warps": own.warps, "stages": own.stages}
        kernels.append({"kernel": name, "signature": signature, "constants": constants | shape} | launch)

    for tile in tiles:
        add("linear", tile, HAS_INDEX=False, EVEN=True, weight_stride_k=1, index=None)
        add("linear", tile, HAS_INDEX=False, EVEN=True, weight_stride_n=1, index=None)
        add("swiglu", tile, HAS_INDEX=True, EVEN=True)
        add("swiglu_grad", tile, HAS_INDEX=True, HAS_GATES=True, EVEN=True)
    add("weight_grad", 128, HAS_GRAD_INDEX=False, HAS_A_INDEX=False, grad_index=None, a_index=None)
    add("gathered_weight_grad", 128, HAS_GRAD_INDEX=True, HAS_A_INDEX=False, a_index=None)
    add("gathered_weight_grad", 128, HAS_GRAD_INDEX=False, HAS_A_INDEX=True, grad_index=None)
    folder = "lightbulb.kernels.experts"
    constants = {"TILE": 128, "EXPERTS": 128, "BLOCK": 32}
    kernels.append({"kernel": f"{folder}.schedule:schedule_kernel", "signature": signature, "constants": constants})
    constants = {"TOP_K": 8, "BLOCK": 1024}
    kernels.append({"kernel": f"{folder}.row_kernel:sum_grad_kernel", "signature": signature, "constants": constants})
    for has in (False, True):
        item = {"kernel": f"{folder}.row_kernel:sum_kernel", "signature": signature}
        kernels.append(item | {"constants": constants | {"HAS_WEIGHTS": has}})
    return kernels


@pytest.mark.parametrize("tiles", [(128,), pytest.param((16, 64), marks=pytest.mark.slow)], ids=str)
def test_compiles_for_hopper(tiles: tuple[int, ...]) -> None:
    kernels = hopper_kernels(tiles)
    found = compile_all(kernels)
    assert len(found) == len(kernels)
    for item in found:
        assert "error" not in item and item["shared"] <= SHARED_LIMIT, item
