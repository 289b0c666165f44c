"""LoRA against the frozen model, against merged weights, and frozen weights in four bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.modifiers.lora import LowRank, merge
from lightbulb.modifiers.packed import pack
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.linear import ColumnParallelLinear, SplitLinear
from lightbulb.nn.nf4 import NF4, levels
from lightbulb.nn.parameter import initialise, set_values, stored_values, values_of

ATTENTION = {"type": "attention", "num_heads": 4, "bias": "all"}
SWITCH = {"type": "switch", "num_experts": 4, "hidden_dim": 64, "shared_hidden_dim": 64}
VALUES: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 64,
    "num_layers": 2,
    "context_length": 24,
    "block_pattern": [
        {"token": ATTENTION, "channel": {"type": "mlp", "hidden_dim": 128, "bias": True}},
        {"token": ATTENTION, "channel": SWITCH},
    ],
}
LORA: dict[str, Any] = {"type": "lora", "rank": 3, "alpha": 5.0}
NF4_LORA = LORA | {"quantize": "nf4"}


def build(*modifiers: dict[str, Any], random: bool = False, **changes: Any) -> LanguageModel:
    """A model in float64 with biases; ``random``: with B that is not zero."""
    model = build_config(LanguageConfig, VALUES | {"modifiers": list(modifiers)} | changes).build()
    initialise(model, 3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.double()
    if random:
        for adapter in adapters(model):
            nn.init.normal_(adapter.b, std=0.3, generator=torch.Generator().manual_seed(adapter.b.numel()))
    return model


def adapters(model: nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def tokens(length: int = 7, batch: int = 3) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # logits are float32


def test_equality_zero_b_is_the_base() -> None:
    assert torch.equal(build(LORA)(tokens()), build()(tokens()))


@pytest.mark.parametrize("scaling", ["alpha/r", "rslora"])
def test_equality_merged_is_unmerged(scaling: str) -> None:
    model = build(LORA | {"scaling": scaling}, random=True)
    before, base = model(tokens()), build()(tokens())
    assert (before - base).abs().max() > 0.1
    merge(model)
    assert not adapters(model)
    close(model(tokens()), before)
    plain = build()
    plain.load_state_dict(model.state_dict())
    close(plain(tokens()), before)


def test_equality_of_the_product_and_its_scale() -> None:
    layer = ColumnParallelLinear(6, 4, 1.0)
    layer.adapter = LowRank(layer, 2, 5.0 / 2)
    initialise(layer, 0)
    nn.init.normal_(layer.adapter.b)
    x = torch.randn(3, 6)
    expected = x @ layer.weight.t() + 2.5 * x @ layer.adapter.a.t() @ layer.adapter.b.t()
    torch.testing.assert_close(layer(x), expected)
    assert build(LORA).config.modifiers[0].scale == 5.0 / 3  # type: ignore[attr-defined]
    assert build(LORA | {"scaling": "rslora"}).config.modifiers[0].scale == 5.0 / 3**0.5  # type: ignore[attr-defined]


def test_equality_full_rank_can_be_any_update() -> None:
    layer = ColumnParallelLinear(6, 4, 1.0).double()
    layer.adapter = LowRank(layer, 4, 0.5).double()
    initialise(layer, 0)
    wanted, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.adapter.b.copy_(torch.eye(4))
        layer.adapter.a.copy_(wanted / 0.5)
    torch.testing.assert_close(layer(x), x @ (layer.weight + wanted).t(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [1, 2])
def test_equality_every_expert_has_its_own_pair(parts: int) -> None:
    layer = GroupedLinear(3, 6, 4, 1.0, SINGLE, SINGLE, parts=parts)
    layer.adapter = LowRank(layer, 2, 1.5)
    initialise(layer, 0)
    layer.double()
    nn.init.normal_(layer.adapter.b)
    lead = (3, 2) if parts == 2 else (3,)
    assert layer.adapter.a.shape == (*lead, 2, 6) and layer.adapter.b.shape == (*lead, 4, 2)
    rows, counts = torch.randn(7, 6, dtype=torch.float64), [4, 0, 3]
    effective = (layer.weight + 1.5 * layer.adapter.b @ layer.adapter.a).flatten(1, -2)
    expected = torch.cat([part @ effective[e].t() for e, part in enumerate(rows.split(counts))])
    torch.testing.assert_close(layer(rows, counts), expected, rtol=1e-10, atol=1e-10)


def test_only_updates_learn() -> None:
    model = build(LORA, random=True)
    model(tokens(), tokens()).sum().backward()
    for name, parameter in model.named_parameters():
        is_update = name.endswith((".adapter.a", ".adapter.b"))
        assert parameter.requires_grad == is_update
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == is_update, name
    assert len(adapters(model)) == 4 + 3 + 4 + 2 + 3


@pytest.mark.parametrize("modifier", [LORA, NF4_LORA], ids=["plain", "nf4"])
def test_equality_gradients_are_those_of_the_merged_weights(modifier: dict[str, Any]) -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from a plain model of the merged weights."""
    model = build(modifier, random=True)
    plain = build()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SplitLinear)}
    with torch.no_grad():
        for name, layer in layers.items():
            merged = values_of(layer.weight) + layer.adapter.delta()  # type: ignore[union-attr, operator]
            plain.get_submodule(name).weight.copy_(merged)  # type: ignore[operator, union-attr]
    for each in (model, plain):
        each(tokens(), tokens()).double().sum().backward()
    for name, layer in layers.items():
        update, gradient = layer.adapter, plain.get_submodule(name).weight.grad
        assert isinstance(update, LowRank) and isinstance(gradient, Tensor)
        for found, expected in (
            (update.b.grad, update.scale * gradient @ update.a.mT),
            (update.a.grad, update.scale * update.b.mT @ gradient),
        ):
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("modifier", [LORA, NF4_LORA | {"rank": 2}, LORA | {"match": "*.channel.*"}], ids=str)
def test_cost_is_what_is_built(modifier: dict[str, Any]) -> None:
    config = build(modifier).config
    with torch.device("meta"):
        model = config.build()
    assert config.cost().params == sum(parameter.numel() for parameter in model.parameters())
    plain = build().config.cost()
    assert config.cost().forward_flops - plain.forward_flops == 2 * (config.cost().active_params - plain.active_params)


