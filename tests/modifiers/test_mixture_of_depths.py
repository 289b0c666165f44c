"""Layers that choose their tokens, against a loop over the chosen ones and against the plain model."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.models.language import Degrees, LanguageConfig, LanguageModel
from lightbulb.modifiers.mixture_of_depths import DepthBlock, best, where
from lightbulb.nn.parameter import initialise

BLOCK = {
    "token": {"type": "attention", "num_heads": 2, "qk_norm": True},
    "channel": {"type": "mlp", "hidden_dim": 12},
}
VALUES: dict[str, Any] = {
    "vocab_size": 32,
    "dim": 8,
    "num_layers": 4,
    "context_length": 16,
    "init_std": 0.3,
    "block_pattern": [BLOCK],
}
LENGTH = 11


def build(modified: bool = True, seed: int = 3, changes: dict[str, Any] | None = None, **options: Any) -> LanguageModel:
    modifiers = [{"type": "mixture_of_depths", "capacity": 0.4} | options] if modified else []
    model = build_config(LanguageConfig, VALUES | {"modifiers": modifiers} | (changes or {})).build()
    initialise(model, seed)
    return model.double()


def tokens(length: int = LENGTH, batch: int = 3) -> Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(0))


def depth_block(**options: Any) -> DepthBlock:
    block = build(**options).blocks["1"]
    assert isinstance(block, DepthBlock)
    return block


def hidden(length: int = LENGTH, batch: int = 3) -> Tensor:
    return torch.randn(length, batch, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(length: int = LENGTH, documents: Tensor | None = None) -> Context:
    return Context(torch.arange(length), documents)


def naive(block: DepthBlock, x: Tensor, chosen: Tensor) -> Tensor:
    """Sequence by sequence; the plain block of the chosen tokens, every one at its true position."""
    scores, out = x @ block.depth_router, x.clone()
    for sample in range(x.shape[1]):
        (index,) = chosen[:, sample].nonzero(as_tuple=True)
        taken = x[index, sample : sample + 1]
        plain, _ = super(DepthBlock, block).forward(taken, Context(index))
        gate = block._gate(scores[index, sample])[:, None, None]
        out[index, sample : sample + 1] = taken + gate * (plain - taken)
    return out


@pytest.mark.parametrize("training", [True, False])
def test_equality_with_the_plain_model_when_all_are_chosen_and_the_gate_is_one(training: bool) -> None:
    dense, deep = build(modified=False).train(training), build(capacity=1.0, gate="unit").train(training)
    if not training:
        for block in (deep.blocks["1"], deep.blocks["3"]):
            choose_by_first_feature(block, always=True)
    assert torch.allclose(deep(tokens()), dense(tokens()), atol=1e-10)
    assert not torch.allclose(build(capacity=1.0).train()(tokens()), dense(tokens()), atol=1e-3)


def test_equality_with_nothing_when_none_is_chosen() -> None:
    block = depth_block().eval()
    with torch.no_grad():
        block.depth_predictor.output.zero_()
    assert torch.equal(block(hidden(), context())[0], hidden())


@pytest.mark.parametrize("gate", ["score", "sigmoid", "unit"])
def test_equality_training_takes_the_best_and_leaves_the_rest(gate: str) -> None:
    block, x = depth_block(gate=gate), hidden().requires_grad_()
    chosen = torch.zeros(LENGTH, 3, dtype=torch.bool)
    for sample in range(3):
        chosen[(x[:, sample] @ block.depth_router).topk(4).indices, sample] = True  # int(0.4 * 11)
    found, wanted = block(x, context())[0], naive(block, x, chosen)
    assert torch.allclose(found, wanted, atol=1e-6)  # rotary angles are float32
    names = [(n, p) for n, p in block.named_parameters() if "predictor" not in n]
    for (name, _), ours, theirs in zip(
        [("x", x), *names],
        torch.autograd.grad(found.square().sum(), [x, *(p for _, p in names)]),
        torch.autograd.grad(wanted.square().sum(), [x, *(p for _, p in names)]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5), name
        assert ours.any(), name


def test_equality_evaluation_takes_whom_the_predictor_names() -> None:
    block, x = depth_block().eval(), hidden()
    chosen = block.depth_predictor(x) > 0
    assert 0 < chosen.sum() < chosen.numel() and len(set(chosen.sum(0).tolist())) > 1
    assert torch.allclose(block(x, context())[0], naive(block, x, chosen), atol=1e-6)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (5, 2), (11, 4), (16, 6)])
def test_capacity_is_exact(length: int, count: int) -> None:
    block, x = depth_block(), hidden(length)
    changed = (block(x, context(length))[0] != x).any(-1)
    assert changed.sum(0).tolist() == [count] * 3


def test_ties_go_to_earlier_tokens_and_order_is_kept() -> None:
    scores = torch.tensor([[1.0, 0.0], [2.0, 5.0], [1.0, 5.0], [1.0, 5.0]])
    assert best(scores, 2).t().tolist() == [[0, 1], [1, 2]]
    index, present = where(torch.tensor([[True, False], [False, False], [True, True]]))
    assert index.t().tolist() == [[0, 2], [2, 0]] and present.tolist() == [[True, True], [True, False]]
    index, present = where(torch.zeros(3, 2, dtype=torch.bool))
    assert index.shape == (1, 2) and not present.any()


def test_evaluation_does_not_see_the_future_and_training_says_it_does() -> None:
    model, ids = build().eval(), tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 32
    assert torch.allclose(model(changed)[:, :7], model(ids)[:, :7], atol=1e-10)
    scores = torch.arange(4.0)[:, None]
    assert best(scores, 2).tolist() != best(torch.cat([scores[:3], -scores[3:]]), 2).tolist()


def test_documents_do_not_see_each_other() -> None:
    model, ids = build().eval(), tokens()
    documents = (torch.arange(LENGTH) >= 5).long().expand(3, -1)
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 3) % 32
    labels = torch.zeros_like(ids)
    before, after = (model(t, labels, documents) for t in (ids, changed))
    assert torch.allclose(before[:, 5:], after[:, 5:], atol=1e-10) and not torch.allclose(before[:, :5], after[:, :5])


def test_equality_packed_documents_are_documents_alone_when_their_first_tokens_are_left_out() -> None:
    token = BLOCK["token"] | {"max_distance": 1, "num_global": 3}
    block = depth_block(changes={"block_pattern": [BLOCK | {"token": token}]}).eval()
    choose_by_first_feature(block, always=False)
    x, documents = hidden(), (torch.arange(LENGTH) >= 4).long().expand(3, -1)
    x[:, :, 0] = 1.0
    x[4:6, :, 0] = -1.0  # of the three global tokens of the second document only the last goes through the layer
    whole = block(x, context(documents=documents))[0]
    for part in (slice(4), slice(4, LENGTH)):
        alone = block(x[part], context(len(x[part])))[0]
        assert torch.allclose(whole[part], alone, atol=1e-6)  # rotary angles are float32


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [6, 1, 1, 3], [LENGTH]], ids=str)
def test_equality_decode_is_forward(chunks: list[int]) -> None:
    model, ids = build().eval(), tokens()
    with torch.no_grad():
        state, parts = model.init_state(3, LENGTH), []
        for chunk in ids.split(chunks, dim=1):
            logits, state = model.decode(chunk, state)
            parts.append(logits)
        assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-6)


def test_the_predictor_leaves_the_model_alone() -> None:
    gradients = []
    for coefficient in (0.01, 10.0):
        model = build(predictor_loss=coefficient)
        model(tokens()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = 1000.0 if "predictor" in name else 1.0
        assert torch.allclose(gradients[1][name], scale * gradient, rtol=1e-9), name
        assert gradient.any(), name


def test_the_predictor_learns_whom_the_router_chooses() -> None:
    block = depth_block(predictor_dim=16)
    optimizer = torch.optim.Adam(block.depth_predictor.parameters(), lr=0.02)
    for step in range(300):
        x = torch.randn(64, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        block(x, context(64))[0].mul(0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(64, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1000))
    chosen = torch.zeros(64, 8, dtype=torch.bool).scatter(0, best(x @ block.depth_router, 25), True)
    assert ((block.depth_predictor(x) > 0) == chosen).double().mean() > 0.9


def choose_by_first_feature(block: Any, always: bool) -> None:
    """A predictor that takes the tokens whose first feature is positive, or (always) all: ``silu(a) - silu(-a)`` is a,
    ``silu(a) + silu(-a)`` is positive."""
    with torch.no_grad():
        block.depth_predictor.hidden.zero_()
        block.depth_predictor.hidden[0, 0], block.depth_predictor.hidden[1, 0] = 1.0, -1.0
        block.depth_predictor.output.zero_()
        block.depth_predictor.output[0], block.depth_predictor.output[1] = 1.0, 1.0 if always else -1.0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_cost_is_what_is_built(every: int) -> None:
    model = build(every=every)
    assert model.config.cost().params == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.cost().forward_flops < build(modified=False).config.cost().forward_flops * 1.2
    assert [isinstance(block, DepthBlock) for block in model.blocks.values()] == [
        layer % every == every - 1 for layer in range(4)
    ]


def test_names_are_a_superset_of_the_plain_models() -> None:
    plain, deep = (set(dict(build(modified=flag).named_parameters())) for flag in (False, True))
    assert plain < deep and all("depth_" in name for name in deep - plain)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="set parallel.sequence: false"):
        build().config.check_parallel(Degrees(tensor=2, sequence=True))
    with pytest.raises(ValueError, match="set parallel.ulysses: 1"):
        build().config.check_parallel(Degrees(ulysses=2))
    infini = {"token": {"type": "infini", "num_heads": 2, "segment_length": 4}, "channel": BLOCK["channel"]}
    with pytest.raises(ConfigError, match=r"falls on layer 1, whose 'infini' needs every token; change every \(2\)"):
        build(changes={"block_pattern": [infini]})


def test_a_kernel_that_takes_no_gaps_is_refused() -> None:
    block = {"token": BLOCK["token"] | {"backend": "flash"}, "channel": BLOCK["channel"]}
    with pytest.raises(ConfigError, match="falls on layer 1: token.backend 'flash' takes no positions"):
        build(changes={"block_pattern": [block]})


def test_capacity_of_exact_products_is_not_rounded_down() -> None:
    config = depth_block(capacity=0.29).config
    assert [config.chosen(length) for length in (100, 99, 7)] == [29, 28, 2]
