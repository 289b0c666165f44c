"""Attention against its formula in float64, and its promises: causal, decode equals forward, documents apart."""

import pytest
import torch
from torch import Tensor

from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import Attention, AttentionConfig
from lightbulb.nn import attention as blocks
from lightbulb.nn import precision
from lightbulb.nn.attention import attend, self_attention
from lightbulb.nn.parameter import Init, initialise

DIM = 16


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def heads(
    length: int, num_heads: int = 4, kv_heads: int = 2, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    counts = (num_heads, kv_heads, kv_heads)
    return tuple(torch.randn(2, n, length, width).to(dtype).requires_grad_() for n in counts)  # type: ignore[return-value]


def documents(length: int) -> Tensor:
    """``[2, length]``: document ids that differ between the two samples."""
    positions = torch.arange(length)
    return torch.stack([positions // 3, (positions >= length // 2).long()])


def document_mask(length: int) -> Tensor:
    ids = documents(length)
    return (ids[:, :, None] == ids[:, None]).logical_and(torch.ones(length, length, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_core_values_and_gradients(
    length: int, num_heads: int, kv_heads: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_ROWS", 2)
    inputs, mask = heads(length, num_heads, kv_heads), document_mask(length) if masked else None
    assert torch.allclose(self_attention(*inputs, mask), naive(*inputs, mask), atol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: self_attention(*inputs, mask), inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [127, 128, 129, 300])  # a block has 128 rows
def test_blocks_meet_at_their_edges(length: int, masked: bool) -> None:
    inputs, mask = heads(length), document_mask(length) if masked else None
    found, wanted = self_attention(*inputs, mask), naive(*inputs, mask)
    assert torch.allclose(found, wanted, atol=1e-12)
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-11)


def test_longer_sequences_go_to_pytorch_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads(40)
    short = self_attention(*inputs)
    monkeypatch.setattr(blocks, "_LONGEST", 39)
    assert torch.allclose(self_attention(*inputs), short, atol=1e-12)
    assert torch.allclose(attend(*inputs, document_mask(40)), naive(*inputs, document_mask(40)), atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_core_in_lower_precision_is_within_rounding(
    fused: bool, amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    if not fused:
        monkeypatch.setattr(blocks, "_CACHED", 0)
    lower = heads(150, dtype=dtype)
    exact = tuple(t.detach().double().requires_grad_() for t in lower)
    found, wanted = self_attention(*lower), naive(*exact)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert (found - wanted).norm() < tolerance * wanted.norm()
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, lower, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def mixer(dtype: torch.dtype = torch.float64, **changes: object) -> Attention:
    config = AttentionConfig.model_validate({"num_heads": 4, "num_kv_heads": 2, "qk_norm": True} | changes)
    module = config.build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    return module.to(dtype)


def run(module: Attention, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_mixer_values_and_gradients(kv_heads: int | None, qk_norm: bool, bias: str) -> None:
    module = mixer(num_kv_heads=kv_heads, qk_norm=qk_norm, bias=bias)
    biases = [parameter for name, parameter in module.named_parameters() if name.endswith(".bias")]
    assert len(biases) == {"none": 0, "qkv": 3, "all": 4}[bias]
    for parameter in biases:
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 2, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(run(module, x), naive_mixer(module, x), atol=1e-6)  # angles are float32
    parameters = list(module.parameters())
    found, wanted = (torch.autograd.grad((f(module, x) ** 2).sum(), [x, *parameters]) for f in (run, naive_mixer))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def naive_mixer(module: Attention, x: Tensor) -> Tensor:
    """The mixer in plain operations."""
    config, (length, batch, _) = module.config, x.shape
    width = config.width(DIM)
    query, key, value = (
        affine(x, part).view(length, batch, -1, width).permute(1, 2, 0, 3)
        for part in (module.query, module.key, module.value)
    )
    if config.qk_norm:
        query, key = (
            norm.weight * t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            for t, norm in ((query, module.query_norm), (key, module.key_norm))
        )
    frequency = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.arange(length)[:, None] * frequency)
    turned = [torch.complex(*t.chunk(2, -1)) * turn for t in (query, key)]
    query, key = (torch.cat((t.real, t.imag), -1) for t in turned)
    return affine(naive(query, key, value).permute(2, 0, 1, 3).flatten(2), module.output)


def affine(x: Tensor, layer: torch.nn.Module) -> Tensor:
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


def test_the_future_changes_nothing() -> None:
    module, x = mixer(), torch.randn(9, 2, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[6:] += 1.0
    before, after = run(module, x), run(module, changed)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_documents_do_not_see_each_other() -> None:
    module, x = mixer(), torch.randn(8, 2, DIM, dtype=torch.float64)
    whole = run(module, x, documents(8))
    changed = x.clone()
    changed[:3, 0] += 1.0  # the first document of the first sample
    changed[:4, 1] += 1.0  # and of the second
    after = run(module, changed, documents(8))
    assert torch.equal(after[3:, 0], whole[3:, 0]) and torch.equal(after[4:, 1], whole[4:, 1])
    one = torch.zeros(2, 8, dtype=torch.long)
    assert torch.allclose(run(module, x, one), run(module, x), atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [6, 1, 2], [9]], ids=str)
def test_decode_equals_forward(chunks: list[int]) -> None:
    module, x = mixer(), torch.randn(9, 3, DIM, dtype=torch.float64)
    state, parts, start = module.init_state(3, 12, x.device, x.dtype), [], 0
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, Context(torch.arange(start, start + len(chunk))), state)
            parts.append(part)
            start += len(chunk)
        assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


def test_what_is_not_finite_stays_in_its_sample_and_shows_from_its_token_on() -> None:
    module, x = mixer(), torch.randn(6, 2, DIM, dtype=torch.float64)
    broken = x.clone()
    broken[4, 1] = float("nan")
    clean, found = run(module, x), run(module, broken)
    assert torch.equal(found[:, 0], clean[:, 0]) and found[4:, 1].isnan().all()
