"""BitLinear against its formulas, against linear layers, and packed against itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import ConfigError, build_config
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.modifiers.bitlinear import BitLinearConfig, BitQuantizer
from lightbulb.modifiers.packed import PackedLinear, pack
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.linear import ColumnParallelLinear, SplitLinear
from lightbulb.nn.lowbit import UNTIE, quantise_weight, token_codes, weight_codes
from lightbulb.nn.parameter import initialise
from lightbulb.ops import FORMATS

ATTENTION = {"type": "attention", "num_heads": 4}
MLP = {"type": "mlp", "hidden_dim": 24}
SWITCH = {"type": "switch", "num_experts": 4, "hidden_dim": 12, "shared_hidden_dim": 8}
VALUES: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 16,
    "num_layers": 2,
    "context_length": 24,
    "block_pattern": [{"token": ATTENTION, "channel": MLP}, {"token": ATTENTION, "channel": SWITCH}],
}
KINDS = ["ternary", "binary"]


def build(*modifiers: dict[str, Any], **changes: Any) -> LanguageModel:
    model = build_config(LanguageConfig, VALUES | {"modifiers": list(modifiers)} | changes).build()
    initialise(model, 3)
    return model.double()


def tokens(length: int = 7, batch: int = 3) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))


def layer(out: int = 9, inputs: int = 14, bounded: bool = False, **options: Any) -> SplitLinear:
    """A linear layer in float64 with a quantizer."""
    made = ColumnParallelLinear(inputs, out, 1.0)
    initialise(made, 1)
    made.has_bounded_input = bounded
    made.quantizer = BitQuantizer(BitLinearConfig(**options), made)
    return made.double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x: Tensor, weight: Tensor, kind: str, norm: bool, levels: int = 127) -> Tensor:
    """The formulas, for one matrix, one token at a time."""
    if kind == "ternary":
        beta = weight.abs().mean()
        matrix = torch.stack(
            [min((-1.0, 0.0, 1.0), key=lambda c: abs(float((w / beta).detach()) - c)) * beta for w in weight.flatten()]
        )
    else:
        beta, alpha = weight.abs().mean(), weight.mean()
        matrix = torch.stack([beta if w > alpha else -beta for w in weight.flatten()])
    rows = []
    for token in x.flatten(0, -2):
        u = token / (token.square().mean() + 1e-6).sqrt() if norm else token
        gamma = u.abs().max()
        rows.append((u * levels * UNTIE / gamma).round() * gamma / levels @ matrix.view_as(weight).t())
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
def test_equality_the_layer_is_its_formulas(kind: str, norm: bool) -> None:
    module, x = layer(weights=kind, norm=norm), draw(3, 2, 14) * draw(3, 2, 1, seed=4).exp()
    torch.testing.assert_close(module(x), naive(x, module.weight, kind, norm), rtol=1e-10, atol=1e-10)


def test_equality_of_four_bit_inputs() -> None:
    module, x = layer(act_bits=4), draw(5, 14)
    torch.testing.assert_close(module(x), naive(x, module.weight, "ternary", True, 7), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_equality_gradients_go_straight_through(kind: str) -> None:
    """The gradient of the weight is that of the quantised weight; that of the input passes the norm only."""
    module, x = layer(weights=kind), draw(3, 2, 14).requires_grad_()
    out_gradient = draw(3, 2, 9, seed=2)
    ours = torch.autograd.grad((module(x) * out_gradient).sum(), [module.weight, x])
    quantised = module.quantizer.matrix(module.weight).detach().requires_grad_()
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rounded = unit + (module.quantizer.input(x) - unit).detach()
    expected = torch.autograd.grad(((rounded @ quantised.t()) * out_gradient).sum(), [quantised, x])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.25, 3.7])
def test_equality_under_scaling(kind: str, factor: float) -> None:
    """y(cW) = c y(W); with the norm y does not feel the size of x."""
    module, x = layer(weights=kind, norm_eps=1e-15), draw(4, 14)
    before = module(x)
    torch.testing.assert_close(module(factor * x), before, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        module.weight *= factor
    torch.testing.assert_close(module(x), factor * before, rtol=1e-10, atol=1e-10)


def test_values_of_quantised_weights() -> None:
    weight = draw(40, 30)
    ternary, binary = (quantise_weight(weight, kind, SINGLE) for kind in ("ternary", "binary"))
    beta = weight.abs().mean()
    torch.testing.assert_close(ternary.unique(), torch.stack([-beta, 0 * beta, beta]))
    torch.testing.assert_close(binary.unique(), torch.stack([-beta, beta]))


def test_equality_of_codes_when_quantised_again() -> None:
    """The codes stay, the scale shrinks by the share of codes that are not zero: so scales have to be stored."""
    codes, scale = weight_codes(draw(40, 30), "ternary", SINGLE)
    again, smaller = weight_codes(codes * scale, "ternary", SINGLE)
    assert torch.equal(codes, again)
    density = codes.abs().mean()
    assert 0.5 < density < 0.9
    torch.testing.assert_close(smaller, scale * density)


@pytest.mark.parametrize("kind", KINDS)
def test_equality_every_matrix_has_its_own_scale(kind: Any) -> None:
    weight = draw(3, 2, 5, 6) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1) + 0.3
    whole = quantise_weight(weight, kind, SINGLE)
    for expert in range(3):
        for part in range(2):
            assert torch.equal(whole[expert, part], quantise_weight(weight[expert, part], kind, SINGLE))


def test_equality_sixteen_bits_is_the_plain_layer() -> None:
    full = {"type": "bitlinear", "weights": "full", "act_bits": 16}
    assert torch.equal(build(full)(tokens()), build()(tokens()))


def test_bounded_inputs_have_a_fixed_scale_and_no_norm() -> None:
    module, x = layer(bounded=True, weights="full"), draw(4, 14).sigmoid().requires_grad_()
    torch.testing.assert_close(module(x), (x * 127).round() / 127 @ module.weight.t())
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(gradient, module.weight.sum(0).expand_as(x))


def test_zeros_and_bfloat16() -> None:
    module = layer()
    assert torch.equal(module(torch.zeros(2, 14, dtype=torch.float64)), torch.zeros(2, 9, dtype=torch.float64))
    x = draw(50, 14)
    exact = module(x)
    rough = module.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"norm": False}, {"act_bits": 16}, {"match": "*.channel.*"}], ids=str)
def test_equality_packed_is_quantised(form: Any, kind: str, options: dict[str, Any]) -> None:
    model = build({"type": "bitlinear", "weights": kind, **options}).eval()
    before = model(tokens())
    names = pack(model, form)
    assert len(names) == (8 if "match" in options else 16)
    torch.testing.assert_close(model(tokens()), before, rtol=1e-5, atol=1e-6)  # logits are float32


@pytest.mark.parametrize("form", FORMATS)
def test_equality_packed_splines(form: Any) -> None:
    """Experts of splines multiply the bases of their inputs, whose codes have a fixed scale."""
    kan = {"type": "switch", "num_experts": 4, "expert": {"type": "kan", "hidden_dim": 12}}
    model = build({"type": "bitlinear"}, block_pattern=[{"token": ATTENTION, "channel": kan}]).eval()
    before = model(tokens())
    names = pack(model, form)
    assert sum(name.endswith("spline") for name in names) == 4
    torch.testing.assert_close(model(tokens()), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("counts", [None, [2, 0, 3]], ids=str)
def test_equality_of_products_in_whole_numbers(
    counts: list[int] | None, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way on a GPU, in Triton's interpreter: in one layer, with one matrix or with two for each expert."""
    pytest.importorskip("triton")
    made = ColumnParallelLinear(14, 9, 1.0) if counts is None else GroupedLinear(3, 14, 9, 1.0, SINGLE, SINGLE, parts=2)
    initialise(made, 1)
    made.quantizer = BitQuantizer(BitLinearConfig(norm=norm), made)
    x, arguments = draw(5, 14).float().requires_grad_(), () if counts is None else (counts,)
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr("lightbulb.modifiers.bitlinear.takes_ternary_training", lambda x, weight: has_kernel)  # noqa: B023
        y = made(x, *arguments)
        grads = torch.autograd.grad(y, (x, made.weight), draw(*y.shape).float())
        results.append([y.detach(), *grads])
    for plain, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-5)


