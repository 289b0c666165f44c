"""KAN layers against a naive evaluation of every edge, and what they keep for the backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from lightbulb.config import build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.kan import KAN, KANConfig
from lightbulb.mixers.channel.switch import Switch, SwitchConfig
from lightbulb.nn import splines
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.linear import Adapter, Quantizer
from lightbulb.nn.parameter import Init, initialise
from lightbulb.nn.splines import Basis, SplineLinear, cubic_basis, gaussian_basis, spline_linear, standardise

DIM, HIDDEN, LENGTH, BATCH = 5, 7, 9, 2
BASES: dict[str, Callable[[], Basis]] = {"fastkan": gaussian_basis, "bspline": cubic_basis}
both = pytest.mark.parametrize("name", BASES)


def kan(name: str, dtype: torch.dtype = torch.float64) -> KAN:
    module = KANConfig.model_validate({"hidden_dim": HIDDEN, "basis": name}).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module.to(dtype)


def draw(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randn(length, batch, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(module: KAN | Switch, x: Tensor) -> Tensor:
    return module(x, Context(torch.arange(len(x))))[0]


def b_spline(x: Tensor, i: int, order: int, knots: list[float]) -> Tensor:
    """Cox and de Boor's recursion."""
    if order == 0:
        return ((knots[i] <= x) & (x < knots[i + 1])).to(x.dtype)
    left = (x - knots[i]) / (knots[i + order] - knots[i])
    right = (knots[i + order + 1] - x) / (knots[i + order + 1] - knots[i + 1])
    return left * b_spline(x, i, order - 1, knots) + right * b_spline(x, i + 1, order - 1, knots)


def naive_bases(x: Tensor, name: str) -> Tensor:
    """``[..., in]`` to ``[..., in, bases]``."""
    if name == "fastkan":
        centres = torch.linspace(-2, 2, 8, dtype=x.dtype)
        return torch.stack([torch.exp(-(((x - u) / (4 / 7)) ** 2)) for u in centres], -1)
    step, order = 2 / 5, 3
    knots = [-1 + step * i for i in range(-order, 5 + order + 1)]
    return torch.stack([b_spline(x, i, order, knots) for i in range(5 + order)], -1)


@both
def test_equality_bases_are_those_of_the_papers(name: str) -> None:
    x = torch.linspace(-4, 4, 401).double()
    values = BASES[name]().values(x)
    assert torch.allclose(values, naive_bases(x, name), atol=1e-12)
    assert values.min() >= 0 and values.max() <= 1


def test_equality_splines_sum_to_one_inside_their_range_and_vanish_outside() -> None:
    x = torch.linspace(-1, 1, 201).double()
    assert torch.allclose(cubic_basis().values(x).sum(-1), torch.ones_like(x), atol=1e-12)
    assert not cubic_basis().values(torch.tensor([-2.3, 2.3, 40.0])).any()


def naive_layer(edges: Any, x: Tensor, name: str) -> Tensor:
    """Edge by edge: ``y_o = sum_i phi_oi(x_i)``."""
    inputs = layer_norm(x, x.shape[-1:]) * (1.0 if name == "fastkan" else 0.5)
    base, spline = edges.base.weight, edges.spline.weight.view(len(edges.base.weight), x.shape[-1], 8)
    outputs = []
    for o in range(len(base)):
        edges_of = [
            base[o, i] * silu(x[..., i]) + (naive_bases(inputs[..., i], name) * spline[o, i]).sum(-1)
            for i in range(x.shape[-1])
        ]
        outputs.append(torch.stack(edges_of).sum(0))
    return torch.stack(outputs, -1)


def naive(module: KAN, x: Tensor, name: str) -> Tensor:
    return naive_layer(module.down, naive_layer(module.up, x, name), name)


def agree(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    assert torch.allclose(ours, theirs, atol=tolerance)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert b.any() and torch.allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("rows_at_a_time", [32, 2**18])
@both
def test_equality_efficient_is_edge_by_edge(name: str, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splines, "_CPU_VALUES", rows_at_a_time)
    module, x = kan(name), draw(25).requires_grad_()
    agree(run(module, x), naive(module, x, name), [x, *module.parameters()])


@both
def test_equality_core_passes_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3).double().requires_grad_(), torch.randn(2, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: spline_linear(x, weight, BASES[name]()), (x, weight))
    assert torch.autograd.gradcheck(lambda x: standardise(x, SINGLE), x)


@both
def test_equality_without_splines_it_is_linear_layers_of_silu(name: str) -> None:
    module, x = kan(name), draw()
    with torch.no_grad():
        module.up.spline.weight.zero_()
        module.down.spline.weight.zero_()
    wanted = silu(silu(x) @ module.up.base.weight.t()) @ module.down.base.weight.t()
    assert torch.allclose(run(module, x), wanted, atol=1e-12)


@both
def test_gradients_are_finite_outside_the_grid(name: str) -> None:
    x, weight = torch.tensor([[-1e4, -3.0, 2.0, 1e30]], requires_grad=True), torch.randn(2, 32, requires_grad=True)
    for grad in torch.autograd.grad(spline_linear(x, weight, BASES[name]()).sum(), (x, weight)):
        assert grad.isfinite().all()
    module, extreme = kan(name), draw() * 1e6
    for grad in torch.autograd.grad((run(module, extreme.requires_grad_()) ** 2).sum(), list(module.parameters())):
        assert grad.isfinite().all()


@both
def test_a_token_depends_on_itself_only(name: str) -> None:
    module, x = kan(name), draw()
    changed = x.clone()
    changed[4, 1] += 1.0
    same = torch.ones(LENGTH, BATCH, dtype=torch.bool)
    same[4, 1] = False
    assert torch.equal(run(module, changed)[same], run(module, x)[same])


