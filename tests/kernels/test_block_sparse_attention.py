"""Block-sparse attention: the Triton kernels and the torch form against dense masked softmax in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from compiling import SHARED_LIMIT, compile_all
from torch import Tensor
from torch.nn.functional import pad

from lightbulb.kernels import block_sparse_attention as door
from lightbulb.kernels import choice
from lightbulb.kernels.block_sparse_attention import Sight, Tiles, benchmark, kernel, launch, plain, reference
from lightbulb.kernels.block_sparse_attention.launch import Shape, Shapes

BOUNDS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SMALL = Shapes(Shape(32, 16, 4, 1), Shape(32, 16, 4, 1), Shape(16, 32, 4, 1))
BLOCK = 12  # of strides: no multiple of a tile's sides, nor a divisor


def starts(length: int) -> Tensor:
    """``[2, length]``: first positions of documents that differ between two samples."""
    place = torch.arange(length)
    return torch.stack((place // 13 * 13, torch.where(place < length // 3, 0, length // 3)))


def band(
    length: int, window: int | None, sinks: int | None = None, stride: int | None = None, packed: bool = False
) -> Sight:
    place = torch.arange(length)
    start = starts(length) if packed else torch.zeros(1, length, dtype=torch.long)
    stop = (place + 1).expand_as(start)
    near = None if window is None else (place + 1 - window).expand_as(start)
    return Sight(start, stop, near, None if sinks is None else start + sinks, stride)


def runs(length: int, problems: int) -> Sight:
    """Any run of keys for each query, some empty, some queries' all."""
    generator = torch.Generator().manual_seed(length)
    ends = torch.randint(0, length + 1, (2, problems, length), generator=generator)
    ends[0, :, 5:30], ends[1, :, 5:30] = 0, length
    return Sight(ends[0], ends[1])


def buckets(length: int) -> Sight:
    """Of four heads, sorted by hash bucket."""
    bucket = torch.randint(0, 4, (4, length), generator=torch.Generator().manual_seed(2)).sort().values
    begins = torch.searchsorted(bucket, bucket)
    return Sight(begins, torch.arange(1, length + 1).expand_as(begins))


def encoder(length: int, packed: bool) -> Sight:
    """A window to both sides."""
    place = torch.arange(length)[None]
    start = starts(length)[:1] if packed else torch.zeros_like(place)
    return Sight(start, (place + 9).clamp(max=length), place - 8)


MASKS: dict[str, Callable[[int], Sight]] = {
    "past": lambda n: band(n, None),
    "documents": lambda n: band(n, None, packed=True),
    "window": lambda n: band(n, 21),
    "window 1": lambda n: band(n, 1, packed=True),
    "window documents": lambda n: band(n, 9, packed=True),
    "sinks": lambda n: band(n, 7, 5),
    "sinks documents": lambda n: band(n, 3, 4, packed=True),
    "stride": lambda n: band(n, 5, None, 2),
    "all": lambda n: band(n, 6, 3, 3, packed=True),
    "encoder": lambda n: encoder(n, False),
    "runs": lambda n: runs(n, 1),
    "runs by head": lambda n: runs(n, 4),
    "buckets": buckets,
    "nothing": lambda n: Sight(torch.zeros(1, n, dtype=torch.long), torch.zeros(1, n, dtype=torch.long)),
    "everything": lambda n: Sight(torch.zeros(1, n, dtype=torch.long), torch.full((1, n), n)),
}


def to(sight: Sight, device: torch.device) -> Sight:
    return sight.map(lambda bound: bound.to(device))


def tensors(
    queries: int,
    width: int = 16,
    heads: int = 2,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    keys: int | None = None,
) -> list[Tensor]:
    """Query, key, value, sink, and the gradients of the result and of the log-sum-exp. Query, key and value lie in
    memory as projections leave them, keys and values within tensors that go on with NaN."""
    generator = torch.Generator().manual_seed(queries + width)
    keys = keys or queries
    q = torch.randn(queries, 2, heads, width, generator=generator).permute(1, 2, 0, 3)
    both = torch.full((keys + 70, 2, kv_heads, 2 * width + 3), float("nan"))
    both[:keys, ..., : 2 * width] = torch.randn(keys, 2, kv_heads, 2 * width, generator=generator)
    k, v = (both[:keys, ..., i * width : (i + 1) * width].permute(1, 2, 0, 3) for i in range(2))
    sink = torch.randn(heads, generator=generator)
    grad = torch.randn(2, heads, queries, width, generator=generator)
    grad_lse = torch.randn(2, heads, queries, generator=generator)
    return [t.to(device=device, dtype=dtype) for t in (q, k, v, sink, grad)] + [grad_lse.to(device)]


