"""Runs with a checkpoint of step 0, as a conversion writes them, of models with given weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightbulb.config import build_config
from lightbulb.experts import run_folder
from lightbulb.experts.run_folder import whole
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.nn.parameter import initialise, logical_of
from lightbulb.routing.router import Router
from lightbulb.train.checkpoint import Checkpoint
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import step_folder

MODEL: dict[str, Any] = {
    "vocab_size": 64, "dim": 16, "num_layers": 2, "context_length": 12,
    "block_pattern": [{
        "token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
        "channel": {"type": "mlp", "hidden_dim": 24},
    }],
}  # fmt: skip


def make_run(folder: Path, model: dict[str, Any], seed: int = 0, drift: float = 0.0) -> Path:
    """Write a run; ``drift`` adds noise of that size, drawn from the seed, to the weights of seed 0."""
    built = build_config(LanguageConfig, model).build()
    initialise(built, 0 if drift else seed)
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: parameter.detach() + drift * torch.empty_like(parameter).normal_(generator=generator)
        for name, parameter in built.named_parameters()
    }
    for name, module in built.named_modules():
        if isinstance(module, Router):
            values |= {f"{name}.{key}": value for key, value in module.named_buffers()}
    return write_run(folder, model, values)


def write_run(
    folder: Path,
    model: dict[str, Any],
    values: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor] | None = None,
    updates: int = 0,
) -> Path:
    """Write a run with these logical tensors, and with moments (``NAME:exp_avg``) that have seen so many updates."""
    config = build_config(RunConfig, {
        "run": str(folder), "model": model, "data": {"path": "data/none"},
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
    })  # fmt: skip
    folder.mkdir(parents=True)
    run_folder.write_run(folder, config, pieces_of(values), None, pieces_of(moments or {}), updates)
    return folder


def pieces_of(values: dict[str, torch.Tensor]) -> list[run_folder.Piece]:
    return [whole(name, tuple(v.shape), partial(torch.clone, v)) for name, v in values.items()]


def make_warm_run(folder: Path, model: dict[str, Any], seed: int = 0, updates: int = 20) -> Path:
    """As :func:`make_run`, with moments of about the gradients' size."""
    values = tensors(make_run(folder / "cold", model, seed))
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for name, value in values.items():
        gradient = 0.01 * torch.randn(value.shape, generator=generator)
        moments |= {f"{name}:exp_avg": gradient, f"{name}:exp_avg_sq": 2 * gradient.square() + 1e-6}
    return write_run(folder / "warm", model, values, moments, updates)


def model_of(run: Path, config: LanguageConfig | None = None) -> LanguageModel:
    """The whole model of a run, in evaluation mode."""
    checkpoint = Checkpoint(step_folder(run, 0))
    model = (config or build_config(RunConfig, checkpoint.state.config).model).build()
    for name, parameter in model.named_parameters():
        logical = logical_of(parameter)
        parameter.data = checkpoint.read_parameter(name, logical, with_moments=False)["master"].clone()
    return model.eval().requires_grad_(False)


def tensor(run: Path, name: str) -> torch.Tensor:
    """A logical tensor of a run's first checkpoint."""
    checkpoint = Checkpoint(step_folder(run, 0))
    shape = tuple(checkpoint.manifest.tensors[name].shape)
    return checkpoint.read(name, tuple(slice(0, size) for size in shape), shape)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All of them."""
    return {name: tensor(run, name) for name in Checkpoint(step_folder(run, 0)).manifest.tensors}