class Signs(Quantizer):
    """Weights to signs, inputs to tenths, straight through."""

    def input(self, x: Tensor) -> Tensor:
        return x + (x.mul(10).round().div(10) - x).detach()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight + (weight.sign() - weight).detach()


class LowRank(Adapter):
    def __init__(self, layer: SplineLinear, experts: tuple[int, ...] = ()):
        super().__init__()
        out, features = layer.weight.shape[-2:]
        self.down = torch.nn.Parameter(torch.randn(*experts, 2, features).double())
        self.up = torch.nn.Parameter(torch.randn(*experts, out, 2).double())

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        return x @ self.down.t() @ self.up.t()


@both
def test_equality_slots_see_the_bases_as_inputs(name: str) -> None:
    torch.manual_seed(0)
    layer, x = kan(name).up.spline, draw().requires_grad_()
    assert layer.has_bounded_input
    layer.quantizer, layer.adapter = Signs(), LowRank(layer)
    bases = naive_bases(x, name).flatten(-2)
    wanted = Signs().input(bases) @ Signs().matrix(layer.weight).t() + layer.adapter(bases)
    agree(layer(x), wanted, [x, *layer.parameters()])


def kept_bytes(module: KAN, x: Tensor) -> int:
    """What the backward needs, parameters aside."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(module, x)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in sizes.items() if place not in parameters)


@pytest.mark.parametrize("modified", [False, True])
@both
def test_bases_are_not_kept(name: str, modified: bool) -> None:
    module, x = kan(name), draw(200)
    if modified:
        for layer in (module.up.spline, module.down.spline):
            layer.quantizer, layer.adapter = Signs(), LowRank(layer)
    values = 8 * 200 * BATCH * (DIM + HIDDEN)  # bytes of all inputs of both layers
    # Of each input itself, silu and the standardised one; half for statistics and what adapters keep between
    # their two small matrices. The bases alone would be eight.
    assert kept_bytes(module, x) <= 3.5 * values


@both
def test_bfloat16_is_close_to_float32(name: str) -> None:
    half, single = kan(name, torch.bfloat16), kan(name, torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(single.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    x = draw(40).bfloat16()
    found, wanted = run(half, x), run(single, x.float())
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.02 * wanted.norm()
    (found.float() ** 2).sum().backward()
    (wanted**2).sum().backward()
    for ours, theirs in zip(half.parameters(), single.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm()


def switch(name: str) -> Switch:
    values = {
        "num_experts": 4,
        "expert": {"type": "kan", "hidden_dim": HIDDEN, "basis": name},
        "router": {"balance_loss": 0.0, "z_loss": 0.0},
    }
    module = build_config(SwitchConfig, values).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module.double()


def adapt(module: Switch) -> None:
    for layer in (module.experts.each.up.spline, module.experts.each.down.spline):
        layer.quantizer, layer.adapter = Signs(), LowRank(layer, (4,))


@pytest.mark.parametrize("modified", [False, True])
@both
def test_equality_a_switch_of_kans_is_a_loop_over_tokens(name: str, modified: bool) -> None:
    torch.manual_seed(0)
    module, x = switch(name), draw().requires_grad_()
    if modified:
        adapt(module)
    names = dict(module.experts.each.named_parameters())

    def loop(x: Tensor) -> Tensor:
        gates, experts = (x @ module.router.weight.t()).topk(2)
        rows = []
        for token, gate, chosen in zip(
            x.flatten(0, 1), gates.softmax(-1).flatten(0, 1), experts.flatten(0, 1), strict=True
        ):
            results = []
            for e in chosen.tolist():
                own = {key: value[e] for key, value in names.items()}
                results.append(one(own, token[None, None]))
            rows.append(sum(g * result[0, 0] for g, result in zip(gate, results, strict=True)))
        return torch.stack(rows).view_as(x)

    def one(own: dict[str, Tensor], token: Tensor) -> Tensor:
        for layer in ("up", "down"):
            bases = naive_bases(layer_norm(token, token.shape[-1:]) * (1.0 if name == "fastkan" else 0.5), name)
            bases, weight = bases.flatten(-2), own[f"{layer}.spline.weight"]
            if modified:
                low, up = own[f"{layer}.spline.adapter.down"], own[f"{layer}.spline.adapter.up"]
                edges = Signs().input(bases) @ Signs().matrix(weight).t() + bases @ low.t() @ up.t()
            else:
                edges = bases @ weight.t()
            token = silu(token) @ own[f"{layer}.base.weight"].t() + edges
        return token

    agree(run(module, x), loop(x), [x, *module.parameters()])


@both
def test_equality_cost_is_what_is_built(name: str) -> None:
    cost = KANConfig.model_validate({"hidden_dim": HIDDEN, "basis": name}).cost(DIM)
    assert cost.params == cost.active_params == sum(p.numel() for p in kan(name).parameters())
    assert cost.forward_flops == 2 * cost.params


def test_what_cannot_be_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"hidden_dim 7 cannot be split over parallel\.tensor 2; choose a multiple"):
        KANConfig(hidden_dim=7).check_tensor_parallel(2)
    expert = {"type": "kan", "hidden_dim": 7}
    with pytest.raises(ValueError, match=r"hidden_dim 7 cannot be split"):
        build_config(SwitchConfig, {"num_experts": 4, "expert": expert}).check_expert_parallel(2, 2)


def test_what_writes_to_the_residual_starts_small() -> None:
    module = KANConfig(hidden_dim=64).build(64, Init(0.5, 0.08))
    initialise(module, 0)
    layers = module.up.base, module.up.spline, module.down.base, module.down.spline
    for layer, std in zip(layers, (0.5, 0.5, 0.08, 0.01), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.1)
