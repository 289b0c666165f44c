"""Names for the parts a config can pick.

A part's config class registers itself under a kind and a name, next to its definition::

    @register("token_mixer", "attention")
    class AttentionConfig(TokenMixerConfig): ...

and a config field typed ``Registered[...]`` (see :mod:`lightbulb.config`) resolves ``type: attention``
to that class. Code outside LightBulb adds its own parts the same way, before the config is loaded.
"""

import difflib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PARTS: dict[str, dict[str, type]] = {}


def register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the class available as ``type: name`` among the parts of ``kind``.

    Raises:
        ValueError: another class already has that name.
    """

    def add(cls: type[T]) -> type[T]:
        known = _PARTS.setdefault(kind, {})
        if known.get(name, cls) is not cls:
            raise ValueError(f"{kind} {name!r} is already registered by {known[name].__qualname__}")
        known[name] = cls
        return cls

    return add


def lookup(kind: str, name: str) -> type:
    """The class registered as ``name``.

    Raises:
        ValueError: no such part; the message lists the known names and the nearest one.
    """
    known = _PARTS.get(kind, {})
    if name in known:
        return known[name]
    raise ValueError(f"unknown {kind} {name!r}{nearest(name, list(known))}; known: {sorted(known)}")


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_PARTS.get(kind, {}))


def nearest(name: str, candidates: list[str]) -> str:
    """A hint such as ``", did you mean 'num_experts'?"``, or an empty string."""
    close = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
