"""Which parameters are trained, and what a training step then costs.

A frozen parameter takes part in the forward pass and passes gradients on to what is before it, but has none of its own:
no gradient buffer, no moments, no weight decay. After "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts
LLM", 2024, arXiv:2403.07816, everything is trained again; training the routers alone, or them and the experts, leaves
what the branches learned as it is and costs less.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from lightbulb.models.language import LanguageConfig
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, keeper_of, logical_of
from lightbulb.registry import nearest
from lightbulb.routing.router import Router

Patterns = Annotated[list[str], Field(min_length=1)]
Trainable = Literal["all", "routers", "routers+experts"] | Patterns
"""``all`` that the model's modifiers leave trained (LoRA: its updates); the routers' weights; with them whatever there
is once per expert; or exactly the logical parameters that patterns like ``blocks.*.token.*`` name, ``*`` standing for
any characters."""


def trained_names(config: LanguageConfig, trainable: Trainable) -> frozenset[str]:
    """Names of the parameters of a whole model that are trained.

    Raises:
        ValueError: a pattern names no parameter or one that cannot be trained, or the model has no router.
    """
    model = _on_meta(config)
    if trainable == "all":
        return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    parameters = dict(model.named_parameters())
    if isinstance(trainable, list):
        chosen = {name for pattern in trainable for name in _matching(pattern, list(parameters))}
    else:
        chosen = set(_of_routers(model))
        if not chosen:
            raise ValueError(f"trainable {trainable}: the model has no router; write all, or patterns of names")
        if trainable == "routers+experts":
            chosen |= {name for name, parameter in parameters.items() if logical_of(parameter).is_expert}
    if kept := sorted(name for name in chosen if keeper_of(parameters[name]) is not None):
        raise ValueError(f"trainable: {kept[0]!r} is kept in four bits and cannot be trained; leave it out")
    return frozenset(chosen)


def freeze(model: nn.Module, trained: frozenset[str]) -> None:
    """Leave only these parameters of a model, or of one stage of it, trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def train_flops(config: LanguageConfig, trained: frozenset[str]) -> float:
    """FLOPs of one token's forward and backward pass.

    The backward of a product with a matrix is two products, one for its input's gradient and one for its own; without
    the second where the matrix is frozen, without both in the layers before the first trained one. Everything trained
    makes it ``Cost.train_flops``. What is before the first trained parameter of its layer counts as if it were behind
    it, and matrices that a mixture of depths passes by for some tokens as if it did not.
    """
    layers = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
    is_below = not trained.isdisjoint(("embedding.weight", "positions.weight"))
    first = 0 if is_below else min(layers, default=config.num_layers)
    forward = [cost.forward_flops for cost in config.layer_costs()]
    frozen = [0.0] * config.num_layers
    for name, logical, share in _matrices(_on_meta(config)):
        layer, flops = int(name.split(".")[1]), 2.0 * share * torch.Size(logical.shape).numel()
        if ".adapter." in name:  # which the layer's own cost does not know
            forward[layer] += flops
        if name not in trained:
            frozen[layer] += flops
    head = "embedding.weight" if config.tie_embeddings else "head"
    saved = 0.0 if head in trained else config.head_cost().forward_flops
    for layer in range(config.num_layers):
        saved += 2.0 * forward[layer] if layer < first else min(frozen[layer], forward[layer])
    return config.cost().train_flops - saved


def active_share(model: nn.Module, name: str, weight: Logical) -> float:
    """The share of a matrix, given by its layer's name, that one token passes: top-k of the experts of the nearest
    router's mixer."""
    while weight.is_expert and name:
        name = name.rpartition(".")[0]
        router = getattr(getattr(model.get_submodule(name), "config", None), "router", None)
        if router is not None:
            return router.top_k / weight.shape[0]
    return 1.0


def _on_meta(config: LanguageConfig) -> nn.Module:
    with torch.device("meta"):
        return config.build()


def _matching(pattern: str, names: list[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(
            f"trainable: {pattern!r} names no parameter{nearest(pattern, names)}; there are {', '.join(names[:6])}, ..."
        )
    return found


def _of_routers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield from (f"{name}.{key}" for key, _ in module.named_parameters())


def _matrices(model: nn.Module) -> Iterator[tuple[str, Logical, float]]:
    """Name, record and active share of every matrix in the blocks that tokens are multiplied with."""
    for name, module in model.named_modules():
        if not name.startswith("blocks."):
            continue
        if isinstance(module, SplitLinear):
            share = active_share(model, name, module.logical)
            yield f"{name}.weight", module.logical, share
            if module.adapter is not None:
                for key, parameter in module.adapter.named_parameters(prefix=f"{name}.adapter"):
                    yield key, logical_of(parameter), share
        elif isinstance(module, Router):
            yield f"{name}.weight", logical_of(module.weight), 1.0
