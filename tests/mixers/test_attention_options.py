"""The options of attention: each against its formula pair by pair, and the promises all of them keep."""

from typing import Any

import pytest
import torch
from attention_cases import (
    DIM,
    ENCODERS,
    LENGTH,
    NO_TURN,
    OPTIONS,
    all_options,
    by_pairs,
    causal_options,
    decode,
    documents,
    inputs,
    mixer,
    run,
    sees,
)
from torch import Tensor

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.nn import attention as blocks
from lightbulb.nn.attention import self_attention
from lightbulb.nn.attention_mask import Rule, Tokens, Visibility
from lightbulb.nn.parameter import Init, initialise
from lightbulb.nn.scores import inverse_temperature, scored_attention, softmax_with_sink


@all_options
@pytest.mark.parametrize("packed", [False, True])
def test_equality_with_the_formula_pair_by_pair(options: dict[str, Any], packed: bool) -> None:
    module, x, ids = mixer(options), inputs(), documents() if packed else None
    found, wanted = run(module, x, document_ids=ids), by_pairs(module, x, ids)
    tolerance = 1e-10 if module.config.rope_theta is None else 1e-6  # angles are float32
    assert (found - wanted).abs().max() < tolerance
    module.train()  # temperatures have no gradient of their own in the formula above
    parameters, grad = [x, *module.parameters()], torch.randn_like(wanted)
    found, wanted = run(module, x, document_ids=ids), by_pairs(module, x, ids)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters, grad), torch.autograd.grad(wanted, parameters, grad), strict=True
    ):
        assert (ours - theirs).abs().max() < 20 * tolerance


