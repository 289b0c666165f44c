"""Infini-attention against its formulas token by token in float64, and its promises."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.mixers.token.infini import Infini, InfiniConfig, infini_attention
from lightbulb.nn.compressive_memory import delta_memories, features, linear_memories, read, resets, write
from lightbulb.nn.documents import run_starts
from lightbulb.nn.parameter import Init, initialise

DIM = 16
UPDATES = ["linear", "delta"]


def documents(length: int) -> Tensor:
    """``[2, length]``: several documents in one segment, and one over several segments."""
    positions = torch.arange(length)
    return torch.stack([sum((positions >= start).long() for start in starts) for starts in ((2, 3, 10), (8,))])


def heads(length: int, num_heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """Queries, keys and values, then queries and keys for the segment."""
    torch.manual_seed(0)
    counts = num_heads, kv_heads, kv_heads, num_heads, kv_heads
    return [torch.randn(2, n, length, 6, dtype=torch.float64, requires_grad=True) for n in counts]


def gates(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None].requires_grad_()


def naive(parts: list[Tensor], gate: Tensor, ids: Tensor | None, segment: int, update: str) -> Tensor:
    """One sample, head, segment and token after the other."""
    query, key, value, turned_query, turned_key = parts
    batch, num_heads, length, width = query.shape
    group = num_heads // key.shape[1]
    rows = []
    for b in range(batch):
        names = [0] * length if ids is None else ids[b].tolist()
        for h in range(num_heads):
            inputs = (turned_query[b, h], turned_key[b, h // group], value[b, h // group])
            local = naive_local(*inputs, names, segment)
            memory = naive_memory(query[b, h], key[b, h // group], value[b, h // group], names, segment, update)
            rows.append(gate[h, 0] * memory + (1 - gate[h, 0]) * local)
    return torch.stack(rows).view(batch, num_heads, length, width)


def naive_local(query: Tensor, key: Tensor, value: Tensor, names: list[int], segment: int) -> Tensor:
    found = []
    for t in range(len(query)):
        seen = [u for u in range(t - t % segment, t + 1) if names[u] == names[t]]
        found.append(((key[seen] @ query[t]) / query.shape[1] ** 0.5).softmax(0) @ value[seen])
    return torch.stack(found)


def naive_memory(query: Tensor, key: Tensor, value: Tensor, names: list[int], segment: int, update: str) -> Tensor:
    width = query.shape[1]
    matrix, total, owner = query.new_zeros(width, width), query.new_zeros(width), None
    found: list[Tensor] = []
    for first in range(0, len(query), segment):
        here = range(first, min(first + segment, len(query)))
        for t in here:  # read, then write
            f = elu(query[t]) + 1
            found.append(f @ matrix / (f @ total) if names[t] == owner else torch.zeros_like(query[t]))
        if names[here[-1]] != owner:
            matrix, total, owner = torch.zeros_like(matrix), torch.zeros_like(total), names[here[-1]]
        old, old_total = matrix, total
        for t in (t for t in here if names[t] == owner):
            f, new = elu(key[t]) + 1, value[t]
            if update == "delta" and old_total.any():
                new = new - f @ old / (f @ old_total)
            matrix, total = matrix + torch.outer(f, new), total + f
    return torch.stack(found)


def assert_same(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    assert torch.allclose(found, wanted, atol=1e-10)
    grad = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, inputs, grad, materialize_grads=True) for y in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("segment", [1, 3, 4, 13, 20])
def test_equality_segments_at_once_are_token_by_token(segment: int, update: str, packed: bool) -> None:
    parts, gate = heads(13), gates(0.1, 0.4, 0.5, 0.9)
    ids = documents(13) if packed else None
    start = None if ids is None else run_starts(ids)
    found = infini_attention(*parts, gate, start, segment, update)
    assert_same(found, naive(parts, gate, ids, segment, update), [*parts, gate])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("update", UPDATES)
def test_equality_with_any_groups_of_heads(update: str, kv_heads: int) -> None:
    parts, gate = heads(9, 4, kv_heads), gates(0.1, 0.4, 0.5, 0.9)
    assert_same(infini_attention(*parts, gate, None, 4, update), naive(parts, gate, None, 4, update), [*parts, gate])


def test_equality_memory_is_normalised_linear_attention_over_all_earlier_segments() -> None:
    parts = heads(12, 2, 2)
    query, key, value = parts[:3]
    scores = (elu(query) + 1) @ (elu(key) + 1).transpose(2, 3)
    segment = torch.arange(12) // 4
    scores = scores * (segment[:, None] > segment)
    wanted = torch.nan_to_num(scores / scores.sum(-1, keepdim=True)) @ value
    found = infini_attention(*parts, gates(1, 1), None, 4, "linear")
    assert torch.allclose(found, wanted, atol=1e-10)
    assert (found[:, :, :4] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_equality_prefix_sums_are_one_segment_after_the_other(packed: bool) -> None:
    keys, values = (features(t).unflatten(2, (-1, 4)) for t in heads(24, 2, 2)[1:3])
    reset = resets(run_starts(documents(24)), 4) if packed else None
    memory, memories = torch.zeros(2, 2, 6, 7, dtype=torch.float64), []
    for s in range(6):
        memories.append(memory)
        here = keys[:, :, s]
        if reset is not None:
            memory = memory * reset.keeps[:, None, s, None, None]
            here = here * reset.writes[:, None, s, :, None]
        memory = memory + write(here, values[:, :, s], None)
    found = linear_memories(keys, values, reset)
    if reset is not None:  # a memory that no token reads may hold anything
        read_at_all = reset.reads.any(-1)[:, None, :, None, None]
        found, memories = found * read_at_all, [m * read_at_all[:, :, s] for s, m in enumerate(memories)]
    assert torch.allclose(found, torch.stack(memories, 2), atol=1e-10)


def test_delta_compares_with_the_memory_before_the_segment() -> None:
    keys, values = (features(t).unflatten(2, (-1, 4)) for t in heads(12, 2, 2)[1:3])
    memories = delta_memories(keys, values, None)
    assert torch.allclose(memories[:, :, 1], linear_memories(keys, values, None)[:, :, 1], atol=1e-12)
    k, v, old = keys[:, :, 1], values[:, :, 1], memories[:, :, 1]
    together = old[..., :-1] + k.transpose(2, 3) @ (v - read(k, old))
    assert torch.allclose(memories[:, :, 2, :, :-1], together, atol=1e-10)
    one_by_one = old
    for t in range(4):
        one_by_one = one_by_one + write(k[:, :, t : t + 1], v[:, :, t : t + 1], one_by_one)
    assert not torch.allclose(memories[:, :, 2], one_by_one, atol=1e-3)


def test_delta_writes_nothing_that_the_memory_gives_already() -> None:
    key, value = features(torch.randn(1, 6, dtype=torch.float64)), torch.randn(1, 6, dtype=torch.float64)
    once = write(key, value, torch.zeros(6, 7, dtype=torch.float64))
    again = write(key, value, once)
    assert torch.allclose(again[:, :-1], torch.zeros(6, 6, dtype=torch.float64), atol=1e-12)


def mixer(dtype: torch.dtype = torch.float64, gate: float | None = None, **changes: object) -> Infini:
    config = InfiniConfig.model_validate({"num_heads": 4, "num_kv_heads": 2, "segment_length": 4} | changes)
    module = config.build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    with torch.no_grad():
        module.gate.copy_(torch.tensor([-1.0, 0.5, 2.0, 0.0]) if gate is None else torch.full((4,), gate))
    return module.to(dtype)


def run(module: Infini, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


def attention_of(module: Infini) -> torch.nn.Module:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2).build(DIM, 64, Init(1, 1)).to(module.gate.dtype)
    attention.load_state_dict({name: p for name, p in module.state_dict().items() if name != "gate"})
    return attention


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("segment", [9, 50])
def test_equality_one_segment_is_attention_times_the_rest_of_the_gate(segment: int, update: str) -> None:
    module = mixer(gate=0.75, segment_length=segment, update=update)
    x = torch.randn(9, 2, DIM, dtype=torch.float64)
    plain = attention_of(module)(x, Context(torch.arange(9)))[0]
    assert torch.allclose(run(module, x), plain / (1 + math.exp(0.75)), atol=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_equality_closed_gate_is_attention_inside_segments(update: str) -> None:
    module, x = mixer(gate=-800.0, update=update), torch.randn(11, 2, DIM, dtype=torch.float64)
    attention = attention_of(module)
    places = [slice(at, min(at + 4, 11)) for at in range(0, 11, 4)]
    wanted = torch.cat([attention(x[place], Context(torch.arange(11)[place]))[0] for place in places])
    assert torch.allclose(run(module, x), wanted, atol=1e-12)


def test_gates_start_in_the_middle() -> None:
    module = InfiniConfig(num_heads=4, segment_length=4).build(DIM, 64, Init(1, 1))
    initialise(module, 0)
    assert module.gate.shape == (4,) and (module.gate == 0).all()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("chunks", [[1] * 14, [4, 4, 4, 2], [5, 1, 1, 7], [3, 11], [14]], ids=str)
def test_equality_streaming_is_forward_at_every_position(chunks: list[int], update: str) -> None:
    module, x = mixer(update=update), torch.randn(14, 3, DIM, dtype=torch.float64)
    state, parts, start = module.init_state(3, 20, x.device, x.dtype), [], 0
    shapes = {name: tensor.shape for name, tensor in state.items()}
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, Context(torch.arange(start, start + len(chunk))), state)
            parts.append(part)
            start += len(chunk)
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert all(shape[0] == 3 for shape in shapes.values())
    assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


def test_the_state_does_not_grow_with_the_sequence() -> None:
    sizes = [
        sum(t.numel() for t in mixer().init_state(1, length, torch.device("cpu"), torch.float32).values())
        for length in (4, 4000)
    ]
    assert sizes[0] == sizes[1]


def test_a_state_given_with_gradients_is_left_alone() -> None:
    module, x = mixer(), torch.randn(6, 2, DIM, dtype=torch.float64)
    state = module.init_state(2, 8, x.device, x.dtype)
    module(x, Context(torch.arange(6)), state)
    assert all((tensor == 0).all() for tensor in state.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_the_future_changes_nothing(update: str, packed: bool) -> None:
    module, x = mixer(update=update), torch.randn(14, 2, DIM, dtype=torch.float64)
    ids = documents(14) if packed else None
    before = run(module, x, ids)
    for cut in range(1, 14):
        changed = x.clone()
        changed[cut:] += 1.0
        after = run(module, changed, ids)
        assert torch.equal(before[:cut], after[:cut])
        assert not torch.allclose(before[cut], after[cut])


@pytest.mark.parametrize("update", UPDATES)
def test_the_memory_is_read_before_it_is_written(update: str) -> None:
    module, x = mixer(gate=800.0, update=update), torch.randn(12, 2, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[4] += 1.0  # the first token of the second segment
    before, after = run(module, x), run(module, changed)
    assert torch.equal(before[5:8], after[5:8])
    assert not torch.allclose(before[8:], after[8:])


@pytest.mark.parametrize("segment", [3, 4, 5])
@pytest.mark.parametrize("update", UPDATES)
def test_documents_do_not_see_each_other(update: str, segment: int) -> None:
    module, x = mixer(update=update, segment_length=segment), torch.randn(14, 2, DIM, dtype=torch.float64)
    ids = documents(14)
    whole = run(module, x, ids)
    for document in range(4):
        changed = x + (ids == document).t()[..., None]
        after = run(module, changed, ids)
        other = (ids != document).t()
        assert torch.equal(after[other], whole[other])
        assert not torch.allclose(after[~other], whole[~other])
    one = torch.zeros(2, 14, dtype=torch.long)
    assert torch.allclose(run(module, x, one), run(module, x), atol=1e-12)


def test_equality_a_document_from_a_segments_start_is_the_document_alone() -> None:
    module, x = mixer(), torch.randn(14, 1, DIM, dtype=torch.float64)
    packed = run(module, x, (torch.arange(14) >= 8).long()[None])
    alone = module(x[8:], Context(torch.arange(8, 14)))[0]
    assert torch.allclose(packed, torch.cat((run(module, x[:8]), alone)), atol=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_through_an_empty_memory_are_finite(update: str) -> None:
    module, x = mixer(torch.float32, update=update), torch.randn(10, 2, DIM, requires_grad=True)
    ids = documents(10)
    (1e6 * run(module, x, ids).sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))
    assert module.gate.grad.abs().min() > 0


@pytest.mark.parametrize("update", UPDATES)
def test_equality_recompute_changes_nothing(update: str) -> None:
    module, x = mixer(update=update), torch.randn(9, 2, DIM, dtype=torch.float64)
    contexts = [Context(torch.arange(9), documents(9), recompute=mode) for mode in ("none", "selective")]
    outputs = [module(x, context)[0] for context in contexts]
    assert torch.equal(*outputs)
    plain, again = (torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in outputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("update", UPDATES)
def test_bfloat16_is_within_rounding_and_its_memory_is_float32(update: str) -> None:
    exact, module = mixer(update=update), mixer(torch.bfloat16, update=update)
    x = torch.randn(40, 2, DIM, dtype=torch.bfloat16)
    found, wanted = run(module, x), run(exact, x.double())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert module.init_state(2, 8, x.device, x.dtype)["memory"].dtype == torch.float32


@pytest.mark.parametrize("update", UPDATES)
def test_cost_counts_the_parameters_and_the_pairs(update: str) -> None:
    module = mixer(update=update)
    cost = module.config.cost(DIM, 10)
    assert cost.params == cost.active_params == sum(p.numel() for p in module.parameters())
    matrices = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    pairs = 2 * 10 + 3  # segments of 4, 4 and 2
    tables = 4 + (4 if update == "delta" else 2)  # 4 heads read, 2 write, which with the delta rule also read
    assert cost.forward_flops == pytest.approx(2 * matrices + 4 * DIM * pairs / 10 + tables * 2 * 4 * 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "segment_length"),
        ({"segment_length": 0}, "segment_length.*got 0"),
        ({"segment_length": 4, "update": "sum"}, "update.*'linear' or 'delta'"),
        ({"segment_length": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_config_names_field_and_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(InfiniConfig, {"num_heads": 4} | changes)
