"""Attention with each of its options, and its formula pair by pair."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import Attention, AttentionConfig
from lightbulb.nn.parameter import Init, initialise

DIM, LENGTH = 16, 9
NO_TURN = {"rope_theta": None}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no positions": NO_TURN,
    "window": {"window": 3},
    "wide norm": {"qk_norm": True, "qk_norm_over": "all_heads", "window": 5},
    "softmax1": {"sink": "one"},
    "learned sink": {"sink": "learned", "window": 4, "num_kv_heads": 1},
    "lambda": {"max_distance": 3, "num_global": 2},
    "lambda with sink": {"max_distance": 4, "num_global": 1, "sink": "learned"},
    "disentangled": NO_TURN | {"relative_positions": 3},
    "disentangled window": NO_TURN | {"relative_positions": 2, "window": 5, "sink": "one", "qk_norm": False},
    "temperature": {"adaptive_temperature": True},
    "everything": NO_TURN
    | {"relative_positions": 2, "max_distance": 5, "num_global": 1, "sink": "learned", "adaptive_temperature": True},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bidirectional": {"causal": False},
    "bidirectional window": {"causal": False, "window": 3, "sink": "learned"},
    "bidirectional disentangled": NO_TURN | {"causal": False, "relative_positions": 3},
}
causal_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
all_options = pytest.mark.parametrize("options", (OPTIONS | ENCODERS).values(), ids=(OPTIONS | ENCODERS).keys())


def mixer(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Attention:
    config = AttentionConfig.model_validate({"num_heads": 4, "num_kv_heads": 2, "qk_norm": True} | options)
    module = config.build(DIM, 64, Init(0.4, 0.4))
    initialise(module, 0)
    if config.sink == "learned":
        torch.nn.init.normal_(module.sink, generator=torch.Generator().manual_seed(1))
    return module.to(dtype).eval()


def inputs(length: int = LENGTH, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(length, batch, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def documents(length: int = LENGTH) -> Tensor:
    places = torch.arange(length)
    return torch.stack([places // 4, (places >= 7).long()])


def run(module: Attention, x: Tensor, **given: Any) -> Tensor:
    return module(x, Context(given.pop("positions", torch.arange(len(x))), **given))[0]


def decode(module: Attention, x: Tensor, chunks: list[int], contexts: Callable[[int, int], Context]) -> Tensor:
    """The mixer's results chunk by chunk."""
    state, parts, start = module.init_state(x.shape[1], 24, x.device, x.dtype), [], 0
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, contexts(start, start + len(chunk)), state)
            parts.append(part)
            start += len(chunk)
    return torch.cat(parts)


# --- against the formulas, pair by pair


def sees(config: AttentionConfig, n: int, m: int, first: int) -> bool:
    """Whether position n sees m, in a document that begins at ``first``."""
    if config.causal and m > n:
        return False
    if config.max_distance is not None and n - m >= config.max_distance:
        return m - first < config.num_global
    return config.window is None or abs(n - m) < config.window


def turn(x: Tensor, position: int, theta: float | None) -> Tensor:
    if theta is None:
        return x
    frequency = theta ** -(torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
    turned = torch.complex(*x.chunk(2)) * torch.polar(torch.ones((), dtype=torch.float64), position * frequency)
    return torch.cat((turned.real, turned.imag))


def score(module: Attention, query: Tensor, key: Tensor, n: int, m: int, head: int) -> Tensor:
    config, width = module.config, len(query)
    distance = n - m if config.max_distance is None else min(n - m, config.max_distance)
    product = turn(query, distance, config.rope_theta) @ key
    k = config.relative_positions
    if k is None:
        return product / math.sqrt(width)
    kv_head = head // (config.num_heads // config.kv_heads)
    ahead, back = (module.relative[min(max(d + k, 0), 2 * k - 1)] for d in (distance, -distance))
    as_key = module.key.weight.unflatten(0, (-1, width))[kv_head] @ ahead
    as_query = module.query.weight.unflatten(0, (-1, width))[head] @ back
    return (product + query @ as_key + key @ as_query) / math.sqrt(3 * width)


def sharpened(scores: Tensor) -> Tensor:
    weights = scores.softmax(0)
    entropy = float(-(weights * (weights + 1e-9).log()).sum())
    h = min(entropy, 4.0)
    factor = -0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791
    return scores * max(factor, 1.0) if entropy > 0.5 else scores


def by_pairs(module: Attention, x: Tensor, ids: Tensor | None = None) -> Tensor:
    config, (length, batch, dim) = module.config, x.shape
    width = config.width(dim)
    query, key, value = (
        (x @ part.weight.t()).unflatten(-1, (-1, width)) for part in (module.query, module.key, module.value)
    )
    if config.qk_norm:
        over = -1 if config.qk_norm_over == "head" else (-2, -1)
        query, key = (
            norm.weight.view(-1, width) * t / (t.square().mean(over, keepdim=True) + config.norm_eps).sqrt()
            for t, norm in ((query, module.query_norm), (key, module.key_norm))
        )
    ids = torch.zeros(batch, length, dtype=torch.long) if ids is None else ids
    groups = config.num_heads // config.kv_heads
    result = []
    for n in range(length):
        for b in range(batch):
            first = int((ids[b] == ids[b, n]).nonzero()[0])
            seen = [m for m in range(length) if ids[b, m] == ids[b, n] and sees(config, n, m, first)]
            for h in range(config.num_heads):
                scores = torch.stack([score(module, query[n, b, h], key[m, b, h // groups], n, m, h) for m in seen])
                if config.sink != "none":
                    extra = module.sink[h] if config.sink == "learned" else x.new_zeros(())
                    scores = torch.cat((scores, extra[None]))
                scores = sharpened(scores) if config.adaptive_temperature and not module.training else scores
                result.append(scores.softmax(0)[: len(seen)] @ value[seen, b, h // groups])
    mixed = torch.stack(result).view(length, batch, config.num_heads * width)
    return mixed @ module.output.weight.t()
