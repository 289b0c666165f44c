"""Depth-weighted averages against their definition over the whole history."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.stack import Stage
from lightbulb.modifiers.denseformer import DenseStackConfig
from lightbulb.nn.parameter import initialise

LAYERS = 6
BLOCK = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "mlp", "hidden_dim": 12}}
VALUES: dict[str, Any] = {
    "vocab_size": 32,
    "dim": 8,
    "num_layers": LAYERS,
    "context_length": 16,
    "block_pattern": [BLOCK],
}
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 3), (4, 5), (3, 3), (1, 7)]


def build(*, dilation: int = 1, period: int = 1, random: bool = False, modified: bool = True) -> LanguageModel:
    modifiers = [{"type": "denseformer", "dilation": dilation, "period": period}] if modified else []
    model = build_config(LanguageConfig, VALUES | {"modifiers": modifiers}).build()
    initialise(model, 3)
    if random:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.stack.parameters():
                weight.normal_(generator=generator)
    return model.double()


def tokens(length: int = 7) -> Tensor:
    return torch.randint(32, (2, length), generator=torch.Generator().manual_seed(0))


def naive(model: LanguageModel, ids: Tensor, dilation: int, period: int) -> Tensor:
    """Keeps every X_j and sums them as the paper writes it."""
    captured: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, i, o: captured.append(o[0])) for block in model.blocks.values()]
    plain, model.stack = model.stack, _Naive(model.stack, captured, model, dilation, period)
    try:
        return model(ids)
    finally:
        model.stack = plain
        for handle in handles:
            handle.remove()


class _Naive(torch.nn.Module):
    def __init__(self, stack: Any, outputs: list[Tensor], model: LanguageModel, dilation: int, period: int):
        super().__init__()
        self.config, self.alphas, self.outputs = stack.config, dict(stack.weights.items()), outputs
        self.dilation, self.period = dilation, period

    def start(self, embedded: Tensor) -> list[Tensor]:
        self.embedded = embedded
        return [embedded]

    def after(self, layer: int, output: Tensor, carried: list[Tensor]) -> list[Tensor]:
        i = layer + 1
        if i % self.period:
            return [output]
        history = [self.embedded, *self.outputs]
        terms = [self.alpha(i, j) * history[j] for j in range(i + 1) if (i - j) % self.dilation == 0]
        return [sum(terms[1:], terms[0])]

    def alpha(self, i: int, j: int) -> Tensor:
        return self.alphas[str(j)][self.config.averages(j, LAYERS).index(i)]


@pytest.mark.parametrize(("dilation", "period"), SHAPES)
def test_equality_at_the_start_with_the_plain_model_bit_by_bit(dilation: int, period: int) -> None:
    assert torch.equal(build(dilation=dilation, period=period)(tokens()), build(modified=False)(tokens()))


@pytest.mark.parametrize(("dilation", "period"), SHAPES)
def test_equality_running_sums_are_averages_over_the_history(dilation: int, period: int) -> None:
    model = build(dilation=dilation, period=period, random=True)
    found, wanted = model(tokens()), naive(model, tokens(), dilation, period)
    assert torch.allclose(found, wanted, atol=1e-10)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(naive(model, tokens(), dilation, period).square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_equality_gradients_of_frozen_identity_weights_are_the_plain_models() -> None:
    dense, plain = build(), build(modified=False)
    for model in (dense, plain):
        model(tokens()).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(dense.get_parameter(name).grad, parameter.grad, atol=1e-12), name


def test_every_weight_learns() -> None:
    model = build(dilation=2, period=2)
    model(tokens()).square().sum().backward()
    assert all(parameter.grad.all() for parameter in model.stack.parameters())


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 3), (4, 5)])
@pytest.mark.parametrize("cuts", [[3], [1, 2], [2, 3, 5]], ids=str)
def test_equality_stages_joined_by_what_they_carry(dilation: int, period: int, cuts: list[int]) -> None:
    whole = build(dilation=dilation, period=period, random=True)
    bounds = [0, *cuts, LAYERS]
    received = None
    for first, last in zip(bounds, bounds[1:], strict=False):
        stage = Stage(first, last, has_embedding=first == 0, has_head=last == LAYERS)
        part = whole.config.build(stage).double()
        own = dict(part.named_parameters())
        part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in own}, strict=True)
        if received is not None:
            assert received.shape[-1] == sum(whole.config.carried_widths(first))
            part.set_input_tensor([received])
        received = part(tokens())
    assert torch.allclose(received, whole(tokens()), atol=1e-12)


def test_one_by_one_has_the_papers_number_of_weights() -> None:
    config = DenseStackConfig(dilation=1, period=1)
    assert config.cost(LAYERS, 8).params == LAYERS * (LAYERS + 3) // 2


@pytest.mark.parametrize(("dilation", "period"), SHAPES)
def test_cost_is_what_is_built(dilation: int, period: int) -> None:
    model = build(dilation=dilation, period=period)
    assert model.config.cost().params == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.carried_widths(LAYERS) == [8]


def test_equality_decode_is_forward() -> None:
    model = build(dilation=2, period=3, random=True).eval()
    ids = tokens(9)
    with torch.no_grad():
        whole, state, parts = model(ids), model.init_state(2, 9), []
        for chunk in ids.split([4, 1, 3, 1], dim=1):
            logits, state = model.decode(chunk, state)
            parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
