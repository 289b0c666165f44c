"""A proof as files: ``certificate.json`` for machines, ``certificate.md`` for people."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightbulb.config import Config
from lightbulb.evaluation.proof import BOUNDS, LayoutResult, Proof
from lightbulb.folder import write_atomically
from lightbulb.parallel.engine import StepResult

COLUMNS = {
    "loss": "loss",
    "gradient": "gradients",
    "grad_norm": "gradient norm",
    "clip": "clip",
    "router": "routers",
    "weight": "weights",
    "moment": "moments",
}
"""Quantity to column heading."""

_SUMMARY = {
    "loss": "worst_loss_diff",
    "gradient": "worst_grad_rel_diff",
    "grad_norm": "worst_grad_norm_rel_diff",
    "clip": "worst_clip_rel_diff",
    "router": "worst_router_diff",
    "weight": "worst_weight_diff",
    "moment": "worst_moment_rel_diff",
}


def write_certificate(proof: Proof, configs: Mapping[str, Config], folder: Path) -> None:
    """Write both files.

    Raises:
        FolderError: the folder cannot be written.
    """
    write_atomically(folder / "certificate.json", json.dumps(as_json(proof, configs), indent=1))
    write_atomically(folder / "certificate.md", as_markdown(proof))


def summary(proofs: Mapping[str, Proof]) -> dict[str, Any]:
    """Proofs, by the name of their run file, in one line of JSON: counts, and the worst differences over all."""
    results = [(name, result) for name, proof in proofs.items() for result in proof.results]
    return {
        "layouts": len(results),
        "skipped": sum(len(proof.skipped) for proof in proofs.values()),
        **{key: _number(max(proof.worst(quantity) for proof in proofs.values())) for quantity, key in _SUMMARY.items()},
        "ok": all(proof.ok for proof in proofs.values()),
        "failed": [f"{name}: {result.trial.label()}" for name, result in results if not result.ok],
        "configs": {name: len(proof.results) for name, proof in proofs.items()},
        "seconds": round(sum(proof.seconds for proof in proofs.values()), 1),
    }


def as_json(proof: Proof, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Everything, versions and the config of each variant included."""
    return {
        **summary({"": proof}),
        "versions": versions(),
        "bounds": BOUNDS,
        "variants": {
            name: {
                "steps": trial.steps,
                "optimizer": trial.optimizer.model_dump() | {"clip_grad": proof.references[name].clip_grad},
                "reference": [_step(result) for result in proof.references[name].results],
                "config": configs[name].model_dump(mode="json"),
            }
            for name, trial in proof.variants.items()
        },
        "compared": [_layout(result) for result in proof.results],
        "not_compared": [{"layout": skipped.label, "reason": skipped.reason} for skipped in proof.skipped],
    }


def as_markdown(proof: Proof) -> str:
    """The certificate as a page."""
    trial = next(iter(proof.variants.values()))
    lines = [
        "# Certificate of equal layouts",
        "",
        f"**{'Passed' if proof.ok else 'FAILED'}**: {len(proof.results)} layouts, {trial.steps} steps, "
        f"{trial.global_batch_size} contexts of {trial.model.context_length} tokens per step, float32, "
        f"seed {trial.seed}, {proof.seconds:.0f} s.",
        "",
        "Each layout was trained on the same batches as a plain PyTorch model in one process (no process groups, one "
        "pass over the whole batch). The numbers are the largest differences over all ranks, steps and parameters: "
        "gradients and moments relative to the parameter's largest element (at least a hundredth of the model's), "
        "gradient norm and clip coefficient relative, the rest absolute.",
        "",
        f"Learning rate {trial.optimizer.lr:g}, epsilon {trial.optimizer.eps:g}. "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + ".",
        "",
        "| model | parameters | first loss | first gradient norm | clip coefficients |",
        "|---|---:|---:|---:|---|",
        *(_variant_row(name, proof) for name in proof.variants),
        "",
        f"| layout | model | micro-batch | {' | '.join(COLUMNS.values())} | worst gradient |",
        f"|---|---|---:|{'---:|' * len(COLUMNS)}---|",
        *(_row(result) for result in proof.results),
        f"| *allowed* | | | {' | '.join(f'{BOUNDS[quantity]:.0e}' for quantity in COLUMNS)} | |",
    ]
    failures = [line for result in proof.results for line in result.failures]
    if failures:
        lines += ["", "## Broken bounds", "", *(f"- {line.splitlines()[0]}" for line in failures)]
    if proof.skipped:
        lines += ["", "## Layouts this model cannot have", ""]
        lines += [f"- {skipped.label}: {skipped.reason}" for skipped in proof.skipped]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """What the result depends on."""
    names = ("torch", "megatron-core", "lightbulb")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def cell(result: LayoutResult, quantity: str) -> str:
    """One number of the table; a dash where there was nothing to compare."""
    return f"{result.worst[quantity].value:.1e}" if quantity in result.worst else "-"


def _row(result: LayoutResult) -> str:
    cells = " | ".join(cell(result, quantity) for quantity in COLUMNS)
    worst = result.worst["gradient"].where if "gradient" in result.worst else "did not finish"
    trial = result.trial
    return f"| {trial.parallel.label()} | {trial.variant} | {trial.micro_batch_size} | {cells} | {worst} |"


def _variant_row(name: str, proof: Proof) -> str:
    reference = proof.references[name]
    first = reference.results[0]
    parameters = sum(math.prod(shape) for shape in reference.shapes.values())
    coefficients = ", ".join(f"{result.clip_coefficient:.4f}" for result in reference.results)
    return f"| {name} | {parameters:,} | {first.loss:.6f} | {first.grad_norm:.6f} | {coefficients} |"


def _step(result: StepResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("loss", "grad_norm", "clip_coefficient", "routers")}


def _layout(result: LayoutResult) -> dict[str, Any]:
    worst = {
        quantity: {"value": _number(found.value), "where": found.where, "ours": found.ours, "expected": found.expected}
        for quantity, found in result.worst.items()
    }
    return {
        "layout": result.trial.parallel.label(),
        "variant": result.trial.variant,
        "micro_batch_size": result.trial.micro_batch_size,
        "ok": result.ok,
        "seconds": round(result.seconds, 2),
        "worst": worst,
        "failures": result.failures,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