def test_equality_packed_products_are_exact() -> None:
    """Of whole numbers: the sum of int8 x ternary products in int64, scaled."""
    module = layer(64, 300, norm=False).float()  # a norm's sum has as many roundings as orders
    x = draw(20, 300).float()
    inputs, token_scale = module.quantizer.input_codes(x)
    codes, scale = module.quantizer.matrix_codes(module.weight)
    sums = inputs.long() @ codes.long().t()
    expected = (sums.float() * scale[..., 0]) * token_scale
    packed = PackedLinear(module, "base3")
    assert torch.equal(packed(x), expected)
    packed.make_ready()
    assert torch.equal(packed(x), expected)


def test_equality_packed_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and single steps of the packed model are one pass of the quantised one; blocks of rows change nothing."""
    monkeypatch.setattr("lightbulb.kernels.ternary_matmul._UNPACKED", 40)
    model, ids = build({"type": "bitlinear"}).eval(), tokens(9)
    with torch.no_grad():
        expected = model(ids)
        pack(model)
        state, found = model.init_state(3, 9), []
        for part in ids.split([4, 1, 1, 3], dim=1):
            logits, state = model.decode(part, state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "ratio"), [("2bit", 16), ("base3", 20)])
def test_packed_bytes(form: Any, ratio: int) -> None:
    """A float32 model's linear weights become 16 and 20 times smaller."""
    model = build(
        {"type": "bitlinear"}, dim=320, block_pattern=[{"token": ATTENTION, "channel": MLP | {"hidden_dim": 640}}]
    )
    model = model.float()
    linears = [module for module in model.modules() if isinstance(module, SplitLinear)]
    before = sum(module.weight.nbytes for module in linears)
    pack(model, form)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    after = sum(parameter.nbytes for module in packed for parameter in module.parameters())
    assert len(packed) == len(linears) == 14
    assert before / after == pytest.approx(ratio, rel=0.01)
    assert not any(isinstance(module, SplitLinear) for module in model.modules())