def test_active_cost_counts_chosen_experts_only() -> None:
    experts = LORA | {"match": "*.experts.*"}
    found, plain = (build(*modifiers).config.cost() for modifiers in ([experts], []))
    assert found.params - plain.params == 4 * 3 * (2 * (64 + 64) + (64 + 64))
    assert found.active_params - plain.active_params == (found.params - plain.params) // 2


@pytest.mark.parametrize("bitlinear", [{}, {"weights": "binary"}], ids=["ternary", "binary"])
def test_equality_in_any_order_with_bitlinear(bitlinear: dict[str, Any]) -> None:
    """The same parameters and function; the base's product is quantised, the update's is not."""
    bits = {"type": "bitlinear", **bitlinear}
    one, other = build(bits, LORA, random=True), build(LORA, bits, random=True)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(tokens()), other(tokens()))
    layer = one.get_submodule("blocks.0.token.query")
    assert isinstance(layer, SplitLinear) and isinstance(layer.adapter, LowRank) and layer.quantizer is not None
    x = torch.randn(5, 64, dtype=torch.float64)
    expected = layer.quantizer.input(x) @ layer.quantizer.matrix(layer.weight).t() + x @ layer.adapter.delta().t()
    torch.testing.assert_close(layer(x), expected + layer.bias, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="blocks.0.token.query: its weight is quantised"):
        merge(one)


def test_equality_packed_bitlinear_keeps_updates() -> None:
    model = build({"type": "bitlinear"}, LORA, random=True).eval()
    before = model(tokens())
    pack(model)
    close(model(tokens()), before)


def test_names_are_a_superset_of_the_plain_models() -> None:
    plain, model = build().state_dict(), build(LORA).state_dict()
    assert plain.keys() < model.keys()
    assert all(".adapter." in name for name in model.keys() - plain.keys())


def test_errors_name_the_field() -> None:
    with pytest.raises(ConfigError, match="match 'head' names no linear layer"):
        build(LORA | {"match": "head"})
    with pytest.raises(ValueError, match="nf4: blocks.0.token.query has 32 inputs on each rank, no multiple of 64"):
        build(NF4_LORA, dim=32)


