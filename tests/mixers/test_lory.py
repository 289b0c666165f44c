"""Lory against dense layers and a naive twin, and its promises about segments, documents, causality and decoding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lightbulb.config import ConfigError, build_config
from lightbulb.kernels.experts import merged as kernel
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.lory import Lory, LoryConfig
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import SwitchConfig
from lightbulb.models.language import Degrees, LanguageConfig
from lightbulb.nn import merged
from lightbulb.nn.linear import Adapter, Quantizer
from lightbulb.nn.merged import MergedLinear, merged_linear
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN, EXPERTS, SEGMENT, LENGTH, BATCH = 6, 10, 3, 4, 14, 2
MATRICES = ("gate", "up", "down")


def lory(dtype: torch.dtype = torch.float64, **changes: Any) -> Lory:
    values = {"num_experts": EXPERTS, "hidden_dim": HIDDEN, "segment_length": SEGMENT} | changes
    module = LoryConfig.model_validate(values).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module.to(dtype)


def draw(length: int = LENGTH, batch: int = BATCH, seed: int = 1) -> Tensor:
    return torch.randn(length, batch, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def documents() -> Tensor:
    """``[BATCH, LENGTH]``: in the first sample documents inside and across segments, in the second one long one."""
    return torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4], [7] * 13 + [8]])


def run(module: Lory, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


def swiglu_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def naive_shares(module: Lory, tokens: list[Tensor], ids: list[int]) -> list[Tensor]:
    """Routing of each token of one sample, by the definition."""
    length, shares = module.config.segment_length, []
    for t in range(len(tokens)):
        segment = t // length
        mine = [x for s, x in enumerate(tokens) if s // length == segment and ids[s] == ids[t]]
        before = [x for s, x in enumerate(tokens) if s // length == segment - 1 and ids[s] == ids[t]]
        if before:
            shares.append((module.router @ torch.stack(before).mean(0)).softmax(-1))
        elif module.config.first_segment == "uniform":
            shares.append(torch.full_like(module.router[:, 0], 1 / len(module.router)))
        else:
            shares.append((module.router @ torch.stack(mine).mean(0)).softmax(-1).detach())
    return shares


def naive(module: Lory, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """Token by token, every token with merged matrices of its own."""
    ids = torch.zeros(x.shape[1], len(x)) if ids is None else ids
    samples = []
    for sample, own in zip(x.unbind(1), ids.tolist(), strict=True):
        tokens = list(sample.unbind(0))
        rows = []
        for token, e in zip(tokens, naive_shares(module, tokens, own), strict=True):
            matrices = [torch.einsum("e,eoi->oi", e, getattr(module, name).weight) for name in MATRICES]
            rows.append(swiglu_ffn(token, *matrices))
        samples.append(torch.stack(rows))
    return torch.stack(samples, 1)


@pytest.mark.parametrize("first_segment", ["own_mean", "uniform"])
@pytest.mark.parametrize("ids", [None, documents()], ids=["plain", "documents"])
@pytest.mark.parametrize("few_at_a_time", [False, True])
def test_equality_values_and_gradients_of_a_naive_twin(
    ids: Tensor | None, first_segment: str, few_at_a_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if few_at_a_time:
        monkeypatch.setattr(kernel, "_NARROWEST", 2)  # hidden features
        monkeypatch.setattr(kernel, "CPU_NUMBERS", 1)
    module, x = lory(first_segment=first_segment), draw().requires_grad_()
    found, wanted = run(module, x, ids), naive(module, x, ids)
    assert torch.allclose(found, wanted, atol=1e-12)
    grad, inputs = torch.randn_like(wanted), [x, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        assert theirs.any() and torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("blocks", [[slice(0, 4)], [slice(0, 3), slice(3, 4)]], ids=len)
@pytest.mark.parametrize("counts", [[2, 3, 5], [5, 5]], ids=str)
def test_equality_merged_product_passes_gradcheck(
    counts: list[int], blocks: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_slices", lambda *_: blocks)
    torch.manual_seed(0)
    shapes = (10, 3), (len(counts), 2), (2, 4, 3)
    inputs = [torch.randn(*shape).double().requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: merged_linear(*t, counts), inputs)


def dense_twin(module: Lory, weights: Tensor) -> Tensor:
    """``weights [E]`` to the dense layer of that mean of the experts, on ``draw()``."""
    dense = MLPConfig(hidden_dim=HIDDEN).build(DIM, Init(0.5, 0.5)).double()
    with torch.no_grad():
        for name in MATRICES:
            mean = torch.einsum("e,eoi->oi", weights, getattr(module, name).weight)
            getattr(dense, name).weight.copy_(mean)
    return dense(draw(), Context(torch.arange(LENGTH)))[0]


@pytest.mark.parametrize("first_segment", ["own_mean", "uniform"])
def test_equality_one_expert_is_dense(first_segment: str) -> None:
    module = lory(num_experts=1, first_segment=first_segment)
    assert torch.allclose(run(module, draw(), documents()), dense_twin(module, torch.ones(1).double()), atol=1e-12)


def with_identical_experts() -> Lory:
    module = lory()
    with torch.no_grad():
        for name in MATRICES:
            weight = getattr(module, name).weight
            weight.copy_(weight[:1].expand_as(weight))
    return module


def test_equality_identical_experts_are_dense_and_give_the_router_no_gradient() -> None:
    module = with_identical_experts()
    found = run(module, draw(), documents())
    assert torch.allclose(found, dense_twin(module, torch.tensor([1.0, 0.0, 0.0]).double()), atol=1e-12)
    (grad,) = torch.autograd.grad((found**2).sum(), module.router)
    assert grad.abs().max() < 1e-10


def test_equality_one_hot_shares_are_that_expert() -> None:
    module, x = lory(), draw()
    with torch.no_grad():
        x[..., 0] = 1.0
        module.router.zero_()[1, 0] = 2000.0
    hot = swiglu_ffn(x, *(getattr(module, name).weight[1] for name in MATRICES))
    assert torch.allclose(run(module, x), hot, atol=1e-12)


def test_equality_merged_matrix_is_a_mixture_of_products_but_not_of_outputs() -> None:
    module, x = lory(), draw(4, 1)[:, 0]
    shares = torch.tensor([[0.2, 0.5, 0.3]]).double()
    for part, inputs in ((module.gate, x), (module.down, torch.randn(4, HIDDEN).double())):
        mixture = sum(e * (inputs @ w.t()) for e, w in zip(shares[0], part.weight, strict=True))
        assert torch.allclose(part(inputs, shares, [4]), mixture, atol=1e-12)
    outputs = torch.stack([swiglu_ffn(x, *(getattr(module, n).weight[i] for n in MATRICES)) for i in range(3)])
    matrices = [getattr(module, name).merge(shares)[0] for name in MATRICES]
    assert not torch.allclose(swiglu_ffn(x, *matrices), torch.einsum("e,eto->to", shares[0], outputs), atol=1e-2)


def test_the_router_learns() -> None:
    module = lory()
    (grad,) = torch.autograd.grad((run(module, draw()) ** 2).sum(), module.router)
    assert grad.norm() > 1e-3


def test_the_first_piece_routes_without_gradient() -> None:
    module, x = lory(), draw(SEGMENT)
    (grad,) = torch.autograd.grad((run(module, x) ** 2).sum(), module.router)
    assert not grad.any()


@pytest.mark.parametrize("first_segment", ["own_mean", "uniform"])
def test_a_changed_token_reaches_no_earlier_segment_nor_the_routing_of_its_own(first_segment: str) -> None:
    module, x = lory(first_segment=first_segment), draw()
    before = run(module, x)
    for t in range(SEGMENT, LENGTH):
        changed = x.clone()
        changed[t] += 1.0
        others = torch.arange(LENGTH) != t
        own_segment_over = (t // SEGMENT + 1) * SEGMENT
        others[own_segment_over:] = False
        after = run(module, changed)
        assert torch.equal(after[others], before[others])
        following = slice(own_segment_over, own_segment_over + SEGMENT)
        assert own_segment_over >= LENGTH or not torch.allclose(after[following], before[following])


def test_uniform_is_causal_everywhere_and_own_mean_is_not_in_the_first_segment() -> None:
    x = draw()
    changed = x.clone()
    changed[2] += 1.0
    for first_segment, leaks in (("uniform", False), ("own_mean", True)):
        module = lory(first_segment=first_segment)
        assert torch.equal(run(module, changed)[:2], run(module, x)[:2]) != leaks


@pytest.mark.parametrize("first_segment", ["own_mean", "uniform"])
def test_documents_do_not_see_each_other(first_segment: str) -> None:
    module, x, ids = lory(first_segment=first_segment), draw(), documents()
    whole = run(module, x, ids)
    for sample, document in ((0, 0), (0, 1), (0, 2), (0, 4), (1, 7), (1, 8)):
        mine = (ids[sample] == document).nonzero()[:, 0]
        changed = x.clone()
        changed[mine, sample] += 1.0
        after = run(module, changed, ids)
        others = torch.ones(LENGTH, BATCH, dtype=torch.bool)
        others[mine, sample] = False
        assert torch.equal(after[others], whole[others])
    one = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    assert torch.equal(run(module, x, one), run(module, x))


def decode(module: Lory, x: Tensor, chunks: list[int]) -> Tensor:
    state, parts, start = module.init_state(x.shape[1], 32, x.device, x.dtype), [], 0
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, Context(torch.arange(start, start + len(chunk))), state)
            assert all(len(value) == x.shape[1] for value in state.values())
            parts.append(part)
            start += len(chunk)
    return torch.cat(parts)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [3, 1, 10], [5, 2, 1, 6], [4, 4, 4, 2], [14]], ids=str)
def test_equality_decode_is_forward(chunks: list[int]) -> None:
    module, x = lory(first_segment="uniform"), draw(batch=3)
    assert torch.allclose(decode(module, x, chunks), run(module, x), atol=1e-12)


@pytest.mark.parametrize("chunks", [[4] + [1] * 10, [7, 1, 6]], ids=str)
def test_equality_decode_by_own_mean_is_forward_when_the_first_call_has_the_first_segment(chunks: list[int]) -> None:
    module, x = lory(first_segment="own_mean"), draw(batch=3)
    assert torch.allclose(decode(module, x, chunks), run(module, x), atol=1e-12)


def test_decode_by_own_mean_keeps_the_routing_of_a_short_prompt_for_the_first_segment() -> None:
    module, x, prompt = lory(first_segment="own_mean"), draw(batch=1), 2
    found = decode(module, x, [prompt] + [1] * (LENGTH - prompt))
    shares = (module.router @ x[:prompt, 0].mean(0)).softmax(-1)[None]
    first = swiglu_ffn(x[:SEGMENT], *(getattr(module, name).merge(shares)[0] for name in MATRICES))
    assert torch.allclose(found[:SEGMENT], first, atol=1e-12)
    assert torch.allclose(found[SEGMENT:], run(module, x)[SEGMENT:], atol=1e-12)


def test_equality_fillers_and_gaps_are_as_if_they_were_not_there() -> None:
    module, x = lory(first_segment="uniform"), draw(8, 1)
    kept = torch.tensor([0, 2, 3, 5, 6, 9])
    rows = torch.tensor([0, 1, 3, 4, 6, 7])  # rows 2 and 5 are fillers
    positions, present = torch.zeros(8, 1, dtype=torch.long), torch.zeros(1, 8, dtype=torch.bool)
    positions[rows, 0], present[0, rows] = kept, True
    found = module(x, Context(positions, present=present))[0][rows]
    assert torch.allclose(found, module(x[rows], Context(kept))[0], atol=1e-12)


def test_bfloat16_is_close_to_float32() -> None:
    half, single = lory(torch.bfloat16), lory(torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(single.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    half.router.data = half.router.data.float()
    x = draw(40).bfloat16()
    found, wanted = run(half, x), run(single, x.float())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    (found.float() ** 2).sum().backward()
    (wanted**2).sum().backward()
    for ours, theirs in zip(half.parameters(), single.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm()


def test_no_merged_matrix_is_kept_for_the_backward() -> None:
    module, kept = lory(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(module, draw(64), None)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    tokens = 64 * BATCH
    dense = 8 * tokens * (2 * DIM + 3 * HIDDEN)  # input and its wide copy; gate, up and their product
    assert sum(size for place, size in own.items() if place not in parameters) <= 1.5 * dense


class Rounded(Quantizer):
    """Each matrix to signs times its mean size, straight through."""

    def input(self, x: Tensor) -> Tensor:
        return x

    def matrix(self, weight: Tensor) -> Tensor:
        rounded = weight.sign() * weight.abs().mean((-1, -2), keepdim=True)
        return weight + (rounded - weight).detach()


class LowRank(Adapter):
    def __init__(self, layer: MergedLinear):
        super().__init__()
        experts, out, features = layer.weight.shape
        self.down = torch.nn.Parameter(torch.randn(experts, 2, features).double())
        self.up = torch.nn.Parameter(torch.randn(experts, out, 2).double())

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        assert counts is not None
        rows = zip(x.split(counts), self.down, self.up, strict=True)
        return torch.cat([part @ down.t() @ up.t() for part, down, up in rows])


def test_equality_a_quantizer_rounds_the_merged_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "_QUANTIZED_PIECES", 3)
    module, x = lory(first_segment="uniform"), draw(9, 1).requires_grad_()
    for name in MATRICES:
        getattr(module, name).quantizer = Rounded()
    found = run(module, x)
    rows = []
    for token, e in zip(x[:, 0], naive_shares(module, list(x[:, 0]), [0] * 9), strict=True):
        matrices = [torch.einsum("e,eoi->oi", e, getattr(module, name).weight) for name in MATRICES]
        rows.append(swiglu_ffn(token, *map(Rounded().matrix, matrices)))
    wanted = torch.stack(rows)[:, None]
    assert torch.allclose(found, wanted, atol=1e-12)
    inputs = [x, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found**2).sum(), inputs), torch.autograd.grad((wanted**2).sum(), inputs), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)
    assert torch.allclose(decode(module, x.detach(), [1] * 9), found, atol=1e-12)


def test_equality_adapters_merge_as_their_matrices_do() -> None:
    torch.manual_seed(0)
    module, x = lory(), draw()
    for name in MATRICES:
        part = getattr(module, name)
        part.adapter = LowRank(part)
    found = run(module, x, documents())
    stepped = decode(module, x, [4] + [1] * 10)
    plain = run(module, x)
    with torch.no_grad():
        for name in MATRICES:
            part = getattr(module, name)
            part.weight += part.adapter.up @ part.adapter.down
            part.adapter = None
    assert torch.allclose(found, run(module, x, documents()), atol=1e-11)
    assert torch.allclose(plain, run(module, x), atol=1e-11) and torch.allclose(stepped, plain, atol=1e-11)


def test_equality_cost_is_what_is_built() -> None:
    config = LoryConfig(num_experts=EXPERTS, hidden_dim=HIDDEN, segment_length=SEGMENT)
    cost, ffn = config.cost(DIM), 3 * DIM * HIDDEN
    assert cost.params == sum(p.numel() for p in lory().parameters())
    assert cost.active_params == ffn + EXPERTS * DIM
    assert cost.forward_flops == pytest.approx(2 * ffn + 2 * EXPERTS * (ffn + DIM) / SEGMENT)


def model(**channel: Any) -> LanguageConfig:
    block = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "lory", "num_experts": 2} | channel}
    values = {"vocab_size": 8, "dim": 8, "num_layers": 1, "context_length": 8, "block_pattern": [block]}
    return build_config(LanguageConfig, values)


def test_what_cannot_be_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"block_pattern\.0\.channel\.type 'lory'.*parallel\.ulysses 2.*ulysses: 1"):
        model(hidden_dim=8).check_parallel(Degrees(ulysses=2))
    with pytest.raises(ValueError, match=r"hidden_dim 9 cannot be split over parallel\.tensor 2"):
        model(hidden_dim=9).check_parallel(Degrees(tensor=2))
    model(hidden_dim=8).check_parallel(Degrees(tensor=2, sequence=True))


def test_it_is_no_expert() -> None:
    expert = {"type": "lory", "num_experts": 2, "hidden_dim": 4}
    with pytest.raises(ConfigError, match="expert.type 'lory' mixes tokens of a sequence"):
        build_config(SwitchConfig, {"num_experts": 2, "expert": expert})
