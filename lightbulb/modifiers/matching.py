"""The linear layers a modifier names."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from lightbulb.nn.linear import SplitLinear


def matching_linears(model: nn.Module, pattern: str) -> Iterator[tuple[str, SplitLinear]]:
    """Name and layer of every linear layer whose name fits a pattern like ``blocks.*.token.*``, where ``*`` stands for
    any characters. Embedding, head, norms and routers are no such layers."""
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear) and fnmatchcase(name, pattern):
            yield name, module


def check_match(model: nn.Module, pattern: str) -> None:
    """Raise ValueError when a pattern names no linear layer of a whole model."""
    if any(matching_linears(model, pattern)):
        return
    names = [name for name, _ in matching_linears(model, "*")]
    raise ValueError(f"modifiers: match {pattern!r} names no linear layer; there are {', '.join(names[:8])}, ...")
