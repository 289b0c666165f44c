"""Which kernel computes an attention: FlexAttention's plain forward, flash-attn by a stand-in with its interface."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import Attention, AttentionConfig
from lightbulb.nn import attention_backend, flash
from lightbulb.nn.attention_mask import Rule, Tokens, Visibility
from lightbulb.nn.parameter import Init, initialise

DIM, LENGTH = 32, 10

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "distance": {"max_distance": 4},
    "encoder": {"causal": False},
    "encoder window": {"causal": False, "window": 3},
}
SINKS = {"softmax1": {"sink": "one"}, "learned sink": {"sink": "learned", "window": 5}}
LAMBDA = {"lambda": {"max_distance": 4, "num_global": 1, "rope_theta": None}}


def mixer(backend: str, options: dict[str, Any]) -> Attention:
    config = AttentionConfig.model_validate({"num_heads": 4, "num_kv_heads": 2, "backend": backend} | options)
    module = config.build(DIM, LENGTH, Init(0.3, 0.3))
    initialise(module, 0)
    return module


def inputs() -> Tensor:
    return torch.randn(LENGTH, 2, DIM, generator=torch.Generator().manual_seed(0))


def contexts() -> dict[str, Context]:
    places, gist = torch.arange(LENGTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    gist[:, 4] = True
    spread = torch.stack((places + places // 4, places * 2), 1)
    present = torch.ones(2, LENGTH, dtype=torch.bool)
    present[0, 7:] = present[1, 2] = False
    return {
        "whole": Context(places),
        "documents": Context(places, torch.stack((places // 4, (places > 6).long()))),
        "gists": Context(places, gist=gist),
        "gaps": Context(spread, present=present),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "name"),  # each takes seconds: FlexAttention traces what it runs, on CPU too
    [
        (SINKS["learned sink"], "documents"),
        (RULES["encoder window"], "gists"),
        (LAMBDA["lambda"], "whole"),
        (RULES["plain"], "gaps"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equality_flex_is_sdpa(options: dict[str, Any], name: str) -> None:
    context = contexts()[name]
    found, wanted = (mixer(backend, options)(inputs(), context)[0] for backend in ("flex", "sdpa"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_flex_does_not_train_on_cpu() -> None:
    with pytest.raises(ValueError, match="backend 'flex' has no backward on CPU; set backend: auto"):
        mixer("flex", {})(inputs(), contexts()["whole"])


# --- tiles


@pytest.mark.parametrize("options", [*RULES.values(), *SINKS.values(), *LAMBDA.values()], ids=str)
@pytest.mark.parametrize("name", ["whole", "documents"])
def test_equality_tiles_are_sdpa(options: dict[str, Any], name: str) -> None:
    context, results = contexts()[name], []
    for backend in ("tiles", "sdpa"):
        x, module = inputs().double().requires_grad_(), mixer(backend, options).double()
        y = module(x, context)[0]
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([y, *torch.autograd.grad(y, (x, *module.parameters()), grad)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_equality_tiles_of_documents_that_began_earlier() -> None:
    places = torch.arange(LENGTH)
    ids = torch.stack((places // 4, (places > 6).long()))
    context = Context(places, ids, ages=torch.where(ids == 0, places + 2, places - 4 * ids))
    for options in LAMBDA.values():
        found, wanted = (mixer(backend, options)(inputs(), context)[0] for backend in ("tiles", "sdpa"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [("gists", "tiles have no mask for gist tokens"), ("gaps", "tiles take no positions per sample")],
)
def test_what_tiles_cannot_do_is_said(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"backend 'tiles': {why}; set backend: auto"):
        mixer("tiles", {})(inputs(), contexts()[name])


# --- flash-attn


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """flash-attn's function for ``[batch, length, heads, width]``: keys from ``window_size[0]`` places before to
    ``window_size[1]`` after, -1 for all."""
    before, after = window_size
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = (distance <= before) | (before < 0)
    seen &= distance >= 0 if causal else (-distance <= after) | (after < 0)
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bqhw,bkhw->bhqk", q, k) / q.shape[3] ** 0.5
    return torch.einsum("bhqk,bkhw->bqhw", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """The same for sequences laid end to end, ``[rows, heads, width]``."""
    assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and cu_q[0] == 0 and cu_q[-1] == len(q)
    assert max_q == max_k == int(cu_q.diff().max())
    spans = [slice(int(a), int(b)) for a, b in zip(cu_q, cu_q[1:], strict=False)]
    return torch.cat([flash_attn_func(q[s][None], k[s][None], v[s][None], **options)[0] for s in spans])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is there, and takes any device and dtype."""
    stand_in = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(flash, "package", lambda: stand_in)
    monkeypatch.setattr(
        attention_backend, "obstacle", lambda query, seen, sink: flash.unsupported(query.half(), seen, sink)
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", ["whole", "documents"])
@pytest.mark.parametrize("backend", ["flash", "auto"])
def test_equality_flash_is_sdpa(
    options: dict[str, Any], name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, x = contexts()[name], inputs()
    wanted = mixer("sdpa", options)(x, context)[0]
    monkeypatch.setattr(attention_backend, "self_attention", None)  # nothing else may run
    found = mixer(backend, options)(x, context)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "name", "why"),
    [
        ({}, "gists", "flash-attn has no mask for gist tokens"),
        ({}, "gaps", "flash-attn takes no positions per sample"),
        ({"head_dim": 258}, "whole", "flash-attn takes heads up to 256 wide, not 258"),
    ],
)
def test_what_flash_cannot_do_is_said_and_auto_does_it(options: dict[str, Any], name: str, why: str) -> None:
    context, x = contexts()[name], inputs()
    with pytest.raises(ValueError, match=f"backend 'flash': {why}; set backend: auto"):
        mixer("flash", options)(x, context)
    assert torch.equal(mixer("auto", options)(x, context)[0], mixer("sdpa", options)(x, context)[0])


@pytest.mark.usefixtures("installed")
def test_auto_leaves_sinks_and_lambda_masks_to_others() -> None:
    x, context = inputs(), contexts()["whole"]
    for options in (*SINKS.values(), *LAMBDA.values()):
        assert torch.equal(mixer("auto", options)(x, context)[0], mixer("sdpa", options)(x, context)[0])


def test_flash_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "package", lambda: None)
    with pytest.raises(ValueError, match="backend 'flash': the package flash-attn is not installed; set backend: auto"):
        mixer("flash", {})(inputs(), contexts()["whole"])
    monkeypatch.setattr(flash, "package", lambda: SimpleNamespace())
    with pytest.raises(ValueError, match="backend 'flash': flash-attn runs on CUDA, not on cpu; set backend: auto"):
        mixer("flash", {})(inputs(), contexts()["whole"])


def test_flash_computes_in_half_precision_only() -> None:
    tokens = Tokens(torch.arange(3)[None], torch.arange(3)[None])
    seen = Visibility(Rule(), tokens, tokens, consecutive=True, plain=True)
    reason = flash.unsupported(torch.zeros(1, 1, 3, 4), seen, None)
    assert reason == "flash-attn computes in float16 or bfloat16, not in torch.float32"
    assert flash.unsupported(torch.zeros(1, 1, 3, 4).bfloat16(), seen, None) is None
