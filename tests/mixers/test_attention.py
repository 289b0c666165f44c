"""Attention against a loop over positions, with shared key heads, norms, masks, and all gradients."""

import pytest
import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.nn.parameter import Init, initialise
from lightbulb.nn.rope import rotary_angles, rotate

DIM = 24


def build(**values):
    config = build_config(AttentionConfig, {"num_heads": 4} | values)
    module = config.build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    return module.double()


def inputs(length, batch=2):
    return torch.randn(length, batch, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def naive(module, x, documents=None):
    """One query position at a time."""
    length, batch, _ = x.shape
    heads, kv_heads, width = module.heads, module.kv_heads, module.width
    query = module.query(x).view(length, batch, heads, width)
    key = module.key(x).view(length, batch, kv_heads, width)
    value = module.value(x).view(length, batch, kv_heads, width)
    if module.config.qk_norm:
        query, key = (
            t * (t.square().mean(-1, keepdim=True) + module.config.norm_eps).rsqrt() * n.weight
            for t, n in ((query, module.query_norm), (key, module.key_norm))
        )
    cos, sin = rotary_angles(torch.arange(length), width, module.config.rope_theta)
    query, key = (rotate(t, cos.double(), sin.double()) for t in (query, key))
    rows = []
    for t in range(length):
        per_batch = []
        for b in range(batch):
            seen = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
            per_head = []
            for h in range(heads):
                g = h * kv_heads // heads
                weights = (key[seen, b, g] @ query[t, b, h] / width**0.5).softmax(-1)
                per_head.append(weights @ value[seen, b, g])
            per_batch.append(torch.cat(per_head))
        rows.append(torch.stack(per_batch))
    return module.output(torch.stack(rows))


@pytest.mark.parametrize("length", [1, 5, 130])
@pytest.mark.parametrize("values", [{}, {"num_kv_heads": 2, "qk_norm": True}, {"num_kv_heads": 1, "head_dim": 10}])
def test_output_and_gradients_equal_a_loop_over_positions(length, values):
    module, x = build(**values), inputs(length, batch=1 if length > 100 else 2).requires_grad_()
    context = Context(torch.arange(length))
    probe = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, _ = module(x, context)
    grads = torch.autograd.grad((found * probe).sum(), [x, *module.parameters()])
    expected = naive(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # angles are float32 in both
    expected_grads = torch.autograd.grad((expected * probe).sum(), [x, *module.parameters()])
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_documents_do_not_see_each_other():
    module, x = build(num_kv_heads=2), inputs(9)
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 2]])
    found, _ = module(x, Context(torch.arange(9), documents))
    torch.testing.assert_close(found, naive(module, x, documents), rtol=1e-6, atol=1e-7)
    changed = x.clone()
    changed[:3, 0] += 1.0
    again, _ = module(changed, Context(torch.arange(9), documents))
    torch.testing.assert_close(again[3:, 0], found[3:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [10, 1]])
def test_decoding_piece_by_piece_equals_one_pass(pieces):
    module, x = build(num_kv_heads=2, qk_norm=True).float(), inputs(11).float()
    with torch.no_grad():
        whole, _ = module(x, Context(torch.arange(11)))
        state = module.init_state(2, 16, torch.device("cpu"), torch.float32)
        parts, start = [], 0
        for size in pieces:
            part, state = module(x[start : start + size], Context(torch.arange(start, start + size)), state)
            parts.append(part)
            start += size
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        build_config(AttentionConfig, {"num_heads": 4, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="dim 25 does not divide"):
        build_config(AttentionConfig, {"num_heads": 4}).width(25)
