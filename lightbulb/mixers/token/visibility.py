"""What the tokens of a context see of each other, and of a cache."""

from dataclasses import replace

import torch
from torch import Tensor

from lightbulb.mixers.base import Context
from lightbulb.nn.attention_mask import Rule, Tokens, Visibility
from lightbulb.nn.kv_cache import Cache


def of_whole(rule: Rule, context: Context) -> Visibility:
    """Whole sequences attend to themselves."""
    consecutive, length = context.positions.dim() == 1, len(context.positions)
    order = torch.arange(length, device=context.positions.device)[None]
    tokens = Tokens(order, _by_sample(context.positions), context.document_ids, present=context.present)
    if rule.num_global:
        tokens = tokens.with_ages() if context.ages is None else replace(tokens, ages=context.ages)
    if context.gist is not None:
        tokens = tokens.with_gists(context.gist)
    marks = (context.document_ids, context.present, context.gist)
    sees_all = rule.sees_all_of(length) if consecutive else rule.window is None and rule.max_distance is None
    return Visibility(rule, tokens, tokens, consecutive, plain=sees_all and all(mark is None for mark in marks))


def of_cache(rule: Rule, context: Context, cache: Cache) -> tuple[Tensor, Tensor, Visibility]:
    """The keys and values of a cache that the context's tokens, already in it, attend to."""
    positions = context.positions
    first, known = 0, int(positions.max()) + 1
    if rule.reach is not None:
        first = max(0, int(positions.min()) - rule.reach + 1)
    places, new = torch.arange(first, known, device=positions.device)[None], _by_sample(positions)
    query = Tokens(new, new, present=context.present)
    key = Tokens(places, places, present=cache["present"][:, first:known])
    if context.gist is not None:
        query, key = query.with_gists(context.gist), key.with_gists(context.gist)
    keys, values = (cache[name][:, :, first:known] for name in ("key", "value"))
    return keys, values, Visibility(rule, query, key, consecutive=positions.dim() == 1)


def _by_sample(positions: Tensor) -> Tensor:
    """``[length]`` or ``[length, batch]`` to ``[1 or batch, length]``."""
    return positions[None] if positions.dim() == 1 else positions.t()
