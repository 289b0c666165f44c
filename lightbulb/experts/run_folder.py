"""A run folder whose one checkpoint nobody trained: what an import or an upcycling writes.

It has no moments and has seen no data, so it is read by ``start_from``, ``lightbulb generate`` and whatever else reads
a run, on any layout, but is not a run that could be continued where it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightbulb.config import build_config, save_config
from lightbulb.experts.hf.folder import in_shards
from lightbulb.experts.receipt import Digests, digest
from lightbulb.models.language import LanguageConfig
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import TrainState, entry, finish_checkpoint, step_folder
from lightbulb.train.tensor_file import ITEM, sync_file, write_tensors

SHARD_BYTES = 1 << 30

Shapes = Mapping[str, tuple[int, ...]]


def untrained_config(run: Path, model: LanguageConfig, data: Path, name: str = "config") -> RunConfig:
    """The config of such a folder: the model, and the least of everything else."""
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return build_config(RunConfig, {"run": str(run), "model": model, "data": {"path": str(data)}, "train": train}, name)


def write_run(
    folder: Path, config: RunConfig, shapes: Shapes, read: Callable[[str], Tensor], tokenizer: str, size: int
) -> Digests:
    """Write config, tokenizer and checkpoint into a folder.

    Args:
        folder: to write into; it need not be ``config.run`` yet.
        config: of the run.
        shapes: of all logical tensors. Routers' loads, and biases that are missing, are added: uniform, and zero.
        read: gives a tensor in float32.
        tokenizer: content of its ``tokenizer.json``.
        size: bytes of a file at most, if no tensor alone is larger; so much memory is used.

    Returns:
        What was written.
    """
    extra = router_state(config.model, shapes)
    shapes = {**shapes, **{name: tuple(values.shape) for name, values in extra.items()}}
    checkpoint = step_folder(folder, 0)
    checkpoint.mkdir(parents=True)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    digests: Digests = {}
    for number, names in enumerate(in_shards(shapes, ITEM, size)):
        file = f"model-rank{number:04d}.safetensors"
        values = {name: extra[name] if name in extra else read(name) for name in names}
        files[file] = entry(write_tensors(checkpoint / file, values))
        sync_file(checkpoint / file)
        for name, tensor in values.items():
            shape = list(shapes[name])
            part = {"file": file, "key": name, "start": [0] * len(shape), "shape": list(tensor.shape)}
            tensors[name] = {"shape": shape, "parts": [part]}
            digests[name] = digest(tensor, record=True)
    state = TrainState(
        step=0, tokens=0, optimizer_step=0, skipped_steps=0, loader={}, config=config.model_dump(mode="json"),
        layout="none",
    )  # fmt: skip
    finish_checkpoint(checkpoint, state, files, tensors)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    save_config(config, folder / "config.yaml")
    return digests


def router_state(model: LanguageConfig, known: Shapes) -> dict[str, Tensor]:
    """The buffers of a model's routers that are not known: loads as before the first step, biases of zero."""
    values: dict[str, Tensor] = {}
    for name, num_experts in model.routers().items():
        values[f"{name}.load"] = torch.full((num_experts,), 1.0 / num_experts)
        values[f"{name}.bias"] = torch.zeros(num_experts)
    wanted = model_buffers(model)
    return {name: tensor for name, tensor in values.items() if name in wanted and name not in known}


def model_buffers(model: LanguageConfig) -> set[str]:
    """Names of the buffers of a whole model."""
    with torch.device("meta"):
        return {name for name, _ in model.build().named_buffers()}
