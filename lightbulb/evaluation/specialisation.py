"""Which experts a domain's tokens go to: shares by layer, how much they tell about the domain, and a picture.

The specialisation of a layer is the mutual information between the domain of a token and an expert that it selects, in
bits, with all domains counting alike: 0 if every domain is spread in the same way, whatever that is. A token's
``top_k`` selections differ, so with D domains and E experts it cannot exceed ``min(log2 D, log2(E / top_k))``, by which
the normalised figure divides. Domain shares per expert are the usual view (OLMoE, Muennighoff et al. 2024,
arXiv:2409.02060).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightbulb.data.loader import IGNORED_LABEL, Batch
from lightbulb.data.mixture import domain_of
from lightbulb.evaluation.held_out import cluster_of
from lightbulb.folder import explained
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.modifiers.mixture_of_depths import DepthBlockConfig
from lightbulb.routing.router import Router, Routing
from lightbulb.train.metrics import DEAD_BELOW, OVERLOADED_ABOVE

PANEL_COLUMNS = 3
WRITTEN_CELLS = 160
"""A panel with more cells has colours only."""


@dataclass(frozen=True)
class LayerUse:
    """How the tokens of each group use a layer's experts.

    Attributes:
        top_k: experts that a token selects.
        counts: ``[groups, experts]`` selections.
    """

    top_k: int
    counts: np.ndarray

    def shares(self, names: Sequence[str | None]) -> dict[str, np.ndarray]:
        """``[experts]`` share of the selections of all groups of a name, by name."""
        found: dict[str, np.ndarray] = {}
        for name, row in zip(names, self.counts, strict=True):
            if name is not None and row.sum():
                found[name] = found.get(name, 0) + row
        return {name: row / row.sum() for name, row in sorted(found.items())}


class ExpertUse:
    """Counts the selections of every router while a model reads text.

    Args:
        model: in evaluation mode, watched within :meth:`watching`.
        groups: names of the groups of the text, by number.

    Attributes:
        unseen: why a layer that has experts is not counted, by its name.
    """

    def __init__(self, model: LanguageModel, groups: Sequence[str]):
        self.groups = list(groups)
        self.unseen = _unseen(model.config)
        self._routers = {
            name: part
            for name, part in model.named_modules()
            if isinstance(part, Router) and name.removesuffix(".router") not in self.unseen
        }
        self._counts = {name: torch.zeros(len(groups), r.num_experts).double() for name, r in self._routers.items()}
        self._selected: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator["ExpertUse"]:
        """Keep what routers select until :meth:`add` counts it."""
        handles = [router.register_forward_hook(self._keep(name)) for name, router in self._routers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(router: Router, inputs: tuple[Any, ...], routing: Routing) -> None:
            self._selected[name] = routing.experts

        return hook

    def add(self, batch: Batch) -> None:
        """Count what was selected for the tokens of a batch that the model has just read."""
        is_token = (batch.labels != IGNORED_LABEL).t().flatten()  # routers see [length, batch]
        group = batch.groups.repeat(batch.labels.shape[1])[is_token]
        for name, experts in self._selected.items():  # [length x batch, top_k]
            counts = self._counts[name]
            pair = group[:, None] * counts.shape[1] + experts.cpu()[is_token]
            counts += torch.bincount(pair.flatten(), minlength=counts.numel()).view_as(counts)
        self._selected.clear()

    def layers(self) -> dict[str, LayerUse]:
        """What was counted, by the name of the layer and its part (``blocks.0.channel``)."""
        return {
            name.removesuffix(".router"): LayerUse(router.config.top_k, self._counts[name].numpy())
            for name, router in self._routers.items()
        }

    def report(self) -> dict[str, Any]:
        """What evaluation.json says of the experts; empty for a model without."""
        layers = {name: _describe(use, self.groups) for name, use in self.layers().items()}
        return ({"layers": layers} if layers else {}) | ({"not_shown": self.unseen} if self.unseen else {})


def information(shares: np.ndarray, top_k: int) -> tuple[float, float | None]:
    """Mutual information of domain and selected expert in bits, and as a share of the greatest possible.

    Args:
        shares: ``[domains, experts]``, each row of sum 1; domains count alike.
        top_k: selections of a token.

    Returns:
        The second is None where nothing can be told: one domain, or all experts selected by every token.
    """
    joint = shares / len(shares)
    expected = joint.sum(0, keepdims=True) / len(shares)
    seen = joint > 0
    bits = float((joint[seen] * np.log2(joint[seen] / np.broadcast_to(expected, joint.shape)[seen])).sum())
    most = min(math.log2(len(shares)), math.log2(shares.shape[1] / top_k))
    return max(bits, 0.0), max(bits, 0.0) / most if most > 0 else None


def _describe(use: LayerUse, groups: Sequence[str]) -> dict[str, Any]:
    experts = use.counts.shape[1]
    load = use.counts.sum(0) / max(use.counts.sum(), 1)
    found: dict[str, Any] = {"num_experts": experts, "top_k": use.top_k, "load": load.tolist()}
    found["dead"] = np.flatnonzero(load * experts < DEAD_BELOW).tolist()
    found["overloaded"] = np.flatnonzero(load * experts > OVERLOADED_ABOVE).tolist()
    for kind, name_of in (("domain", domain_of), ("cluster", cluster_of)):
        shares = use.shares([name_of(group) for group in groups])
        if shares:
            bits, part = information(np.stack(list(shares.values())), use.top_k)
            found[kind] = {
                "share": {name: row.tolist() for name, row in shares.items()},
                "information_bits": bits,
                "specialisation": part,
            }
    return found


def draw(report: dict[str, Any], kind: str, path: Path) -> bool:
    """Draw the shares of a report by ``domain`` or ``cluster``, a panel for each layer; False where there is nothing.

    Raises:
        FolderError: the picture cannot be written.
    """
    panels = {name: layer for name, layer in report.get("layers", {}).items() if kind in layer}
    if not panels:
        return False
    columns = min(PANEL_COLUMNS, math.ceil(len(panels) ** 0.5))
    rows = math.ceil(len(panels) / columns)
    names = list(next(iter(panels.values()))[kind]["share"])
    size = (max(4.8 * columns, 6), (0.9 + max(0.28 * len(names), 1.2)) * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    top = max(_relative(layer, kind).max() for layer in panels.values())
    norm = TwoSlopeNorm(1.0, 0.0, max(top, 2.0))
    for axis, (name, layer) in zip(axes.flat, panels.items(), strict=False):
        _draw_layer(axis, name, layer, kind, norm)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.colorbar(axes.flat[0].images[0], ax=axes, shrink=0.8, label="selections, in even shares")
    figure.suptitle(f"Which experts each {kind}'s tokens select (1 = an even share)", fontsize=11)
    with explained(path):
        figure.savefig(path, dpi=130, facecolor="white")
    return True


def _relative(layer: dict[str, Any], kind: str) -> np.ndarray:
    """``[domains, experts]`` shares as multiples of an even share."""
    return np.array(list(layer[kind]["share"].values())) * layer["num_experts"]


def _draw_layer(axis: Axes, name: str, layer: dict[str, Any], kind: str, norm: TwoSlopeNorm) -> None:
    values, names = _relative(layer, kind), list(layer[kind]["share"])
    axis.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("expert", fontsize=8)
    part = layer[kind]["specialisation"]
    told = "" if part is None else f" · {layer[kind]['information_bits']:.2f} bits, {part:.0%} of the most"
    axis.set_title(f"{name}{told}", loc="left", fontsize=9, fontweight="bold")
    if values.size <= WRITTEN_CELLS:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(norm(value) - 0.5) > 0.3 else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)


def _unseen(config: LanguageConfig) -> dict[str, str]:
    """Parts whose experts tokens do not select, or whose tokens are not known here, and why."""
    found = {}
    for layer in range(config.num_layers):
        block = config.layer(layer)
        for part, mixer in block.mixers().items():
            name = f"blocks.{layer}.{part}"
            if mixer.routers() and isinstance(block, DepthBlockConfig):
                found[name] = "the layer chooses its tokens (mixture of depths); which they were is not known here"
            elif not mixer.routers() and getattr(mixer, "num_experts", 1) > 1:
                found[name] = f"{mixer.type} merges its experts for whole segments; no token selects one"
    return found
