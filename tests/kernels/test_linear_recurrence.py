"""Linear recurrences: Triton kernels, C++ chunks and steps, and plain torch against the naive twin in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor

from lightbulb.kernels import choice
from lightbulb.kernels.linear_recurrence import (
    _Native,
    _Triton,
    decays,
    kernel,
    linear_recurrence,
    native,
    plain,
    reference,
)
from lightbulb.kernels.native import is_built

Tier = Callable[..., tuple[Tensor, Tensor]]
TIERS: dict[str, Tier] = {
    "triton": _Triton.apply,
    "native": _Native.apply,
    "plain": plain.linear_recurrence,
}
needs_native = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")
each_tier = pytest.mark.parametrize(
    "tier", [pytest.param(name, marks=needs_native if name == "native" else ()) for name in TIERS]
)
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Of the norm of the error, against that of what is wanted."""


class Case(NamedTuple):
    """Sizes of a problem."""

    batch: int
    heads: int
    groups: int
    length: int
    state: int
    width: int
    varies: bool = True
    documents: str = "none"
    chunk_size: int = 16


CASES = [
    Case(1, 4, 2, 37, 8, 16),
    Case(1, 2, 2, 1, 8, 8),
    Case(1, 3, 3, 16, 16, 32, varies=False),
    Case(2, 2, 1, 33, 20, 24, varies=False, documents="some"),
    Case(2, 2, 1, 70, 24, 20, documents="some", chunk_size=64),
    Case(1, 6, 1, 50, 9, 33, documents="some", chunk_size=32),
    Case(1, 6, 1, 21, 5, 7, documents="all"),
    Case(2, 1, 1, 40, 17, 16, documents="first"),
    Case(1, 2, 1, 100, 64, 64, varies=False, chunk_size=64),
    Case(1, 2, 2, 65, 128, 64, documents="some", chunk_size=100),
    Case(1, 1, 1, 35, 64, 200, documents="adjacent", chunk_size=32),
    Case(1, 1, 1, 20, 256, 256, documents="some"),
]


class Problem(NamedTuple):
    """Inputs in float64, and gradients of both results."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    state: Tensor
    starts: Tensor | None
    grads: tuple[Tensor, Tensor]

    def leaves(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Query, key, value, log decay and state; a constant decay without gradient. Queries and values do not lie as
        they are read: positions come first in memory, as the mixers have them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dtypes = (dtype, dtype, dtype, wide, wide)
        lying = [t.to(device, d) for t, d in zip(self[:5], dtypes, strict=True)]
        for i in (0, 2):
            lying[i] = lying[i].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        return [t.detach().requires_grad_(t.ndim > 1) for t in lying]


def starts_of(kind: str, batch: int, length: int) -> Tensor | None:
    starts = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "all":
        starts[:] = True
    elif kind == "first":
        starts[0, 0] = True
    elif kind == "adjacent":
        starts[:, length // 2 : length // 2 + 3] = starts[:, 15:17] = True
    else:
        starts |= torch.rand(batch, length) < 0.1
        starts[-1, length // 3] = True
    return starts


def problem(case: Case) -> Problem:
    torch.manual_seed(case.length)
    double = {"dtype": torch.float64}
    query, key = torch.randn(2, case.batch, case.groups, case.length, case.state, **double) * case.state**-0.5
    value, grad = torch.randn(2, case.batch, case.heads, case.length, case.width, **double)
    state, grad_state = torch.randn(2, case.batch, case.heads, case.state, case.width, **double)
    shape = (case.batch, case.heads, case.length) if case.varies else (case.heads,)
    starts = starts_of(case.documents, case.batch, case.length)
    return Problem(query, key, value, -torch.rand(shape, **double), state, starts, (grad, grad_state))


def results(run: Tier, given: list[Tensor], *rest: Any, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Result, last state, and the gradients of all inputs that have one."""
    found = run(*given, *rest)
    wanted = [t for t in given if t.requires_grad]
    towards = [g.to(f) for g, f in zip(grads, found, strict=True)]
    return [t.detach() for t in (*found, *torch.autograd.grad(found, wanted, towards))]


