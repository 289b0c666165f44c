"""Block-sparse attention against dense masked softmax in float64, and the promises of its patterns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightbulb.config import ConfigError, build_config
from lightbulb.kernels.block_sparse_attention import plain
from lightbulb.kernels.block_sparse_attention.lists import FULL, Lists
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.block_sparse import BlockSparse, BlockSparseConfig, band_tiles
from lightbulb.nn import precision
from lightbulb.nn.attention import self_attention
from lightbulb.nn.block_sparse import block_sparse_attention
from lightbulb.nn.documents import run_starts
from lightbulb.nn.dynamic_sparse import hash_attention, hash_buckets, kept_attention, put, take
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import Init, initialise
from lightbulb.ops import Sight, Tiles

DIM = 16


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``mask [problems, queries, keys]``; rows without keys give zero."""
    batch, heads = query.shape[:2]
    key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
    mask = mask.repeat_interleave(batch * heads // len(mask), 0).view(batch, heads, *mask.shape[1:])
    scores = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0) @ value


def heads(length: int, num_heads: int = 4, kv_heads: int = 2, keys: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sizes = (num_heads, length), (kv_heads, keys or length), (kv_heads, keys or length)
    return tuple(torch.randn(2, n, tokens, 6, dtype=torch.float64, requires_grad=True) for n, tokens in sizes)


def documents(length: int) -> Tensor:
    """``[2, length]``: document ids that differ between the two samples."""
    positions = torch.arange(length)
    return torch.stack([positions // 7, (positions >= length // 3).long()])


def band(
    length: int, window: int | None, sinks: int | None = None, stride: int | None = None, packed: bool = False
) -> Sight:
    positions = torch.arange(length)
    start = run_starts(documents(length)) if packed else torch.zeros(1, length, dtype=torch.long)
    stop = (positions + 1).expand_as(start)
    if window is None:
        return Sight(start, stop)
    near = (positions + 1 - window).expand_as(start)
    return Sight(start, stop, near, None if sinks is None else start + sinks, stride)


def scattered(length: int, problems: int) -> Sight:
    """Any run of keys for each query of each head, some empty."""
    generator = torch.Generator().manual_seed(length)
    ends = torch.randint(0, length + 1, (2, problems, length), generator=generator)
    return Sight(ends[0], ends[1])


SIGHTS: dict[str, Callable[[int, bool], Sight]] = {
    "causal": lambda length, packed: band(length, None, packed=packed),
    "window": lambda length, packed: band(length, 9, packed=packed),
    "one": lambda length, packed: band(length, 1, packed=packed),
    "global": lambda length, packed: band(length, 5, 6, packed=packed),
    "stride": lambda length, packed: band(length, 3, None, 3, packed=packed),
    "all": lambda length, packed: band(length, 6, 3, 2, packed=packed),
}


def assert_same(found: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert torch.allclose(found, wanted, atol=1e-12)
    grad = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True)
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SIGHTS)
def test_equality_tiles_are_dense_masked_softmax(name: str, packed: bool, block_size: int) -> None:
    for length in (1, 16, 61):  # 61: tiles of 4 slide for more rows than views need
        inputs, sight = heads(length), SIGHTS[name](length, packed)
        found = block_sparse_attention(*inputs, Tiles(sight, length, block_size))
        assert_same(found, dense(*inputs, sight.mask(length, block_size)), inputs)


@pytest.mark.parametrize("problems", [1, 2, 8])
@pytest.mark.parametrize("block_size", [3, 8])
def test_equality_any_runs_of_keys_and_rows_without(problems: int, block_size: int) -> None:
    inputs, sight = heads(30, 4, 4), scattered(30, problems)
    mask = sight.mask(30, block_size)
    assert not mask.any(-1).all() and mask.any()
    found = block_sparse_attention(*inputs, Tiles(sight, 30, block_size))
    assert_same(found, dense(*inputs, mask), inputs)
    blind = ~mask.any(-1).repeat_interleave(8 // problems, 0).view(2, 4, 30)
    assert (found[blind] == 0).all()


def test_equality_more_keys_than_queries() -> None:
    inputs = heads(7, 4, 4, keys=19)
    sight = Sight(torch.arange(7)[None], torch.arange(7)[None] + 12)
    found = block_sparse_attention(*inputs, Tiles(sight, 19, 4))
    assert_same(found, dense(*inputs, sight.mask(19, 4)), inputs)


def test_gradients_are_those_of_the_values() -> None:
    inputs, tiles = heads(6, 2, 1), Tiles(band(6, 2, 1, 2, packed=True), 6, 2)
    assert torch.autograd.gradcheck(lambda *inputs: block_sparse_attention(*inputs, tiles), inputs)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "all"])
def test_core_in_bfloat16_is_within_rounding(name: str, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    sight, lower = SIGHTS[name](300, False), [t.detach().bfloat16().requires_grad_() for t in heads(300)]
    exact = [t.detach().double().requires_grad_() for t in lower]
    found = block_sparse_attention(*lower, Tiles(sight, 300, 8))
    wanted = dense(*exact, sight.mask(300, 8))
    grad = torch.randn_like(found)
    results = [found, *torch.autograd.grad(found, lower, grad)]
    for ours, theirs in zip(results, [wanted, *torch.autograd.grad(wanted, exact, grad.double())], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 2**-8 * theirs.norm()  # what one rounding to bfloat16 can make


@pytest.mark.parametrize("window", [None, 40, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equality_full_mask_and_wide_window_are_causal_attention(window: int | None, kv_heads: int) -> None:
    inputs = heads(40, 4, kv_heads)
    found = block_sparse_attention(*inputs, Tiles(band(40, window), 40, 8))
    assert_same(found, self_attention(*inputs), inputs)


def shuffled(tiles: Lists) -> Lists:
    order = torch.cat(
        [begin + torch.randperm(end - begin) for begin, end in zip(tiles.row_start, tiles.row_start[1:], strict=False)]
    )
    return replace(tiles, column=tiles.column[order], kind=tiles.kind[order])


@pytest.mark.parametrize("packed", [False, True])
def test_equality_in_any_order_of_the_tiles(packed: bool) -> None:
    inputs, tiles = heads(61), Tiles(band(61, 9, 3, 3, packed), 61, 4).lists
    mixed = shuffled(tiles)
    assert not torch.equal(mixed.column, tiles.column)
    assert_same(plain.attention(*inputs, mixed)[0], plain.attention(*inputs, tiles)[0], inputs)


def test_equality_whatever_fits_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tiles = heads(61), Tiles(band(61, 9), 61, 4)
    assert any(group.slides for group in tiles.lists.groups)
    whole = block_sparse_attention(*inputs, tiles)
    monkeypatch.setattr(plain, "_SCORES", 200)
    assert_same(block_sparse_attention(*inputs, tiles), whole, inputs)


def test_equality_stride_opens_blocks_behind_the_own_one_only() -> None:
    inputs, sight = heads(12), band(12, 2, stride=2)
    wanted = torch.tensor([[n - 2 < m <= n or n // 4 - m // 4 == 2 for m in range(12)] for n in range(12)])
    assert torch.equal(sight.mask(12, 4)[0], wanted)
    assert_same(block_sparse_attention(*inputs, Tiles(sight, 12, 4)), dense(*inputs, wanted[None]), inputs)
    config = BlockSparseConfig(num_heads=4, block_size=4, window=2, stride=2)
    assert config.visible(12) == pytest.approx(float(wanted.sum() / 12))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SIGHTS)
def test_tiles_are_listed_that_hold_a_visible_pair_and_full_where_all_are(name: str, packed: bool) -> None:
    sight, block = SIGHTS[name](64, packed), 8
    tiles = Tiles(sight, 64, block).lists
    pairs = sight.mask(64, block).view(-1, 8, block, 8, block).transpose(2, 3).flatten(3).flatten(0, 1)
    row = torch.repeat_interleave(torch.arange(len(tiles.row_start) - 1), tiles.row_start.diff())
    assert torch.equal(torch.stack((row, tiles.column), 1), pairs.any(-1).nonzero())
    assert torch.equal(tiles.kind == FULL, pairs.all(-1)[row, tiles.column])


def test_work_grows_with_the_density() -> None:
    tiles = Tiles(band(4096, 256), 4096, 64).lists
    dense_tiles = len(Tiles(band(4096, None), 4096, 64).lists.column)
    assert len(tiles.column) / dense_tiles < 0.15
    buckets = torch.randint(0, 16, (1, 4096), generator=torch.Generator().manual_seed(0)).sort().values
    sight = Sight(run_starts(buckets), torch.arange(1, 4097)[None])
    assert len(Tiles(sight, 4096, 64).lists.column) / dense_tiles < 2.5 / 16  # 1/16, and the tiles at the edges


def hashed(length: int, buckets: int) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs = heads(length, 3, 3)
    return inputs, torch.randint(0, buckets, (2, 3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("buckets", [1, 4, 32])
def test_equality_hash_attention_is_attention_within_buckets(buckets: int, packed: bool) -> None:
    inputs, bucket = hashed(45, buckets)
    ids = documents(45) if packed else None
    mask = (bucket[..., None] == bucket[..., None, :]).tril()
    if ids is not None:
        mask &= (ids[:, :, None] == ids[:, None])[:, None]
    assert_same(hash_attention(*inputs, bucket, ids, 4), dense(*inputs, mask.flatten(0, 1)), inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(45, 45), (20, 20), (7, 30), (30, 1)])
def test_equality_kept_attention_is_attention_without_the_dropped(queries: int, keys: int, packed: bool) -> None:
    inputs = heads(45, 3, 3)
    kept = [torch.stack([torch.randperm(45)[:n].sort().values for _ in range(6)]) for n in (queries, keys)]
    ids = documents(45) if packed else torch.zeros(2, 45, dtype=torch.long)
    of_query, of_key = (torch.zeros(6, 45, dtype=torch.bool).scatter_(1, index, True) for index in kept)
    same = (ids[:, :, None] == ids[:, None]).repeat_interleave(3, 0)
    mask = (of_query[:, :, None] & of_key[:, None] & same).tril()
    found = kept_attention(*inputs, *kept, run_starts(ids) if packed else None, 4)
    assert_same(found, dense(*inputs, mask), inputs)
    assert (found.flatten(0, 1)[~of_query] == 0).all()


def test_equality_a_permutation_and_its_inverse_are_nothing() -> None:
    x = torch.randn(2, 3, 11, 4, dtype=torch.float64, requires_grad=True)
    order = torch.stack([torch.randperm(11) for _ in range(6)])
    assert torch.equal(put(take(x, order), order, 11), x)
    assert torch.autograd.gradcheck(lambda x: take(x, order[:, :7]), x)
    assert torch.autograd.gradcheck(lambda x: put(x[:, :, :7], order[:, :7], 11), x)


def test_buckets_are_by_direction_even_and_near_tokens_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4000, 8, generator=generator)
    rotation = BlockSparseConfig(num_heads=4, pattern="hash", num_buckets=8).build(32, 64, Init(1, 1)).rotation
    bucket = hash_buckets(x, rotation)
    assert torch.equal(hash_buckets(3 * x, rotation), bucket)
    assert torch.equal((hash_buckets(-x, rotation) - bucket).abs(), torch.full_like(bucket, 4))
    counts = torch.stack([b.bincount(minlength=8) for b in bucket[0]])
    assert counts.min() > 400 and counts.max() < 600
    close = hash_buckets(x + 0.01 * torch.randn(x.shape, generator=generator), rotation)
    assert (close == bucket).float().mean() > 0.97


CONFIGS = {
    "window": {"window": 5},
    "window-global": {"window": 4, "num_global": 2, "num_kv_heads": 2, "qk_norm": True},
    "window-global-stride": {"window": 4, "num_global": 3, "stride": 2},
    "full": {},
    "hash": {"pattern": "hash", "num_buckets": 4, "qk_norm": True},
    "qk": {"pattern": "qk", "drop": 0.5, "num_kv_heads": 2, "qk_norm": True},
}


def mixer(dtype: torch.dtype = torch.float64, **changes: object) -> BlockSparse:
    config = BlockSparseConfig.model_validate({"num_heads": 4, "block_size": 4} | changes)
    module = config.build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    return module.to(dtype)


def run(module: BlockSparse, x: Tensor, ids: Tensor | None = None, training: bool = False) -> Tensor:
    noise = Noise(3, torch.arange(x.shape[1]), len(x)) if training else None
    return module(x, Context(torch.arange(len(x)), ids, noise=noise, place="here"))[0]


def rotated(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """``x [batch, heads, length, width]``; the angles in float32, as the layer has them."""
    half = x.shape[3] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def naive_mixer(module: BlockSparse, x: Tensor, mask: Tensor) -> Tensor:
    """The mixer in plain operations, with ``mask [problems, length, length]``."""
    config = module.config

    def project(part: str) -> Tensor:
        return (x @ getattr(module, part).weight.t()).unflatten(-1, (-1, DIM // 4)).permute(1, 2, 0, 3)

    def norm(t: Tensor, part: str) -> Tensor:
        scale = getattr(module, part).weight if config.qk_norm else None
        return t if scale is None else scale * t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    query = norm(project("query"), "query_norm")
    key = normalize(query, dim=-1) if config.pattern == "hash" else norm(project("key"), "key_norm")
    mixed = dense(rotated(query), rotated(key), project("value"), mask)
    return mixed.permute(2, 0, 1, 3).flatten(2) @ module.output.weight.t()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["window", "window-global", "window-global-stride", "full", "qk"])
def test_equality_mixer_is_the_formula(name: str, packed: bool) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(19, 2, DIM, dtype=torch.float64, requires_grad=True)
    config = module.config
    sight = band(19, config.window, config.num_global, config.stride, packed)
    found = run(module, x, documents(19) if packed else None)
    assert_same(found, naive_mixer(module, x, sight.mask(19, 4)), (x, *module.parameters()))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equality_one_bucket_is_causal_attention_with_normalised_shared_keys(qk_norm: bool) -> None:
    module = mixer(pattern="hash", num_buckets=1, qk_norm=qk_norm)
    x = torch.randn(19, 2, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 19, 19, dtype=torch.bool).tril()
    assert_same(run(module, x), naive_mixer(module, x, mask), (x, *module.parameters()))


def test_equality_hash_mixer_is_the_formula_within_its_buckets() -> None:
    module, x = mixer(**CONFIGS["hash"]), torch.randn(19, 2, DIM, dtype=torch.float64, requires_grad=True)
    query = module.query_norm(module.query(x).unflatten(-1, (4, -1))).permute(1, 2, 0, 3)
    bucket = hash_buckets(query, module.rotation)
    mask = (bucket[..., None] == bucket[..., None, :]).tril().flatten(0, 1)
    assert 0.2 < mask.float().mean() / torch.ones(19, 19).tril().mean() < 0.8
    assert_same(run(module, x), naive_mixer(module, x, mask), (x, *module.parameters()))


def test_equality_nothing_dropped_is_causal_attention() -> None:
    module, x = mixer(pattern="qk", drop=0.0, num_kv_heads=2), torch.randn(19, 2, DIM, dtype=torch.float64)
    assert torch.allclose(run(module, x, training=True), run(mixer(num_kv_heads=2), x), atol=1e-12)
    packed = run(module, x, documents(19), training=True)
    assert torch.allclose(packed, run(mixer(num_kv_heads=2), x, documents(19)), atol=1e-12)


def test_training_drops_by_head_and_the_same_for_the_same_sample() -> None:
    module = mixer(pattern="qk", drop=0.5)
    with torch.no_grad():
        module.output.weight.copy_(torch.eye(DIM))
    x = torch.randn(20, 2, DIM, dtype=torch.float64)
    found = run(module, x, training=True)
    zero = (found.unflatten(-1, (4, -1)) == 0).all(-1)  # [length, batch, heads]
    assert (zero.sum(0) >= 10).all() and (zero.sum(0) <= 14).all()  # the dropped, and those left without keys
    assert not torch.equal(zero[..., 0], zero[..., 1]) and not torch.equal(zero[:, 0], zero[:, 1])
    assert torch.equal(run(module, x, training=True), found)
    assert not (run(module, x).unflatten(-1, (4, -1)) == 0).all(-1).any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_future_changes_nothing(name: str, packed: bool, training: bool) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(19, 2, DIM, dtype=torch.float64)
    ids = documents(19) if packed else None
    before = run(module, x, ids, training)
    for cut in (1, 6, 13, 18):
        changed = x.clone()
        changed[cut:] = torch.randn(19 - cut, 2, DIM)
        after = run(module, changed, ids, training)
        assert torch.allclose(before[:cut], after[:cut], atol=1e-12)  # a hash sorts, and adds, in another order
        assert not torch.allclose(before[cut:], after[cut:], atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_do_not_see_each_other(name: str, training: bool) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(19, 2, DIM, dtype=torch.float64)
    whole = run(module, x, documents(19), training)
    changed = x.clone()
    changed[:7, 0] += 1.0  # the first document of the first sample
    changed[:6, 1] += 1.0  # and of the second
    after = run(module, changed, documents(19), training)
    assert torch.allclose(after[7:, 0], whole[7:, 0], atol=1e-12)
    assert torch.allclose(after[6:, 1], whole[6:, 1], atol=1e-12)
    one = torch.zeros(2, 19, dtype=torch.long)
    assert torch.allclose(run(module, x, one, training), run(module, x, None, training), atol=1e-12)


@pytest.mark.parametrize("name", ["window", "window-global", "full", "hash"])
def test_equality_packed_documents_are_documents_alone(name: str) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(19, 1, DIM, dtype=torch.float64)
    ids = (torch.arange(19) >= 8).long()[None]
    packed = module(x, Context(torch.arange(19), ids))[0]
    parts = [module(x[place], Context(torch.arange(19)[place]))[0] for place in (slice(8), slice(8, 19))]
    assert torch.allclose(packed, torch.cat(parts), atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 11, [4, 7], [6, 1, 2, 2], [11]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equality_decode_is_forward(name: str, chunks: list[int]) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(11, 3, DIM, dtype=torch.float64)
    state, parts, start = module.init_state(3, 14, x.device, x.dtype), [], 0
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, Context(torch.arange(start, start + len(chunk))), state)
            parts.append(part)
            start += len(chunk)
    assert all(len(tensor) == 3 for tensor in state.values())
    assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_equality_recompute_changes_nothing(name: str, training: bool) -> None:
    module, x = mixer(**CONFIGS[name]), torch.randn(9, 2, DIM, dtype=torch.float64)
    noise = Noise(3, torch.arange(2), 9) if training else None
    contexts = [Context(torch.arange(9), documents(9), noise=noise, recompute=r) for r in ("none", "selective")]
    outputs = [module(x, context)[0] for context in contexts]
    assert torch.equal(*outputs)
    parameters = list(module.parameters())
    plain, again = (torch.autograd.grad(y.square().sum(), parameters) for y in outputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["window-global-stride", "full", "qk"])
def test_bfloat16_is_within_rounding(name: str) -> None:
    exact, x = mixer(**CONFIGS[name]), torch.randn(40, 2, DIM, dtype=torch.bfloat16)
    module = mixer(torch.bfloat16, **CONFIGS[name])
    found, wanted = run(module, x, training=True), run(exact, x.double(), training=True)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_bfloat16_buckets_are_those_of_the_rounded_queries() -> None:
    x, rotation = torch.randn(1, 2, 40, 8).bfloat16(), torch.randn(2, 8, 2)
    assert torch.equal(hash_buckets(x, rotation), hash_buckets(x.float(), rotation))


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_counts_the_parameters_and_the_pairs(name: str) -> None:
    module = mixer(**CONFIGS[name])
    config, length = module.config, 23
    cost = config.cost(DIM, length)
    assert cost.params == cost.active_params == sum(p.numel() for p in module.parameters())
    if config.pattern == "band":
        mask = band(length, config.window, config.num_global, config.stride).mask(length, config.block_size)
        assert config.visible(length) == pytest.approx(float(mask.sum() / length))
    matrices = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    assert cost.forward_flops >= 2 * matrices + 4 * DIM * config.visible(length)


def test_tiles_of_one_pattern_are_listed_once() -> None:
    config = mixer(window=5).config
    assert band_tiles(config, 24, torch.device("cpu")) is band_tiles(config, 24, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_buckets": 4}, "num_buckets 4 has no effect with pattern 'band'; set pattern: hash"),
        ({"pattern": "hash", "num_buckets": 4, "window": 8}, "window 8 has no effect with pattern 'hash'"),
        ({"hash_seed": 0}, "hash_seed 0 has no effect with pattern 'band'; set pattern: hash"),
        ({"num_global": 4}, "num_global 4 has no effect without a window; set window"),
        ({"pattern": "hash"}, "pattern 'hash' needs num_buckets; set num_buckets: 16"),
        ({"pattern": "hash", "num_buckets": 5}, "num_buckets 5 is odd.* choose 6"),
        ({"pattern": "hash", "num_buckets": 4, "num_kv_heads": 2}, "num_kv_heads 2 is not num_heads 4"),
        ({"pattern": "qk"}, "pattern 'qk' needs drop"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
    ],
)
def test_config_names_field_value_and_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(BlockSparseConfig, {"num_heads": 4} | changes)


def test_degrees_that_do_not_divide_the_heads_are_named() -> None:
    config = BlockSparseConfig(num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="num_kv_heads 2 cannot be split over parallel.tensor 4"):
        config.check_tensor_parallel(4)
    with pytest.raises(ValueError, match="num_kv_heads 2 cannot be split over parallel.tensor 2 x parallel.ulysses 2"):
        config.check_ulysses(2, 2)
    with pytest.raises(ValueError, match="dim 20 does not divide into num_heads 4 heads of even width"):
        config.cost(20, 8)