def test_equality_nf4_levels() -> None:
    """The ends of QLoRA's table, to the digits its quantiles have."""
    table = levels()
    assert len(table) == 16 and float(table[0]) == -1 and float(table[7]) == 0 and float(table[15]) == 1
    expected = torch.tensor([-0.69619280, -0.52507305, 0.07958030, 0.16093020, 0.72295684])
    torch.testing.assert_close(table[[1, 2, 8, 9, 14]], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_split_input", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (300, 128), (3, 2, 7, 192), (2, 64 * 300)])
def test_equality_nf4_written_again_is_the_same(shape: tuple[int, ...], has_split_input: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    values[0, ..., :64] = 0.0
    keeper = NF4(has_split_input)
    keeper.write(values)
    read, kept = keeper.read(torch.float32), [buffer.clone() for buffer in keeper.buffers()]
    assert read.shape == values.shape
    assert (read - values).abs().mean() < 0.1 * values.abs().mean()
    keeper.write(read)
    assert all(torch.equal(a, b) for a, b in zip(kept, keeper.buffers(), strict=True))
    assert torch.equal(keeper.read(torch.float32), read)
    assert torch.equal(keeper.read(torch.bfloat16), read.bfloat16())


def test_nf4_takes_the_nearest_level_times_the_block_scale() -> None:
    values = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    keeper = NF4(False)
    keeper.write(values)
    for row, read in zip(values, keeper.read(torch.float32), strict=True):
        tops = row.view(2, 64).abs().amax(-1)
        for block, found in zip(row.split(64), read.split(64), strict=True):
            scale = (block.abs().max() / tops.max() * 255).round() / 255 * tops.max()
            nearest = (block[:, None] / scale - levels()).abs().argmin(-1)
            torch.testing.assert_close(found, levels()[nearest] * scale)


@pytest.mark.parametrize(("has_split_input", "dim"), [(False, 0), (True, 1)])
def test_equality_nf4_parts_are_parts_of_the_whole(has_split_input: bool, dim: int) -> None:
    values = torch.randn(384, 256, generator=torch.Generator().manual_seed(0))
    whole = NF4(has_split_input)
    whole.write(values)
    for index, part in enumerate(values.chunk(2, dim)):
        keeper = NF4(has_split_input)
        keeper.write(part)
        expected = whole.read(torch.float32).chunk(2, dim)[index]
        assert torch.equal(keeper.read(torch.float32), expected)


def test_equality_nf4_model_is_the_model_of_its_rounded_weights() -> None:
    """Forward and backward; and the weights are not there but in four bits."""
    model, plain = build(NF4_LORA, random=True), build(LORA, random=True)
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "keeper"):
            assert parameter.numel() == 0
            set_values(weights[name], values_of(parameter))  # type: ignore[arg-type]
    close(model(tokens()), plain(tokens()))
    for each in (model, plain):
        each(tokens(), tokens()).double().sum().backward()
    for mine, theirs in zip(adapters(model), adapters(plain), strict=True):
        torch.testing.assert_close(mine.a.grad, theirs.a.grad, rtol=1e-5, atol=1e-6)
    merge(model)
    merge(plain)
    close(model(tokens()), plain(tokens()))


def test_nf4_bytes() -> None:
    """An eighth of float32 and one byte per 64, and what a group of scales shares."""
    layer = ColumnParallelLinear(4096, 64, 1.0)
    layer.keeper = NF4(False)
    layer.weight.keeper = layer.keeper  # type: ignore[attr-defined]
    initialise(layer, 0)
    kept = sum(buffer.nbytes for buffer in layer.buffers()) + sum(parameter.nbytes for parameter in layer.parameters())
    assert kept == 64 * 4096 // 2 + 64 * 4096 // 64 + 64 * 4
    assert kept * 8 / (64 * 4096) < 4.14


def test_equality_in_a_bank_of_experts() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ColumnParallelLinear(64, 9, 1.0)

        def forward(self, x: Tensor, context: Context) -> Tensor:
            return self.inner(x)

    bank = ExpertBank(3, One)
    inner = bank.each.inner
    inner.adapter = LowRank(inner, 2, 1.5)
    inner.keeper = inner.weight.keeper = NF4(False)
    inner.weight.requires_grad_(False)
    initialise(bank, 2)
    nn.init.normal_(inner.adapter.b)
    assert inner.weight.numel() == 0 and inner.adapter.a.shape == (3, 2, 64)
    rows, counts = torch.randn(7, 64), [4, 0, 3]
    effective = values_of(inner.weight) + 1.5 * inner.adapter.b @ inner.adapter.a
    expected = torch.cat([part @ effective[e].t() for e, part in enumerate(rows.split(counts))])
    torch.testing.assert_close(bank(rows, counts, Context(torch.arange(7))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "channel", [{"type": "kan", "hidden_dim": 64}, {"type": "lory", "num_experts": 2, "hidden_dim": 64}], ids=str
)
def test_four_bits_where_layers_multiply_in_a_way_of_their_own(channel: dict[str, Any]) -> None:
    changes = {"block_pattern": [{"token": ATTENTION, "channel": channel}]}
    kept, base = build(NF4_LORA, **changes), build(LORA, **changes)
    for name, parameter in base.named_parameters():
        set_values(parameter, values_of(kept.get_parameter(name)))
    close(kept(tokens()), base(tokens()))
    kept(tokens()).square().sum().backward()
    assert all(adapter.b.grad is not None and adapter.b.grad.any() for adapter in adapters(kept))


@pytest.mark.parametrize("has_split_input", [False, True])
@pytest.mark.parametrize("outlier", [0.02, 6.0])
def test_equality_four_bits_of_a_bfloat16_model_survive_checkpoints(has_split_input: bool, outlier: float) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[:, 5] = outlier
    kept = NF4(has_split_input)
    kept.write(weight)
    before = kept.read(torch.bfloat16)
    parameter = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    parameter.keeper = kept  # type: ignore[attr-defined]
    stored = stored_values(parameter)
    assert stored.dtype == torch.float32
    kept.write(stored)
    assert torch.equal(kept.read(torch.bfloat16), before)
    assert torch.equal(stored_values(parameter), stored)
