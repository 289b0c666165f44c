"""Mamba-2 against its formula and transformers', and its promises: causal, decode equals forward, documents apart."""

import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.mamba import Mamba, MambaConfig, Scan
from lightbulb.mixers.token.retention import RetentionConfig
from lightbulb.nn import mamba_kernels
from lightbulb.nn.parameter import Init, initialise, logical_of
from lightbulb.ops import linear_recurrence

DIM = 16
SMALL = {"state_dim": 6, "head_dim": 8, "chunk_size": 4}  # four heads
VARIANTS = [{}, {"num_groups": 2}, {"num_groups": 4, "expand": 1, "head_dim": 2}, {"conv_width": 1}]
each_variant = pytest.mark.parametrize("changes", VARIANTS, ids=str)


def mixer(dtype: torch.dtype = torch.float64, **changes: object) -> Mamba:
    module = MambaConfig.model_validate(SMALL | changes).build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    for parameter in module.parameters():
        if dtype != torch.bfloat16 or not logical_of(parameter).keep_fp32:
            parameter.data = parameter.data.to(dtype)
    return module


def hidden(length: int, batch: int = 2) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(length, batch, DIM, dtype=torch.float64, requires_grad=True)


def run(module: Mamba, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


def grads(y: Tensor, x: Tensor, module: Mamba) -> list[Tensor]:
    return list(torch.autograd.grad((y**2).sum(), [x, *module.parameters()]))


def naive_scan(module: Mamba, scan: Scan, x: Tensor) -> Tensor:
    """The paper's recurrence, token by token, of one whole document ``x [length, batch, dim]``."""
    config, (length, batch, _) = module.config, x.shape

    def smooth(layer: torch.nn.Module, conv: torch.nn.Module) -> Tensor:
        features = (x @ layer.weight.t()).permute(1, 2, 0)
        past = config.conv_width - 1
        return silu(conv1d(features, conv.weight[:, None], conv.bias, padding=past, groups=features.shape[1]))[
            ..., :length
        ].permute(2, 0, 1)

    values = smooth(module.value, scan.value_conv).unflatten(2, (-1, config.head_dim))
    heads = values.shape[2]
    keys, queries = (
        smooth(*layers).unflatten(2, (config.num_groups, -1)).repeat_interleave(heads // config.num_groups, 2)
        for layers in ((scan.key, scan.key_conv), (scan.query, scan.query_conv))
    )
    steps, rates = softplus(x @ scan.step.weight.t() + scan.step_bias), -scan.log_rate.exp()
    state, results = x.new_zeros(batch, heads, config.state_dim, config.head_dim), []
    for t in range(length):
        written = keys[t][..., None] * (steps[t][..., None] * values[t])[..., None, :]
        state = (steps[t] * rates).exp()[..., None, None] * state + written
        results.append((queries[t][..., None, :] @ state)[..., 0, :] + scan.skip[:, None] * values[t])
    return torch.stack(results).flatten(2)


def naive(module: Mamba, x: Tensor) -> Tensor:
    config = module.config
    mixed = naive_scan(module, module.scan, x)
    if config.bidirectional:
        mixed = mixed + naive_scan(module, module.reversed_scan, x.flip(0)).flip(0)
    gated = (mixed * silu(x @ module.gate.weight.t())).unflatten(-1, (config.num_groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return (normed.flatten(-2) * module.norm.weight) @ module.output.weight.t()


@pytest.mark.parametrize("bidirectional", [False, True])
@each_variant
@pytest.mark.parametrize("length", [1, 3, 11])
def test_equality_mixer_is_the_papers_recurrence(length: int, changes: dict[str, object], bidirectional: bool) -> None:
    module, x = mixer(**changes, bidirectional=bidirectional), hidden(length)
    found, wanted = run(module, x), naive(module, x)
    assert torch.allclose(found, wanted, atol=1e-10)
    for ours, theirs in zip(grads(found, x, module), grads(wanted, x, module), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
@each_variant
def test_equality_documents_are_separate_runs(changes: dict[str, object], bidirectional: bool) -> None:
    module, x = mixer(**changes, bidirectional=bidirectional), hidden(11)
    ids = torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [0] * 9 + [1] * 2])
    found = run(module, x, ids)
    alone = [
        torch.cat([run(module, part) for part in x[:, sample : sample + 1].split(cuts)])
        for sample, cuts in enumerate(([4, 1, 6], [9, 2]))
    ]
    wanted = torch.cat(alone, dim=1)
    assert torch.allclose(found, wanted, atol=1e-12)
    for ours, theirs in zip(grads(found, x, module), grads(wanted, x, module), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_equality_any_chunk_size(chunk_size: int) -> None:
    x = hidden(13)
    assert torch.allclose(run(mixer(chunk_size=chunk_size), x), run(mixer(), x), atol=1e-12)


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [6, 1, 4], [11], [2, 1, 1, 7]], ids=str)
@each_variant
def test_equality_steps_are_forward(changes: dict[str, object], cuts: Sequence[int]) -> None:
    module, x = mixer(**changes), hidden(11, batch=3)
    state, parts, start = module.init_state(3, 12, x.device, x.dtype), [], 0
    shapes = {name: t.shape for name, t in state.items()}
    with torch.no_grad():
        for piece in x.split(list(cuts)):
            part, state = module(piece, Context(torch.arange(start, start + len(piece))), state)
            assert {name: t.shape for name, t in state.items()} == shapes
            parts.append(part)
            start += len(piece)
        assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


def test_decode_state_is_wide() -> None:
    module = mixer(torch.bfloat16)
    state = module.init_state(2, 9, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        y, after = module(torch.randn(1, 2, DIM, dtype=torch.bfloat16), Context(torch.arange(1)), state)
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and len(t) == 2 for t in (*state.values(), *after.values()))


def test_equality_constant_decay_is_retention_without_rotation() -> None:
    """Mamba's form, one decay per token, with retention's rates; retention with features that do not turn."""
    x = hidden(11)
    retention = RetentionConfig(num_heads=4, rope_theta=1e300, chunk_size=4).build(DIM, 64, Init(0.3, 0.3)).double()
    initialise(retention, 0)
    with torch.no_grad():
        for layer in (retention.query, retention.key):
            layer.weight.view(4, 4, DIM)[:, [0, 2]] = 0.0  # the pair that turns whatever the base; the other rests
    layers = (retention.query, retention.key, retention.value)
    query, key, value = ((x @ layer.weight.t()).unflatten(-1, (4, -1)).permute(1, 2, 0, 3) for layer in layers)
    decay = retention.config.log_decay()[:, None].expand(2, 4, 11)
    mixed, _ = linear_recurrence(query / 2.0, key, value, decay, chunk_size=4)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + retention.config.norm_eps).sqrt()
    gate = silu(x @ retention.gate.weight.t())
    wanted = (gate * mixed.permute(2, 0, 1, 3).flatten(2)) @ retention.output.weight.t()
    assert torch.allclose(retention(x, Context(torch.arange(11)))[0], wanted, atol=1e-12)


def test_steps_of_zero_keep_the_state() -> None:
    module, x = mixer(), hidden(9)
    with torch.no_grad():
        module.scan.step.weight.zero_()
        module.scan.step_bias.fill_(-1e3)
        state = module.init_state(2, 9, x.device, x.dtype)
        state["memory"].normal_()
        after = module(x, Context(torch.arange(9)), state)[1]
    assert torch.equal(after["memory"], state["memory"])


def test_equality_no_rate_and_unit_steps_are_linear_attention() -> None:
    module, x = mixer(conv_width=1), hidden(9)
    scan = module.scan
    with torch.no_grad():
        scan.step.weight.zero_()
        scan.step_bias.fill_(torch.expm1(torch.ones((), dtype=torch.float64)).log())
        scan.log_rate.fill_(-torch.inf)
        scan.skip.zero_()

    def smooth(layer: torch.nn.Module, conv: torch.nn.Module) -> Tensor:
        return silu((x @ layer.weight.t()) * conv.weight[:, 0] + conv.bias).transpose(0, 1)

    query, key = smooth(scan.query, scan.query_conv), smooth(scan.key, scan.key_conv)
    value = smooth(module.value, scan.value_conv)
    mixed = ((query @ key.transpose(1, 2)).tril() @ value).transpose(0, 1)
    wanted = module.output(module.norm(silu(module.gate(x)) * mixed))
    assert torch.allclose(run(module, x), wanted, atol=1e-12)


def test_the_future_changes_nothing() -> None:
    module, x = mixer(), hidden(11)
    changed = x.detach().clone()
    changed[6:] += 1.0
    before, after = run(module, x), run(module, changed)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_equality_reversed_input_with_swapped_directions_is_the_reversed_output() -> None:
    module, swapped, x = mixer(bidirectional=True), mixer(bidirectional=True), hidden(11)
    swapped.scan.load_state_dict(module.reversed_scan.state_dict())
    swapped.reversed_scan.load_state_dict(module.scan.state_dict())
    ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
    for documents in (None, ids):
        back = None if documents is None else documents.flip(1)
        assert torch.allclose(run(swapped, x.flip(0), back), run(module, x, documents).flip(0), atol=1e-12)
    assert not torch.allclose(run(module, x.flip(0)), run(module, x).flip(0))


def test_equality_without_its_backward_direction_it_is_the_causal_mixer() -> None:
    both, causal, x = mixer(bidirectional=True), mixer(), hidden(11)
    causal.load_state_dict({n: t for n, t in both.state_dict().items() if not n.startswith("reversed_scan.")})
    with torch.no_grad():
        both.reversed_scan.query_conv.weight.zero_()
        both.reversed_scan.query_conv.bias.zero_()
        both.reversed_scan.skip.zero_()
    assert torch.allclose(run(both, x), run(causal, x), atol=1e-12)


def test_both_directions_see_everything_in_their_document() -> None:
    module, x = mixer(bidirectional=True), hidden(8)
    ids = (torch.arange(8) >= 5).long().expand(2, -1)
    (seen,) = torch.autograd.grad(run(module, x, ids)[2].sum(), x)
    assert seen[:5].abs().amin(0).amax() > 0 and not seen[5:].any()


def test_bidirectional_refuses_to_decode() -> None:
    with pytest.raises(ValueError, match="set bidirectional: false"):
        mixer(bidirectional=True).init_state(1, 4, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_equality_transformers_mamba2(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    module, x = mixer(torch.float32, state_dim=16), hidden(length).detach().float()
    settings = {"num_heads": 4, "head_dim": 8, "hidden_size": DIM, "state_size": 16, "n_groups": 1, "expand": 2}
    theirs = modeling.Mamba2Mixer(Mamba2Config(**settings, chunk_size=8, layer_norm_epsilon=1e-5), 0)
    scan, convs = module.scan, (module.scan.value_conv, module.scan.key_conv, module.scan.query_conv)
    with torch.no_grad():
        parts = (module.gate, module.value, scan.key, scan.query, scan.step)
        theirs.in_proj.weight.copy_(torch.cat([layer.weight for layer in parts]))
        theirs.conv1d.weight.copy_(torch.cat([conv.weight for conv in convs])[:, None])
        theirs.conv1d.bias.copy_(torch.cat([conv.bias for conv in convs]))
        theirs.A_log.copy_(scan.log_rate)
        theirs.dt_bias.copy_(scan.step_bias)
        theirs.D.copy_(scan.skip)
        theirs.norm.weight.copy_(module.norm.weight)
        theirs.out_proj.weight.copy_(module.output.weight)
        wanted = theirs.torch_forward(x.transpose(0, 1)).transpose(0, 1)
        assert torch.allclose(run(module, x), wanted, atol=2e-5)


def fake_kernel(calls: list[dict[str, object]]) -> object:
    """mamba-ssm's scan by its own documentation, token by token."""

    def scan(x, dt, a, b, c, chunk_size, D, seq_idx):  # type: ignore[no-untyped-def]
        calls.append({"chunk_size": chunk_size, "seq_idx": seq_idx})
        state, results = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
        b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
        for t in range(x.shape[1]):
            if t and seq_idx is not None:
                state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
            written = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
            state = (dt[:, t] * a).exp()[..., None, None] * state + written
            results.append((state @ c[:, t][..., None])[..., 0] + D[:, None] * x[:, t])
        return torch.stack(results, 1)

    return scan


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("with_documents", [False, True])
def test_equality_behind_the_door_to_the_kernels(
    num_groups: int, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = mixer(num_groups=num_groups), hidden(11)
    ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2]) if with_documents else None
    wanted, calls = run(module, x, ids), []
    monkeypatch.setattr(mamba_kernels, "can_scan", lambda values: True)
    monkeypatch.setattr(mamba_kernels, "mamba_chunk_scan_combined", fake_kernel(calls))
    assert torch.allclose(run(module, x, ids), wanted, atol=1e-12)
    assert len(calls) == 1 and (calls[0]["seq_idx"] is not None) == with_documents


def test_kernels_are_for_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(mamba_kernels, "mamba_chunk_scan_combined", None)
    assert not mamba_kernels.can_scan(on_cuda)  # type: ignore[arg-type]
    monkeypatch.setattr(mamba_kernels, "mamba_chunk_scan_combined", fake_kernel([]))
    assert mamba_kernels.can_scan(on_cuda)  # type: ignore[arg-type]
    assert not mamba_kernels.can_scan(torch.zeros(1))


def test_equality_recompute_changes_nothing() -> None:
    module, x = mixer(bidirectional=True), hidden(11)
    plain = run(module, x)
    again = module(x, Context(torch.arange(11), recompute="selective"))[0]
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(grads(plain, x, module), grads(again, x, module), strict=True))


def test_bfloat16_is_close() -> None:
    exact, lower, x = mixer(), mixer(torch.bfloat16), hidden(50).detach().bfloat16()
    assert lower.scan.log_rate.dtype == torch.float32
    found, wanted = run(lower, x), run(exact, x.double())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 3e-2 * wanted.norm()


def test_initial_values_are_the_papers() -> None:
    module = MambaConfig(head_dim=1, state_dim=2).build(256, 64, Init(0.02, 0.02))
    initialise(module, 0)
    scan = module.scan
    rates, steps = scan.log_rate.exp(), softplus(scan.step_bias)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16 and abs(rates.mean() - 8.5) < 1
    assert 0.00099 < steps.min() < 0.002 and 0.05 < steps.max() < 0.101
    assert 0.008 < steps.median() < 0.0125  # in the middle of the logarithm
    assert (scan.skip == 1).all() and 0.4 < scan.value_conv.weight.abs().max() <= 0.5
    assert all(logical_of(p).keep_fp32 and p.ndim == 1 for p in (scan.log_rate, scan.step_bias, scan.skip))


@pytest.mark.parametrize("bidirectional", [False, True])
@each_variant
def test_cost_counts_the_parameters(changes: dict[str, object], bidirectional: bool) -> None:
    module = mixer(**changes, bidirectional=bidirectional)
    assert module.config.cost(DIM, 64).params == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("field", ["rate_range", "step_range"])
def test_ranges_must_rise(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} .* is no range"):
        build_config(MambaConfig, {field: [2.0, 1.0]})


def test_shapes_and_layouts_that_cannot_be() -> None:
    init = Init(0.1, 0.1)
    with pytest.raises(ValueError, match="head_dim 64 does not divide expand 2 x dim 48 = 96"):
        MambaConfig().build(48, 16, init)
    with pytest.raises(ValueError, match="num_groups 3 does not divide the 4 heads"):
        MambaConfig(num_groups=3, head_dim=8).build(16, 16, init)
    config = MambaConfig(num_groups=2)
    config.check_tensor_parallel(2)
    config.check_ulysses(2, 2)
    MambaConfig().check_ulysses(2, 4)
    with pytest.raises(ValueError, match="num_groups 2 cannot be split over parallel.tensor 4"):
        config.check_tensor_parallel(4)
    with pytest.raises(ValueError, match="num_groups 2 cannot be split over parallel.tensor 1 x parallel.ulysses 4"):
        config.check_ulysses(1, 4)