def expected(given: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The twin in float64, of inputs rounded to ``dtype``."""
    leaves = given.leaves(dtype, torch.device("cpu"))
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    grads = tuple(g.to(dtype).double() if g is given.grads[0] else g for g in given.grads)
    return results(reference.linear_recurrence, leaves, given.starts, grads=grads)  # type: ignore[arg-type]


def run_tier(tier: str, given: Problem, dtype: torch.dtype, chunk_size: int, device: torch.device) -> list[Tensor]:
    place = device if tier == "triton" else torch.device("cpu")
    starts = None if given.starts is None else given.starts.to(place)
    return results(TIERS[tier], given.leaves(dtype, place), starts, chunk_size, grads=given.grads)


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for place, (mine, exact) in enumerate(zip(found, wanted, strict=True)):
        assert mine.shape == exact.shape and mine.isfinite().all(), place
        error = (mine.double().cpu() - exact).norm()
        assert error <= bound * exact.norm().clamp(min=1e-3), (place, float(error / exact.norm()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@each_tier
def test_tiers_are_the_twin(tier: str, case: Case, device: torch.device) -> None:
    given = problem(case)
    check(run_tier(tier, given, torch.float32, case.chunk_size, device), expected(given), BOUNDS[torch.float32])


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]], ids=lambda case: "-".join(map(str, case)))
@each_tier
def test_half_precision_is_within_rounding(tier: str, case: Case, device: torch.device) -> None:
    # The interpreter multiplies the bits of bfloat16.
    dtype = torch.float16 if tier == "triton" and device.type == "cpu" else torch.bfloat16
    given = problem(case)
    found = run_tier(tier, given, dtype, case.chunk_size, device)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    check(found, expected(given, dtype), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("steps", [-1e30, -float("inf"), -1e4, -60.0, 0.0], ids=str)
@each_tier
def test_any_decay_is_exact(tier: str, steps: float, device: torch.device) -> None:
    """Small decays behind large ones keep their digits, and what has faded away leaves no NaN."""
    given = problem(Case(2, 4, 2, 40, 8, 16))
    given.log_decay.mul_(1e-3)
    given.log_decay[:, :, [0, 5, 6, 20]] = steps
    given.log_decay[:, 1] = steps
    check(run_tier(tier, given, torch.float32, 32, device), expected(given), 1e-5)


@each_tier
def test_full_decay_keeps_the_current_token_only(tier: str, device: torch.device) -> None:
    given = problem(Case(1, 2, 2, 20, 8, 16, varies=False))
    given.log_decay.fill_(-1e4)
    found = run_tier(tier, given, torch.float32, 16, device)
    own = (given.query * given.key).sum(-1, keepdim=True) * given.value
    check(found[:1], [own], BOUNDS[torch.float32])


@each_tier
def test_same_inputs_give_the_same_bits(tier: str, device: torch.device) -> None:
    given = problem(CASES[4])
    first, second = (run_tier(tier, given, torch.float32, 64, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tier", ["triton", pytest.param("native", marks=needs_native)])
def test_a_sample_does_not_depend_on_its_neighbours(tier: str, device: torch.device) -> None:
    given = problem(CASES[3])
    assert given.starts is not None
    grads = given.grads[0][1:], given.grads[1][1:]
    one = Problem(*(t[1:] for t in given[:3]), given.log_decay, given.state[1:], given.starts[1:], grads)
    both, alone = (run_tier(tier, part, torch.float32, 16, device) for part in (given, one))
    assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("split", [1, 16, 23])
@each_tier
def test_a_prefix_and_the_rest_are_the_whole(tier: str, split: int, device: torch.device) -> None:
    given = problem(CASES[0])
    place = device if tier == "triton" else torch.device("cpu")
    leaves, run = [t.detach() for t in given.leaves(torch.float32, place)], TIERS[tier]
    *tokens, state = leaves
    parts = []
    for span in (slice(0, split), slice(split, None)):
        part, state = run(*(t[:, :, span] for t in tokens), state, None, 16)
        parts.append(part)
    check([torch.cat(parts, 2), state], expected(given)[:2], BOUNDS[torch.float32])


@each_tier
def test_what_lies_around_the_tensors_does_not_matter(tier: str, device: torch.device) -> None:
    """Inputs are parts of larger tensors full of NaN: rows behind the last one, columns behind the last one."""
    given = problem(CASES[5])
    place = device if tier == "triton" else torch.device("cpu")

    def embedded(t: Tensor) -> Tensor:
        whole = torch.full((*t.shape[:2], t.shape[2] + 9, t.shape[3] + 3), float("nan"), device=t.device)
        whole[:, :, : t.shape[2], : t.shape[3]] = t
        return whole[:, :, : t.shape[2], : t.shape[3]]

    leaves = [t.detach() for t in given.leaves(torch.float32, place)]
    inside = [*map(embedded, leaves[:3]), embedded(leaves[3][..., None])[..., 0], embedded(leaves[4])]
    wanted = [t.requires_grad_() for t in inside]
    starts = None if given.starts is None else given.starts.to(place)
    grads = tuple(embedded(g.float().to(place)) for g in given.grads)
    check(results(TIERS[tier], wanted, starts, 32, grads=grads), expected(given), BOUNDS[torch.float32])  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["triton", pytest.param("native", marks=needs_native)])
def test_nothing_passes_between_documents(tier: str, device: torch.device) -> None:
    """Documents apart give the same bits, infinities in the one before included."""
    given = problem(Case(1, 2, 1, 48, 8, 16))
    place = device if tier == "triton" else torch.device("cpu")
    query, key, value, log_decay, state = (t.detach() for t in given.leaves(torch.float32, place))
    starts = torch.zeros(1, 48, dtype=torch.bool, device=place)
    starts[:, [16, 40]] = True
    state[0, 0, 0, 0] = float("inf")
    value[:, :, 3] = float("nan")
    found = TIERS[tier](query, key, value, log_decay, state, starts, 16)[0]
    alone = TIERS[tier](
        *(t[:, :, 16:] for t in (query, key, value, log_decay)), torch.zeros_like(state), starts[:, 16:], 16
    )[0]
    assert torch.equal(found[:, :, 16:], alone) and alone.isfinite().all()


@needs_native
@pytest.mark.parametrize("documents", ["none", "all", "some"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_steps(length: int, dtype: torch.dtype, documents: str) -> None:
    given = problem(Case(3, 4, 2, length, 9, 21, documents=documents))
    leaves = [t.detach() for t in given.leaves(dtype, torch.device("cpu"))]
    check(list(native.steps(*leaves, given.starts)), expected(given, dtype)[:2], BOUNDS[dtype] / 4)
    constant = given._replace(log_decay=given.log_decay[0, :, 0].contiguous())
    leaves[3] = constant.log_decay
    check(list(native.steps(*leaves, given.starts)), expected(constant, dtype)[:2], BOUNDS[dtype] / 4)


@needs_native
@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=lambda case: "-".join(map(str, case)))
def test_threads_change_no_bit(case: Case, with_threads: Callable[[int], None]) -> None:
    given, found = problem(case), []
    for threads in (1, 3):
        with_threads(threads)
        found.append(run_tier("native", given, torch.float32, 64, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("length", [1, 30])
def test_the_door(length: int, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    given = problem(Case(2, 4, 2, length, 8, 16, documents="some"))
    leaves = given.leaves(dtype, torch.device("cpu"))
    found = results(linear_recurrence, leaves, given.starts, 16, grads=given.grads)
    assert found[0].dtype == dtype
    wanted, bound = expected(given, dtype), BOUNDS.get(dtype, 1e-12)
    check(found, wanted, bound)
    with torch.no_grad():  # where steps may take over
        check(list(linear_recurrence(*leaves, given.starts, 16)), wanted[:2], bound)


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS], ids=str)
def test_the_door_without_tokens_or_state(dtype: torch.dtype) -> None:
    query, value = torch.randn(2, 1, 5, 3).to(dtype), torch.randn(2, 2, 5, 4).to(dtype)
    decay = -torch.rand(2)
    empty, state = linear_recurrence(query[:, :, :0], query[:, :, :0], value[:, :, :0], decay)
    assert empty.shape == (2, 2, 0, 4) and state.shape == (2, 2, 3, 4) and not state.any()
    found, last = linear_recurrence(query, query, value, decay)
    wanted = reference.linear_recurrence(query.double(), query.double(), value.double(), decay, state.double(), None)
    check([found, last], list(wanted), BOUNDS.get(dtype, 1e-12))
    assert last.dtype == state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_one_decay_for_all_samples_gets_their_summed_gradient() -> None:
    given = problem(Case(3, 2, 1, 20, 4, 8))
    shared = given.log_decay[:1].float().requires_grad_()
    leaves = given.leaves(torch.float32, torch.device("cpu"))
    found = torch.autograd.grad(linear_recurrence(*leaves[:3], shared, leaves[4])[0].square().sum(), shared)[0]
    whole = shared.detach().expand(3, -1, -1).clone().requires_grad_()
    wanted = torch.autograd.grad(linear_recurrence(*leaves[:3], whole, leaves[4])[0].square().sum(), whole)[0]
    assert torch.allclose(found, wanted.sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


POINTERS = {"documents": "*i32", "starts": "*u8"}
SINGLE = ("first", "high", "low", "last", "along", "far_dots", "near_dots")
TENSORS = ("a", "b", "c", "x", "entering", "states", "out")


def compiled(name: str, element: str, warps: dict[str, int], constants: dict[str, Any]) -> dict[str, Any]:
    """What the compiler is asked for: 16-byte aligned tensors, as launches have them."""
    module = decays if name.startswith("decay") else kernel
    arguments = getattr(module, name).arg_names
    signature = {argument: "i32" for argument in arguments if argument not in constants}
    for argument in signature:
        if argument in TENSORS:
            signature[argument] = element
        elif argument in SINGLE:
            signature[argument] = "*fp32"
        elif argument in POINTERS:
            signature[argument] = POINTERS[argument]
    aligned = [a for a in signature if signature[a].startswith("*") or a[-2:] in ("_b", "_h", "_t")]
    item = {"kernel": f"{module.__name__}:{name}", "signature": signature}
    return item | {"constants": constants, "aligned": aligned} | warps


def large_kernels(width: int, element: str) -> list[dict[str, Any]]:
    """Both passes over the chunks, and the results' and the queries' gradients' rows."""
    size = 4 if element == "*fp32" else 2
    shared = {"K": width, "W": width, "ROWS": 64, "HAS_DOCUMENTS": True, "A_SHARE": 1}
    shared["PRECISION"] = kernel.precision(torch.float32 if size == 4 else torch.bfloat16)
    items = []
    for is_backward in (False, True):
        tiles = kernel.state_tiles(width, width, 256)
        warps = {"warps": tiles.pop("num_warps"), "stages": tiles.pop("num_stages")}
        flags = {"REVERSED": is_backward, "HAS_ALONG": is_backward}
        items.append(compiled("state_kernel", element, warps, shared | tiles | flags))
        tiles = kernel.mix_tiles(width, width, size)
        warps = {"warps": tiles.pop("num_warps"), "stages": tiles.pop("num_stages")}
        flags = {"REVERSED": False, "TRANSPOSED": is_backward, "HAS_DOTS": is_backward, "B_SHARE": 1, "SUMMED": 1}
        items.append(compiled("mix_kernel", element, warps, shared | tiles | flags))
    return items


@pytest.mark.parametrize("width", [128, *(pytest.param(width, marks=pytest.mark.slow) for width in (64, 256))])
def test_compiles_for_hopper(width: int) -> None:
    for found in compile_all(large_kernels(width, "*bf16")):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
        assert found.get("stack", 0) == 0, found  # registers suffice


@pytest.mark.slow
def test_compiles_for_hopper_in_float32() -> None:
    check_compiled(large_kernels(128, "*fp32")[:2])


def test_the_small_ones_compile_for_hopper() -> None:
    items, small = [], {"HAS_DOCUMENTS": True, "ROWS": 64}
    for name, constants in (("decay_kernel", small), ("decay_gradient_kernel", small | {"BLOCKS": 16})):
        item = compiled(name, "*fp32", {"warps": 4}, constants)
        floats = ("log_decay", "read", "paired", "written", "pairing", "out")
        item["signature"] |= {a: "*fp32" for a in item["signature"] if a in floats}
        items.append(item)
    check_compiled(items)


def check_compiled(items: list[dict[str, Any]]) -> None:
    for found in compile_all(items):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found