@all_options
def test_gradients_are_those_of_the_result(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs(4, 1)
    assert torch.autograd.gradcheck(lambda x: run(module, x), (x,))


# --- promises of every option


@causal_options
def test_the_future_changes_nothing(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs().detach()
    changed = x.clone()
    changed[6:] += 1.0
    before, after = run(module, x), run(module, changed)
    assert torch.allclose(before[:6], after[:6], atol=1e-13)
    assert not torch.allclose(before[6:], after[6:])


@all_options
def test_packed_documents_are_as_if_alone(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs().detach()
    whole = run(module, x, document_ids=documents())
    for sample, (first, last) in ((0, (0, 4)), (0, (4, 8)), (0, (8, 9)), (1, (0, 7)), (1, (7, 9))):
        alone = run(module, x[first:last, sample : sample + 1])
        assert (whole[first:last, sample : sample + 1] - alone).abs().max() < 1e-6


@causal_options
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [6, 1, 2], [9]], ids=str)
def test_equality_decode_is_forward(options: dict[str, Any], chunks: list[int]) -> None:
    module, x = mixer(options), inputs(batch=3).detach()
    found = decode(module, x, chunks, lambda first, last: Context(torch.arange(first, last)))
    assert (found - run(module, x)).abs().max() < 1e-10


@all_options
def test_bfloat16_is_within_rounding(options: dict[str, Any]) -> None:
    lower = mixer(options, torch.bfloat16)
    exact = mixer(options)
    exact.load_state_dict(lower.state_dict())
    x = inputs().detach().bfloat16()
    found, wanted = run(lower, x), run(exact, x.double())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 3e-2 * wanted.norm()


@all_options
def test_selective_recompute_changes_nothing(options: dict[str, Any]) -> None:
    module, x = mixer(options).train(), inputs()
    parameters = [x, *module.parameters()]
    plain, again = (run(module, x, document_ids=documents(), recompute=how) for how in ("none", "selective"))
    assert torch.equal(plain, again)
    for ours, theirs in zip(
        torch.autograd.grad(plain.square().sum(), parameters),
        torch.autograd.grad(again.square().sum(), parameters),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@all_options
@pytest.mark.parametrize("length", [1, 4, 11])
def test_cost_counts_what_is_built_and_seen(options: dict[str, Any], length: int) -> None:
    module = mixer(options)
    config, cost = module.config, module.config.cost(DIM, length)
    assert cost.params == cost.active_params == sum(p.numel() for p in module.parameters())
    seen = sum(sees(config, n, m, 0) for n in range(length) for m in range(length)) / length
    assert config.rule.mean_seen(length) == pytest.approx(seen)
    plain = AttentionConfig(num_heads=4, num_kv_heads=2, causal=config.causal).cost(DIM, length)
    pairs = 4 * DIM * (seen - AttentionConfig(num_heads=4, causal=config.causal).rule.mean_seen(length))
    kv_heads, relative = config.kv_heads, 2 * (config.relative_positions or 0)
    projections = 2 * DIM * 4 * 2 * (kv_heads - 2)
    table = relative * (4 * DIM + 2 * DIM * 4 * (4 + kv_heads) / length)
    assert cost.forward_flops == pytest.approx(plain.forward_flops + pairs + projections + table)


# --- windows, sinks, blocks


@pytest.mark.parametrize("window", [LENGTH, LENGTH + 5])
@pytest.mark.parametrize("causal", [True, False])
def test_equality_window_of_everything_is_full(window: int, causal: bool) -> None:
    x = inputs()
    full, windowed = mixer({"causal": causal}), mixer({"causal": causal, "window": window})
    assert torch.equal(run(windowed, x), run(full, x))
    one = torch.zeros(2, LENGTH, dtype=torch.long)
    assert torch.allclose(run(windowed, x, document_ids=one), run(full, x), atol=1e-12)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("reach", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_equality_blocks_are_dense(
    length: int, causal: bool, reach: int | None, sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_ROWS", 3)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, length, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
    seen = Visibility(Rule(causal, reach), *[Tokens(torch.arange(length)[None], torch.arange(length)[None])] * 2)
    given = [t for t in (query, key, value, logits) if t is not None]

    def ours(*_: Tensor) -> Tensor:
        return self_attention(query, key, value, None if reach is None else seen, causal, reach, logits)

    dense = scored_attention(query, key, value, seen.dense(), sink=logits)
    assert (ours() - dense).abs().max() < 1e-12
    grad = torch.randn_like(dense)
    for a, b in zip(torch.autograd.grad(ours(), given, grad), torch.autograd.grad(dense, given, grad), strict=True):
        assert (a - b).abs().max() < 1e-11


def test_blocks_touch_only_the_keys_of_the_window() -> None:
    spans = blocks._spans(4096, True, 128)
    assert max(seen.stop - seen.start for _, seen in spans) == blocks._ROWS + 127
    assert blocks._spans(100, True, None) == [(slice(0, 64), slice(0, 64)), (slice(64, 100), slice(0, 100))]


@pytest.mark.parametrize("learned", [False, True])
def test_equality_sink_is_an_extra_key_with_value_zero(learned: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    sink = torch.tensor([0.7, -1.3], dtype=torch.float64) if learned else torch.zeros(2, dtype=torch.float64)
    # One more feature that is 1 for queries and the sink's logit for the extra key.
    wide = torch.cat((query, query.new_ones(2, 2, 6, 1)), -1)
    extra = torch.cat((key.new_zeros(2, 2, 1, 4), sink.view(1, 2, 1, 1).expand(2, 2, 1, 1) * 2), -1)
    keys = torch.cat((torch.cat((key, key.new_zeros(2, 2, 6, 1)), -1), extra), 2)
    values = torch.cat((value, value.new_zeros(2, 2, 1, 4)), 2)
    mask = torch.cat((torch.ones(6, 6).tril().bool(), torch.ones(6, 1).bool()), 1)
    wanted = torch.nn.functional.scaled_dot_product_attention(wide, keys, values, mask, scale=0.5)
    assert torch.allclose(self_attention(query, key, value, sink=sink), wanted, atol=1e-12)
    causal = torch.ones(1, 1, 6, 6).tril().bool()
    assert torch.allclose(scored_attention(query, key, value, causal, sink=sink), wanted, atol=1e-12)


def test_softmax1_may_attend_to_nothing_and_is_plain_where_scores_are_large() -> None:
    scores = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    zero, every = torch.zeros(2, dtype=torch.float64), torch.ones(3, 5).bool()
    weights = softmax_with_sink(scores, every, zero)
    assert torch.allclose(weights, scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)), atol=1e-14)
    assert torch.all(weights.sum(-1) < 1)
    assert softmax_with_sink(scores - 800, every, zero).abs().max() < 1e-300
    assert torch.allclose(softmax_with_sink(scores + 800, every, zero), scores.softmax(-1), atol=1e-14)


# --- LM-Infinite


@pytest.mark.parametrize("max_distance", [LENGTH, LENGTH + 3])
def test_equality_lambda_within_the_trained_length_is_base(max_distance: int) -> None:
    x = inputs()
    stretched = mixer({"max_distance": max_distance, "num_global": 2})
    assert torch.equal(run(stretched, x), run(mixer({}), x))
    one = torch.zeros(2, LENGTH, dtype=torch.long)
    assert torch.allclose(run(stretched, x, document_ids=one), run(mixer({}), x), atol=1e-12)


def test_equality_lambda_without_global_tokens_is_a_window() -> None:
    x = inputs()
    assert torch.equal(run(mixer({"max_distance": 4}), x), run(mixer({"window": 4}), x))
    clamped = mixer(NO_TURN | {"max_distance": 4, "num_global": 2})
    assert not torch.allclose(run(clamped, x), run(mixer(NO_TURN | {"window": 4}), x))


def test_far_global_tokens_all_seem_equally_far() -> None:
    module, x = mixer({"max_distance": 3, "num_global": 3, "sink": "none"}), inputs(30, 1).detach()
    x[:2] = x[0]  # two equal global tokens at different distances
    x[29] = x[20]  # and two equal queries, which see equal windows
    x[27:29] = x[18:20]
    found = run(module, x)
    assert torch.allclose(found[29], found[20], atol=1e-6)
    assert not torch.allclose(run(mixer({}), x)[29], run(mixer({}), x)[20], atol=1e-3)


# --- disentangled scores


@pytest.mark.parametrize("causal", [True, False])
def test_equality_zero_table_is_content_only(causal: bool) -> None:
    x = inputs()
    module = mixer(NO_TURN | {"causal": causal, "relative_positions": 3})
    content = mixer(NO_TURN | {"causal": causal})
    torch.nn.init.zeros_(module.relative)
    with torch.no_grad():
        content.query_norm.weight.div_(3**0.5)
    assert (run(module, x) - run(content, x)).abs().max() < 1e-12


def test_relative_positions_past_the_longest_distance_are_not_used() -> None:
    module, x = mixer(NO_TURN | {"relative_positions": 6, "max_distance": 3, "num_global": 1}), inputs()
    (grad,) = torch.autograd.grad(run(module, x).square().sum(), module.relative)
    used = (grad != 0).any(1).nonzero()[:, 0] - 6
    assert used.tolist() == [-3, -2, -1, 0, 1, 2, 3]


@pytest.mark.parametrize("options", [*OPTIONS.values(), *ENCODERS.values()], ids=[*OPTIONS, *ENCODERS])
def test_moving_the_sequence_changes_nothing(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs()
    found = run(module, x, positions=torch.arange(LENGTH) + 11, document_ids=documents())
    assert (found - run(module, x, document_ids=documents())).abs().max() < 1e-5  # angles are float32


# --- adaptive temperature


def test_temperature_of_sharp_rows_is_one_and_entropy_never_rises() -> None:
    torch.manual_seed(0)
    spread = torch.linspace(0.01, 8, 60, dtype=torch.float64)[:, None]
    for keys in (2, 7, 60, 4000):
        scores = spread * torch.randn(60, keys, dtype=torch.float64)
        before = scores.softmax(-1)
        after = (scores * inverse_temperature(before)).softmax(-1)
        entropies = [-(p * (p + 1e-300).log()).sum(-1) for p in (before, after)]
        sharp = entropies[0] < 0.5
        assert torch.equal(after[sharp], before[sharp])
        assert torch.all(entropies[1] <= entropies[0] + 1e-12)
        assert torch.all(after.gather(-1, scores.argsort(-1)).diff(dim=-1) >= 0)
    assert inverse_temperature(torch.full((1, 4000), 1 / 4000)).item() > 2  # entropy 8.3: bounded, not back at 1


@pytest.mark.parametrize(("entropy", "factor"), [(1.0, 1.27), (1.5, 1.85), (2.0, 2.10), (3.0, 2.25), (4.0, 2.39)])
def test_temperature_has_the_published_values(entropy: float, factor: float) -> None:
    low, high = 0.0, 1e4
    for _ in range(80):  # bisect for weights with this entropy
        middle = (low + high) / 2
        weights = (torch.linspace(0, 1, 200, dtype=torch.float64) * middle).softmax(0)
        low, high = (middle, high) if -(weights * (weights + 1e-9).log()).sum() > entropy else (low, middle)
    assert inverse_temperature(weights).item() == pytest.approx(factor, abs=0.006)


def test_temperature_is_for_evaluation() -> None:
    x, module = inputs(), mixer({"adaptive_temperature": True})
    plain = run(mixer({}), x)
    assert not torch.allclose(run(module, x), plain, atol=1e-3)
    assert torch.equal(run(module.train(), x), plain)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_global": 2}, "num_global 2 has no effect without max_distance"),
        ({"qk_norm_over": "all_heads"}, "qk_norm_over 'all_heads' has no effect without qk_norm; set qk_norm: true"),
        ({"max_distance": 4, "window": 4}, "max_distance 4 is a window too, next to window 4; keep one"),
        ({"max_distance": 4, "causal": False}, "max_distance 4 needs causal: true"),
        ({"relative_positions": 4}, "relative_positions 4 take the place of the rotation; set rope_theta: null"),
        ({"backend": "flash", "sink": "one"}, "backend 'flash' has no kernel for sink 'one'; set backend: auto"),
        ({"backend": "flex", "adaptive_temperature": True}, "backend 'flex' has no kernel for adaptive_temperature"),
        ({"backend": "flex", "max_distance": 4, "num_global": 1}, "backend 'flex' has no kernel for num_global 1"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(AttentionConfig, {"num_heads": 4} | options)


def test_only_rotated_heads_need_an_even_width() -> None:
    with pytest.raises(ValueError, match="dim 12 .* 4 heads of even width; .* multiple of 8"):
        AttentionConfig(num_heads=4).cost(12, 8)
    with pytest.raises(ValueError, match="dim 14 .* 4 heads of equal width; .* multiple of 4"):
        AttentionConfig(num_heads=4, rope_theta=None).cost(14, 8)
    module = AttentionConfig(num_heads=4, rope_theta=None).build(12, 8, Init(0.4, 0.4))
    initialise(module, 0)
    x = torch.randn(5, 1, 12)
    assert torch.allclose(run(module, x), by_pairs(module, x), atol=1e-5)


def test_an_encoder_has_nothing_to_decode() -> None:
    with pytest.raises(ValueError, match="causal: false has nothing to decode.*set causal: true"):
        mixer({"causal": False}).init_state(1, 4, torch.device("cpu"), torch.float32)


def test_gaps_need_a_kernel_that_takes_them() -> None:
    AttentionConfig(num_heads=4).check_gaps()
    with pytest.raises(ValueError, match="backend 'flash' takes no positions per sample; set backend: auto"):
        AttentionConfig(num_heads=4, backend="flash").check_gaps()
