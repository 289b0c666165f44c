"""Routers that know the clusters before they are trained.

A router's rows are made of its inputs on text of each cluster: the cluster's mean input less that of all text
(``centroid``, as mergekit's hidden gates), ridge regression from inputs to the cluster (``closed_form``), or the mean
embedding (``embedding``, as mergekit's cheap gates). The inputs are those of the mixture in which every token of a
cluster goes to the cluster's own experts: a dense model for each source, so that no router is needed to make routers.

A linear router has no constant term, but its inputs have a direction that all tokens share, whose product with each is
about 1 (by ridge regression): added to a row, multiples of it shift the expert's logit. :func:`balanced` finds the
shifts with which all experts get their share of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightbulb.experts.layers import LayeredModel
from lightbulb.experts.pieces import Merge, keyed
from lightbulb.experts.upcycle_config import RouterStart
from lightbulb.models.language import LanguageModel
from lightbulb.routing.router import RouterConfig

TWIN_NOISE = 0.1
"""Noise of rows that stand for the same cluster, as a share of their size, so that their experts come apart."""
BALANCE_STEPS = 300

Texts = Sequence[list[list[int]]]
"""Of each cluster, contexts of token ids."""


@torch.no_grad()
def learned_routers(merge: Merge, texts: Texts) -> dict[str, Tensor]:
    """Rows ``[rows, dim]`` of every router of the mixture's own, by the router's name.

    Memory is needed for two layers of a source and the inputs of all routers on ``tokens`` tokens of each cluster.

    Args:
        merge: the sources; with several of them, cluster i is the text of source i.
        texts: of each cluster.
    """
    start, config = merge.config.router_start, merge.config
    inputs: dict[str, list[Tensor]] = {}
    for cluster, contexts in enumerate(texts):
        if start.kind == "embedding":
            found = dict.fromkeys(_routers(merge), _embeddings(merge, contexts))
        else:
            found = _inputs(merge, min(cluster, len(merge.sources) - 1), contexts)
        for name in _routers(merge):
            inputs.setdefault(name, []).append(found[name][: start.tokens])
    return {
        name: _spread(_rows(parts, start, _top_k(merge, name)), config.rows, config.seed, name)
        for name, parts in inputs.items()
    }


def dense_model(merge: Merge, source: int, dtype: torch.dtype = torch.float32) -> LayeredModel:
    """The mixture in which every token goes to one source's experts, as a dense model."""

    def read(name: str) -> Tensor:
        return merge.expert_model(name, source) if name in merge.shapes else merge.trunk(name)

    return LayeredModel(merge.dense, read, merge.known, dtype)


def _rows(parts: list[Tensor], start: RouterStart, top_k: int) -> Tensor:
    """A router's rows from its inputs ``[tokens, dim]`` on each cluster's text."""
    x = torch.cat([part.double() for part in parts])
    cluster = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    weights = torch.stack([(cluster == i).double() / len(part) for i, part in enumerate(parts)])
    if start.kind == "closed_form":
        rows = _ridge(x, cluster, weights, start.ridge)
    else:
        means = weights @ x
        rows = means - means.mean(0)
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    logits = x @ rows.t()
    rows = rows * (start.scale / (logits - logits.mean(0)).std().clamp_min(1e-12))
    return (balanced(rows, x, weights, min(top_k, len(parts)), start.ridge) if start.balance else rows).float()


def _ridge(x: Tensor, cluster: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Least squares from centred inputs to the cluster, every cluster counting alike."""
    weight = weights.sum(0) / len(weights)
    centred = x - weight @ x
    target = nn.functional.one_hot(cluster, len(weights)).double() - 1 / len(weights)
    return _regression(centred, target, weight, ridge).t()


def _regression(x: Tensor, target: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """``[dim, targets]`` whose product with ``x [tokens, dim]`` is nearest to ``target [tokens, targets]``."""
    weighted = (x * weight[:, None]).t()
    square = weighted @ x
    penalty = ridge * square.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(square + penalty * torch.eye(len(square), dtype=x.dtype), weighted @ target)


def balanced(rows: Tensor, x: Tensor, weights: Tensor, top_k: int, ridge: float) -> Tensor:
    """Rows whose top-k selections on ``x [tokens, dim]`` are spread evenly, by a shift of each expert's logit.

    Args:
        rows: ``[experts, dim]``.
        x: inputs.
        weights: ``[clusters, tokens]`` weight of each token in its cluster; every cluster counts alike.
        top_k: experts of a token.
        ridge: penalty of the direction that tokens share.
    """
    experts = len(rows)
    if top_k >= experts:
        return rows
    weight = weights.sum(0) / weights.sum()
    direction = _regression(x, torch.ones(len(x), 1, dtype=x.dtype), weight, ridge)[:, 0]
    logits, constant = x @ rows.t(), (x @ direction)[:, None]
    shift, step = torch.zeros(experts, dtype=x.dtype), logits.std()
    best, best_shift = float("inf"), shift
    for number in range(BALANCE_STEPS):
        chosen = (logits + constant * shift).topk(top_k, dim=-1).indices
        load = (
            torch.zeros(experts, dtype=x.dtype).index_add(0, chosen.flatten(), weight.repeat_interleave(top_k)) / top_k
        )
        worst = float((load * experts - 1).abs().max())
        if worst < best:
            best, best_shift = worst, shift
        shift = shift + step * (1 - load * experts) / (1 + 0.1 * number) * 0.5
    return rows + best_shift[:, None] * direction


def _spread(rows: Tensor, count: int, seed: int, name: str) -> Tensor:
    """``count`` rows of fewer: neighbours stand for one cluster, and differ by a little noise."""
    copies = count // len(rows)
    if copies == 1:
        return rows
    rows = rows.repeat_interleave(copies, dim=0)
    noise = torch.empty_like(rows).normal_(generator=keyed(seed, int(name.split(".")[1]), 0, f"{name}.twins"))
    return rows + TWIN_NOISE * rows.square().mean().sqrt() * noise


def _routers(merge: Merge) -> list[str]:
    """The routers that the mixture has and the sources have not."""
    places = {"channel": merge.mixed_layers, "token": merge.attention_layers}
    return [f"blocks.{layer}.{part}.router" for part, layers in places.items() for layer in sorted(layers)]


def _top_k(merge: Merge, name: str) -> int:
    """Rows that a token chooses."""
    config = merge.config
    attention: RouterConfig = config.attention_router or config.router
    return attention.top_k if ".token." in name else config.router.top_k // config.shards


def _embeddings(merge: Merge, contexts: list[list[int]]) -> Tensor:
    """Embeddings ``[tokens, dim]`` of the size that norms give to inputs."""
    table = merge.trunk("embedding.weight")
    x = torch.cat([table[torch.tensor(ids)] for ids in contexts])
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _inputs(merge: Merge, source: int, contexts: list[list[int]]) -> dict[str, Tensor]:
    """What goes into each mixer that gets a router, ``[tokens, dim]``, by the router's name."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in _routers(merge)}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[name].append(arguments[0].flatten(0, 1).clone())

        return hook

    @contextmanager
    def around(stage: LanguageModel) -> Iterator[None]:
        mixers = {f"{name}.router": mixer for name, mixer in stage.named_modules()}
        handles = [mixer.register_forward_pre_hook(keep(name)) for name, mixer in mixers.items() if name in inputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    dense_model(merge, source).run_blocks([torch.tensor([ids]) for ids in contexts], around)
    return {name: torch.cat(parts) for name, parts in inputs.items()}