def test_layers_by_name() -> None:
    model = build({"type": "bitlinear", "match": "blocks.1.token.*"})
    names = [name for name, module in model.named_modules() if isinstance(module, BitQuantizer)]
    assert names == [f"blocks.1.token.{part}.quantizer" for part in ("query", "key", "value", "output")]
    with pytest.raises(ConfigError, match=r"match 'blocks.9.\*' names no linear layer; there are blocks.0.token.query"):
        build({"type": "bitlinear", "match": "blocks.9.*"})
    with pytest.raises(ConfigError, match="act_bits: inputs have 2 to 8 bits"):
        build({"type": "bitlinear", "act_bits": 12})


def test_routers_embedding_and_head_stay_as_they_are() -> None:
    model = build({"type": "bitlinear"})
    changed = {name for name, module in model.named_modules() if getattr(module, "quantizer", None) is not None}
    assert len(changed) == 16
    assert all(name.startswith("blocks.") and "router" not in name for name in changed)


def test_cost_is_that_of_the_plain_model() -> None:
    config = build({"type": "bitlinear"}).config
    assert config.cost() == build().config.cost()
    assert config.cost().params == sum(p.numel() for p in build({"type": "bitlinear"}).parameters())


def test_no_future_leaks_and_all_weights_learn() -> None:
    model, ids = build({"type": "bitlinear"}), tokens()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 64
    assert torch.equal(model(ids)[:, :4], model(changed)[:, :4])
    model(ids, ids).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_equality_in_a_bank_of_experts() -> None:
    """A layer that sees its weight expert by expert quantises what it sees."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ColumnParallelLinear(14, 9, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    bank = ExpertBank(3, One)
    initialise(bank, 2)
    with torch.no_grad():
        bank.each.inner.weight *= torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1)
    bank.each.inner.quantizer = BitQuantizer(BitLinearConfig(), bank.each.inner)
    bank.double()
    x, counts = draw(10, 14), [3, 0, 7]
    ours = bank(x, counts)
    for rows, expert, found in zip(x.split(counts), range(3), ours.split(counts), strict=True):
        if len(rows):
            torch.testing.assert_close(found, naive(rows, bank.each.inner.weight[expert], "ternary", True))
    pack(bank)
    torch.testing.assert_close(bank(x, counts), ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_the_largest_input_is_no_matter_of_noise(dtype: torch.dtype) -> None:
    """Whole multiples of one number: 63.5 lies between two codes, whatever rounding did to the number."""
    whole = torch.tensor([[34.0, 17.0, -17.0, 5.0]], dtype=dtype)
    for seed in range(200):
        unit = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.01
        noisy = whole * unit * (1 + torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=dtype) * torch.finfo(dtype).eps)
        codes, _, _ = token_codes(noisy, 8, SINGLE, 1e-6)
        assert codes.tolist() == [[127.0, 63.0, -63.0, 19.0]]