Core = Callable[..., tuple[Tensor, Tensor]]


def results(core: Core, inputs: list[Tensor], tiles: Tiles, has_sink: bool, has_lse: bool) -> list[Tensor]:
    """The result, the log-sum-exp and every gradient. Where a query sees nothing, the gradient of the latter is NaN,
    which must not get through."""
    q, k, v, sink, grad, grad_lse = inputs
    leaves = [t.detach().requires_grad_() for t in ((q, k, v, sink) if has_sink else (q, k, v))]
    out, lse = core(*leaves[:3], tiles, leaves[3] if has_sink else None)
    wanted = [(out, grad)]
    if has_lse:
        wanted.append((lse, torch.where(lse.isinf(), float("nan"), grad_lse.to(lse.dtype))))
    found = torch.autograd.grad([y for y, _ in wanted], leaves, [g for _, g in wanted])
    return [out.detach(), lse.detach(), *found]


def exact(inputs: list[Tensor], tiles: Tiles, has_sink: bool, has_lse: bool) -> list[Tensor]:
    return results(reference.attention, [t.double() for t in inputs], tiles, has_sink, has_lse)


def check(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        visible = theirs.isfinite()
        assert torch.equal(mine.isfinite(), visible)
        mine, theirs = mine.double()[visible], theirs[visible]
        # Relative to the whole: a gradient is a sum of numbers larger than itself.
        assert (mine - theirs).norm() <= bound * (theirs.norm() + 0.1 * math.sqrt(theirs.numel()))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shapes", lambda width, dtype: SMALL)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "has_sink"), [(name, True) for name in MASKS] + [(name, False) for name in ("past", "runs", "nothing")]
)
def test_triton_masks(name: str, has_sink: bool, device: torch.device) -> None:
    tiles = Tiles(to(MASKS[name](45), device), 45, BLOCK)
    inputs = tensors(45, device=device)
    check(results(launch.attention, inputs, tiles, has_sink, True), exact(inputs, tiles, has_sink, True), 2e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("length", "width", "heads", "kv_heads"),
    [(17, 8, 1, 1), (32, 24, 4, 2), (50, 40, 2, 1), (100, 16, 1, 1), (1, 16, 2, 1)],
)
def test_triton_shapes(
    length: int, width: int, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    tiles = Tiles(to(band(length, 14, 3, packed=True), device), length, BLOCK)
    inputs = tensors(length, width, heads, kv_heads, dtype, device)
    found = results(launch.attention, inputs, tiles, True, False)
    assert all(t.dtype == dtype for t in (found[0], *found[2:])) and found[1].dtype == torch.float32
    check(found, exact(inputs, tiles, True, False), BOUNDS[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("queries", "keys"), [(20, 45), (45, 20), (33, 1)])
def test_triton_other_keys_than_queries(queries: int, keys: int, device: torch.device) -> None:
    stop = torch.linspace(0, keys, queries).long()[None]
    tiles = Tiles(to(Sight(torch.zeros_like(stop), stop), device), keys, BLOCK)
    inputs = tensors(queries, keys=keys, device=device)
    check(results(launch.attention, inputs, tiles, False, False), exact(inputs, tiles, False, False), 2e-5)


@pytest.mark.usefixtures("small_tiles")
def test_triton_writes_every_number_and_the_same_again(device: torch.device) -> None:
    tiles = Tiles(to(runs(35, 2), device), 35, BLOCK)
    inputs = tensors(35, 24, 2, 1, device=device)
    first = results(launch.attention, inputs, tiles, True, True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        again = results(launch.attention, inputs, tiles, True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_triton_whatever_the_tiles_and_their_order(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    sight, inputs = to(band(45, 6, 3, 3, packed=True), device), tensors(45, 16, 2, 1, device=device)
    first = results(launch.attention, inputs, Tiles(sight, 45, BLOCK), True, True)
    monkeypatch.setattr(launch, "shapes", lambda width, dtype: Shapes(*[Shape(16, 16, 4, 1)] * 3))
    monkeypatch.setattr(launch, "_CACHE", 1)  # one head after the other
    check(results(launch.attention, inputs, Tiles(sight, 45, BLOCK), True, True), [t.double() for t in first], 2e-6)


@pytest.mark.usefixtures("small_tiles")
def test_triton_large_scores_and_sinks(device: torch.device) -> None:
    tiles = Tiles(to(runs(33, 1), device), 33, BLOCK)
    inputs = tensors(33, device=device)
    inputs[0] = inputs[0] * 300
    inputs[3] = torch.tensor([-1e4, 1e4], device=device)
    found = results(launch.attention, inputs, tiles, True, False)
    assert all(t.isfinite().all() for t in found)
    assert not found[0][:, 1].any()  # all weight is on the sink
    check(found, exact(inputs, tiles, True, False), 1e-4)
    inputs[3].fill_(float("-inf"))  # no sink at all
    without = results(launch.attention, inputs, tiles, False, False)
    check(results(launch.attention, inputs, tiles, True, False)[:5], [t.double() for t in without], 1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_results_over_different_keys_merge(device: torch.device) -> None:
    """The log-sum-exp weighs them, and takes its gradient."""
    inputs = tensors(33, device=device)
    near, far = band(33, 9), band(33, None)
    far = Sight(far.start, (far.stop - 9).clamp(min=0))
    parts = [Tiles(to(sight, device), 33, BLOCK) for sight in (near, far)]

    def merged(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        (a, lse_a), (b, lse_b) = (launch.attention(q, k, v, part, None) for part in parts)
        share = torch.sigmoid(lse_a - lse_b)[..., None]
        return a * share + b * (1 - share), torch.logaddexp(lse_a, lse_b)

    whole = Tiles(to(band(33, None), device), 33, BLOCK)
    check(results(merged, inputs, whole, False, False), exact(inputs, whole, False, False), 2e-5)


@pytest.mark.parametrize("has_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("name", MASKS)
def test_torch_form(name: str, has_sink: bool) -> None:
    tiles, inputs = Tiles(MASKS[name](67), 67, BLOCK), [t.double() for t in tensors(67, 6)]
    found = results(door.attention_with_lse, inputs, tiles, has_sink, True)
    check(found, exact(inputs, tiles, has_sink, True), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_door(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernels)
    used = []
    for module in (plain, reference):
        monkeypatch.setattr(module, "attention", _noting(module.attention, module.__name__, used))
    tiles, inputs = Tiles(band(67, 9, 3), 67, 16), tensors(67, 12, 4, 2, dtype)
    leaves = [t.detach().requires_grad_() for t in inputs[:4]]
    out = door.block_sparse_attention(*leaves[:3], tiles, leaves[3])
    assert out.dtype == dtype and used == [(reference if kernels == "reference" else plain).__name__]
    wanted = exact(inputs, tiles, True, False)
    found = [out.detach(), wanted[1], *torch.autograd.grad(out, leaves, inputs[4])]
    check(found, wanted, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype])


def _noting(function: Core, name: str, used: list[str]) -> Core:
    def noted(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        used.append(name)
        return function(*args, **options)

    return noted


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(queries: int, keys: int) -> None:
    bounds = torch.zeros(1, queries, dtype=torch.long)
    q, k, v = (torch.ones(2, 3, n, 4, requires_grad=True) for n in (queries, keys, keys))
    out = door.block_sparse_attention(q, k, v, Tiles(Sight(bounds, bounds), keys, 16))
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize("kv_heads", [6, 3])
@pytest.mark.parametrize("name", ["past", "sinks documents", "runs", "nothing", "runs by head"])
def test_dense_detour(name: str, kv_heads: int) -> None:
    """What a GPU computes of short or nearly full masks is the same."""
    sight = MASKS[name](40)
    tiles, inputs = Tiles(sight if len(sight.start) < 3 else runs(40, 3), 40, BLOCK), tensors(40, 8, 6, kv_heads)
    core = lambda q, k, v, tiles, sink: (door._dense(q, k, v, tiles), exacts[1])  # noqa: E731
    exacts = exact(inputs, tiles, False, False)
    check(results(core, inputs, tiles, False, False), exacts, 1e-5)


def test_when_to_take_the_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = lambda sight, n: door._is_dense(*[torch.empty(1, 1, n, 128).bfloat16()] * 2, Tiles(sight, n, 64))  # noqa: E731
    assert dense(band(512, 9), 512) and not dense(band(1024, 9), 1024)
    assert dense(band(4096, None), 4096)  # the past is half of the matrix, and then some
    assert not dense(band(4096, 2048), 4096)
    monkeypatch.setattr(door, "_LARGEST_MASK", 1 << 20)
    assert dense(band(4096, None), 4096) and not dense(band(4096, None, packed=True), 4096)
    everything = Sight(torch.zeros(1, 4096, dtype=torch.long), torch.full((1, 4096), 4096))
    assert not dense(everything, 4096)  # PyTorch would need a mask, which is too large


@pytest.mark.parametrize("tile", [(16, 16), (32, 8), (8, 24)])
@pytest.mark.parametrize("name", MASKS)
def test_schedules_list_each_visible_pair_once(name: str, tile: tuple[int, int]) -> None:
    tiles, (rows, columns) = Tiles(MASKS[name](67), 67, BLOCK), tile
    mask = pad(tiles.sight.mask(67, BLOCK), (0, -67 % columns))
    some, every = (  # a tile is full when all the queries there are see it
        pad(mask, (0, 0, 0, -67 % rows), value=filler).unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        for filler in (False, True)
    )
    some, every = some.any(4).any(2), every.all(4).all(2)
    for by_key in (False, True):
        schedule = tiles.schedule(rows, columns, by_key)
        starts = schedule.starts.tolist()
        for line in range(tiles.problems * schedule.lines):
            problem, place = divmod(line, schedule.lines)
            begin, middle, end = starts[2 * line : 2 * line + 3]
            listed = schedule.place[begin:end].tolist()
            assert len(set(listed)) == len(listed)
            assert set(some[problem, place].nonzero()[:, 0].tolist()) <= set(listed)
            assert every[problem, place, schedule.place[begin:middle]].all()
        some, every = some.transpose(1, 2), every.transpose(1, 2)
        counts = schedule.starts[::2].diff().view(tiles.problems, -1)
        order = schedule.order.view(tiles.problems, -1).long()
        assert torch.equal(order.sort(1).values, torch.arange(schedule.lines).expand_as(order))
        assert (counts.gather(1, order).diff(dim=1) <= 0).all()


def test_benchmark_compares_the_same_masks() -> None:
    place = torch.arange(2048)
    for mask in benchmark.masks(2048).values():
        found = mask.visible(place[0], place[0], place[:, None], place)
        assert torch.equal(found, to(mask.sight, place.device).mask(2048, 64)[0])


def test_benchmark_finds_the_crossing() -> None:
    assert benchmark.crossing([(0.1, 3.0), (0.3, 1.5), (0.5, 0.5)]) == pytest.approx(0.4)
    assert benchmark.crossing([(0.1, 0.9)]) == 0 and benchmark.crossing([(0.1, 2.0)]) == 1


POINTERS = {
    "forward": ("query", "key", "value", "sink", "out"),
    "grad_query": ("query", "key", "value", "out", "grad", "grad_query"),
    "grad_key": ("query", "key", "value", "grad", "grad_key", "grad_value"),
}


def compilation(name: str, width: int, dtype: str, **options: object) -> dict[str, object]:
    """One kernel at its real tiles."""
    arguments = getattr(kernel, f"{name}_kernel").arg_names
    shape = getattr(launch.shapes(width, {"*bf16": torch.bfloat16, "*fp32": torch.float32}[dtype]), name)
    constants = {"SINKS": False, "STRIDE": 0, "BLOCK": 1, "WIDTH": width, "SIZE": launch.padded(width)}
    constants |= {"ROWS": shape.rows, "COLUMNS": shape.columns, "PRECISION": "ieee"} | options
    own = {"forward": "HAS_SINK", "grad_query": "HAS_GRAD_LSE", "grad_key": "GROUP"}[name]
    constants.setdefault(own, 4 if own == "GROUP" else True)
    signature = {a: "i32" for a in arguments if a not in constants} | dict.fromkeys(POINTERS[name], dtype)
    signature |= dict.fromkeys(("bounds", "order", "starts", "place"), "*i32") | {"scale": "fp32"}
    signature |= {a: "*fp32" for a in ("lse", "delta", "grad_lse") if a in arguments}
    return {
        "kernel": f"lightbulb.kernels.block_sparse_attention.kernel:{name}_kernel",
        "signature": {a: signature[a] for a in arguments if a in signature},
        "constants": constants,
        "warps": shape.warps,
        "stages": shape.stages,
    }


def check_compiled(kernels: list[dict[str, object]]) -> None:
    for found in compile_all(kernels):
        assert "error" not in found and found["shared"] <= SHARED_LIMIT, found


def test_compiles_for_hopper() -> None:
    check_compiled([compilation(name, 128, "*bf16") for name in POINTERS])


@pytest.mark.slow
def test_every_width_and_mask_compiles_for_hopper() -> None:
    kernels = [compilation(name, width, "*bf16") for name in POINTERS for width in (32, 64, 96, 256)]
    kernels += [compilation(name, 128, "*bf16", SINKS=True, STRIDE=2, BLOCK=64) for name in POINTERS]
    check_compiled(kernels + [compilation(name, width, "*fp32") for name in POINTERS for width in (64, 128, 256)])
