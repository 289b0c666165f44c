"""List the parts a model can be made of: `lightbulb parts [--json | --markdown]`.

Token mixers, channel mixers and modifiers by the names that configs use, each with its paper, the parallel axes that
split it, what decoding has to keep of every sequence, and its limits.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import lightbulb.mixers
import lightbulb.modifiers  # noqa: F401  (both packages register their parts)
from lightbulb.registry import lookup, names

KINDS = {"token_mixer": "token mixer", "channel_mixer": "channel mixer", "modifier": "modifier"}
COLUMNS = {
    "name": "part",
    "about": "what it is",
    "paper": "paper",
    "shards": "split over",
    "state": "decode state",
    "cost": "cost",
}
DIM, LENGTH = 1024, 4096
SAMPLES: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": 16, "num_kv_heads": 4},
    "block_sparse": {"num_heads": 16, "num_kv_heads": 4, "window": 512},
    "infini": {"num_heads": 16, "num_kv_heads": 4, "segment_length": 512},
    "mamba": {},
    "moa": {"num_experts": 8, "num_kv_heads": 4, "head_dim": 64},
    "retention": {"num_heads": 4},
    "deepseek_moe": {"num_experts": 64, "hidden_dim": 352, "num_shared": 2},
    "kan": {"hidden_dim": 512},
    "lory": {"num_experts": 8, "hidden_dim": 2816},
    "mlp": {"hidden_dim": 2816},
    "switch": {"num_experts": 8, "hidden_dim": 2816},
}
"""An ordinary size of each mixer, for its cost in a model :data:`DIM` wide with contexts of :data:`LENGTH` tokens."""
MODIFIER_COSTS = {
    "bitlinear": "no parameters; weights of 2 bits, or 1.6, when packed",
    "denseformer": "layers x (layers + 3) / 2 parameters with dilation and period 1; a sum per average and layer",
    "lora": "rank x (in + out) parameters per linear, the only ones that train",
    "mixture_of_depths": "capacity x the FLOPs of its layers",
}


def parts() -> list[dict[str, Any]]:
    """Every registered part."""
    return [
        {
            "kind": title,
            "name": name,
            "about": (inspect.getdoc(config := lookup(kind, name)) or "").splitlines()[0].removesuffix("."),
            **config.facts._asdict(),  # type: ignore[attr-defined]
            "cost": _cost(kind, name, config),
        }
        for kind, title in KINDS.items()
        for name in names(kind)
    ]


def _cost(kind: str, name: str, config: Any) -> str:
    """Parameters and FLOPs per token of a sample, or what a modifier adds."""
    if kind == "modifier":
        return MODIFIER_COSTS.get(name, "")
    if name not in SAMPLES:
        return ""
    sizes = (DIM, LENGTH) if kind == "token_mixer" else (DIM,)
    cost = config.model_validate({"type": name} | SAMPLES[name]).cost(*sizes)
    active = f" ({cost.active_params / 1e6:.1f} M active)" if cost.active_params != cost.params else ""
    return f"{cost.params / 1e6:.1f} M parameters{active}, {cost.forward_flops / 1e6:.1f} MFLOP per token"


def markdown(kind: str) -> str:
    """The parts of one kind as a table."""
    headings = [*COLUMNS.values(), "limits"]
    rows = [
        [f"`{part['name']}`", part["about"], part["paper"], ", ".join(part["shards"]), part["state"]]
        + [part["cost"], part["limits"]]
        for part in parts()
        if part["kind"] == kind
    ]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb parts", description="List the parts a model can be made of.")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/parts.md")
    arguments = parser.parse_args(argv)
    if arguments.json:
        print(json.dumps(parts(), indent=1))
    elif arguments.markdown:
        print("\n\n".join(f"### {title.capitalize()}s\n\n{markdown(title)}" for title in KINDS.values()))
    else:
        Console().print(*(_table(title) for title in KINDS.values()))
    return 0


def _table(kind: str) -> Table:
    table = Table(*COLUMNS.values(), title=f"{kind}s", title_justify="left")
    for part in parts():
        if part["kind"] == kind:
            table.add_row(*(", ".join(cell) if isinstance(cell := part[key], tuple) else cell for key in COLUMNS))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
