"""Reading checkpoints: verified before use, by any layout, whatever layout wrote them.

A checkpoint holds *logical* tensors: float32 master weights, both moments and router loads, each in one or more boxes,
every box in the safetensors file of the rank that wrote it. Loading takes the slices the current layout needs.
:mod:`lightbulb.train.save` writes them, :mod:`lightbulb.train.manifest` says what the folder looks like. Nothing is
ever unpickled, no link is followed, and no size found in a file is allocated.

::

    checkpoints/step-00001000/model-rank0000.safetensors      masters and router loads
                              optimizer-rank0000.safetensors  moments
                              state.json                      step, loader, counters, the run's config
                              manifest.json                   boxes, sizes, hashes
    checkpoints/latest                                        name of the newest, for people and scripts; never read
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lightbulb.config import load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.models.language import LanguageModel
from lightbulb.nn.parameter import Logical, logical_of, set_values
from lightbulb.parallel.collective import on_rank_zero
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.host import Precision, pick_device
from lightbulb.parallel.optimizer import MOMENTS
from lightbulb.routing.router import Router
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import (
    CheckpointError,
    Part,
    TrainState,
    check_files,
    complete_checkpoints,
    read_manifest,
    read_state,
    step_folder,
)
from lightbulb.train.tensor_file import TensorFile, TensorFileError, hash_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_for_inference",
    "first_whole",
    "load_into",
    "load_model_for_inference",
    "newest_checkpoint",
    "open_run",
    "start_from",
]


class Checkpoint:
    """A checkpoint open for reading logical tensors slice by slice.

    Args:
        folder: the checkpoint.
        verify: compare every file with its hash first; leave it out only when :meth:`problems` is asked.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the manifest is not one of ours.
    """

    def __init__(self, folder: Path, verify: bool = True):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open: dict[str, TensorFile] = {}
        if verify:
            for problem in self.problems():
                raise CheckpointError(problem)

    @cached_property
    def state(self) -> TrainState:
        """Everything besides tensors."""
        return read_state(self.folder)

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's state is there too; mostly not where a conversion wrote the checkpoint."""
        return any(name.endswith(f":{MOMENTS[0]}") for name in self.manifest.tensors)

    def problems(self, rank: int = 0, world_size: int = 1) -> Iterator[str]:
        """What is wrong with this rank's share of the files."""
        found = list(check_files(self.folder, self.manifest, rank, world_size, self._hash))
        yield from found
        if not found:
            _ = self.state  # a damaged one raises; every rank needs it

    def read(self, name: str, slices: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of a logical tensor that the slices select; it may be a view of a file.

        Args:
            name: of the logical tensor.
            slices: the part.
            shape: of the logical tensor.

        Raises:
            CheckpointError: no such tensor, another shape, or parts that do not cover the slices once.
        """
        record = self.manifest.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}; it belongs to another model")
        if tuple(record.shape) != shape:
            found = tuple(record.shape)
            raise CheckpointError(f"{self.folder}: {name!r} has shape {found}, the model expects {shape}")
        boxes = [(part, box) for part in record.parts if (box := _overlap(part, slices)) is not None]
        if len(boxes) == 1 and boxes[0][1] == slices:
            return self._values(boxes[0][0], slices)
        return self._put_together(name, boxes, slices)

    def read_parameter(self, name: str, logical: Logical, with_moments: bool = True) -> dict[str, Tensor]:
        """Master weight (and moments) of the local part of a parameter."""
        names = {"master": name} | ({moment: f"{name}:{moment}" for moment in MOMENTS} if with_moments else {})
        return {key: self.read(stored, logical.slices(), logical.shape) for key, stored in names.items()}

    def _put_together(
        self, name: str, boxes: list[tuple[Part, tuple[slice, ...]]], slices: tuple[slice, ...]
    ) -> Tensor:
        """Copy several parts into one tensor; ``seen`` keeps overlapping parts from hiding a hole."""
        result = torch.empty([s.stop - s.start for s in slices])
        seen = torch.zeros(result.shape, dtype=torch.bool)
        for part, box in boxes:
            target = _relative(box, [s.start for s in slices])
            if seen[target].any():
                raise CheckpointError(f"{self.folder}: parts of {name!r} overlap; use an earlier checkpoint")
            seen[target] = True
            result[target] = self._values(part, box)
        covered = int(seen.sum())
        if covered != result.numel():
            raise CheckpointError(f"{self.folder}: parts of {name!r} cover {covered} of {result.numel()} values")
        return result

    def _values(self, part: Part, box: tuple[slice, ...]) -> Tensor:
        """What a part holds of a box of the logical tensor."""
        try:
            return self._file(part.file).read(part.key, part.shape)[_relative(box, part.start)]
        except TensorFileError as error:
            raise CheckpointError(f"{error}; use an earlier checkpoint") from None

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]

    def _hash(self, path: Path, size: int) -> str:
        return self._file(path.name).hash(size) if path.suffix == ".safetensors" else hash_file(path, size)


def newest_checkpoint(run: Path, together: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over.

    With ``together``, a collective, every rank checks its share of the files and all of them get the same answer.
    """
    return first_whole(complete_checkpoints(run), together)


def first_whole(listed: list[Path], together: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """As :func:`newest_checkpoint`, of checkpoints that are listed in the order in which they are wanted."""
    if together:
        listed = [Path(name) for name in on_rank_zero(lambda: [str(path) for path in listed])]
    problems: list[str] = []
    for folder in listed:
        found, checkpoint = _problems_here(folder, together)
        if together:
            everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, found)
            found = sorted({problem for rank in everywhere for problem in rank})
        if checkpoint is not None and not found:
            return checkpoint, problems
        problems += found[:1]
    return None, problems


def _problems_here(folder: Path, together: bool) -> tuple[list[str], Checkpoint | None]:
    """What this rank finds wrong with a checkpoint, and the checkpoint if it could be opened."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        checkpoint = Checkpoint(folder, verify=False)
        return list(checkpoint.problems(rank, size)), checkpoint
    except CheckpointError as error:
        return [str(error)], None


def load_into(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put every local part of the checkpoint into the engine's model, optimizer and routers. Moments of a converted
    model that no step was trained of are zero where there are none."""
    engine.optimizer_step = checkpoint.state.optimizer_step
    has_moments = checkpoint.has_moments or not checkpoint.state.is_untrained
    for name, parameter in engine.all_parameters():
        is_trained = parameter.requires_grad
        state = checkpoint.read_parameter(name, logical_of(parameter), with_moments=is_trained and has_moments)
        engine.write_parameter(parameter, state if has_moments or not is_trained else _with_zero_moments(state))
    _load_routers(engine.routers(), checkpoint)


def _load_routers(routers: Iterable[tuple[str, Router]], checkpoint: Checkpoint) -> None:
    """Put the checkpoint's loads and biases into routers, given with their global names."""
    for name, router in routers:
        for key, value in router.named_buffers():
            value.copy_(checkpoint.read(f"{name}.{key}", (slice(0, len(value)),), tuple(value.shape)))


def start_from(engine: Engine, checkpoint: Checkpoint, with_moments: bool = False) -> list[str]:
    """Take the weights of another run's checkpoint, and its routers' biases, into a new engine; router loads start
    anew, and so do moments, unless they are asked for.

    Returns:
        the parameters of this rank that the checkpoint lacks; they keep their initial values, and their moments are
        zero.

    Raises:
        CheckpointError: a parameter has another shape there, there is none in common, one that is frozen is missing, or
            moments are wanted and there are none.
    """
    if with_moments:
        if not checkpoint.has_moments:
            raise CheckpointError(
                f"{checkpoint.folder}: has no moments; upcycle with moments: keep, or set start_from_moments: false"
            )
        engine.optimizer_step = checkpoint.state.optimizer_step
    missing, found = [], 0
    for name, parameter in engine.all_parameters():
        if name not in checkpoint.manifest.tensors:
            missing.append(name)
            if with_moments and parameter.requires_grad:  # all of them count the same updates
                engine.write_parameter(parameter, _with_zero_moments({"master": parameter.detach().float()}))
            continue
        found += 1
        takes = with_moments and parameter.requires_grad and f"{name}:{MOMENTS[0]}" in checkpoint.manifest.tensors
        state = checkpoint.read_parameter(name, logical_of(parameter), with_moments=takes)
        engine.write_parameter(parameter, state if takes else _with_zero_moments(state))
    for name, router in engine.routers():
        if router.config.bias_rate and f"{name}.bias" in checkpoint.manifest.tensors:
            router.bias.copy_(checkpoint.read(f"{name}.bias", (slice(0, len(router.bias)),), tuple(router.bias.shape)))
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: has no parameter of this model; name a run of the same blocks")
    frozen = [name for name, p in engine.all_parameters() if name in missing and not p.requires_grad]
    if frozen:
        raise CheckpointError(
            f"{checkpoint.folder}: has no {frozen[0]!r} ({len(frozen)} in all), which is frozen: it would stay as "
            "it was drawn; start from a run that has it"
        )
    return missing


def _with_zero_moments(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {moment: torch.zeros_like(state["master"]) for moment in MOMENTS}


def load_model_for_inference(run: Path, step: int | None = None) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The newest checkpoint of a run, or that of a step, as one whole model in evaluation mode, on CUDA when there is a
    device.

    Raises:
        CheckpointError: not a run folder, or no intact checkpoint in it.
    """
    config, checkpoint = open_run(run, step)
    precision: Precision = "bf16" if config.train.precision == "bf16" else "fp32"
    model = build_for_inference(config, checkpoint, pick_device(), precision)
    return model, Tokenizer.load(run / "tokenizer.json"), config


def open_run(run: Path, step: int | None = None) -> tuple[RunConfig, Checkpoint]:
    """The config of a run and its newest intact checkpoint, or that of a step.

    Raises:
        CheckpointError: not a run folder, or no intact checkpoint in it.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: not a run folder (it has no config.yaml); name one that pretrain wrote")
    config = load_config(RunConfig, run / "config.yaml")
    checkpoint, problems = newest_checkpoint(run) if step is None else first_whole([step_folder(run, step)])
    if checkpoint is None:
        raise CheckpointError(problems[0] if problems else f"{run}: has no checkpoint yet; let pretrain save one first")
    return config, checkpoint


def build_for_inference(
    config: RunConfig, checkpoint: Checkpoint, device: torch.device, precision: Precision
) -> LanguageModel:
    """A checkpoint as one whole model in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is not of the config's model.
    """
    model = config.model.build()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        logical = logical_of(parameter)
        values = checkpoint.read_parameter(name, logical, with_moments=False)["master"]
        set_values(parameter, values)
        parameter.data = parameter.data.to(torch.float32 if logical.keep_fp32 else dtype)
    routers = ((name, module) for name, module in model.named_modules() if isinstance(module, Router))
    _load_routers(routers, checkpoint)  # their biases decide where tokens go
    return model.to(device).eval().requires_grad_(False)


def _overlap(part: Part, slices: tuple[slice, ...]) -> tuple[slice, ...] | None:
    """The box of the logical tensor that is both in the part and wanted."""
    box = tuple(
        slice(max(wanted.start, start), min(wanted.stop, start + size))
        for wanted, start, size in zip(slices, part.start, part.shape, strict=True)
    )
    return box if all(side.start < side.stop for side in box) else None


def _relative(box: tuple[slice, ...], origin: list[int]) -> tuple[slice, ...]:
    return tuple(slice(side.start - first, side.stop - first) for side, first in zip(box, origin, strict=True))
