"""Checkpoints: written whole or not at all, verified before use, independent of the layout.

A checkpoint holds *logical* tensors: float32 master weights and both moments, each in one or more parts, every part
in the safetensors file of the rank that wrote it. ``manifest.json`` says where the parts lie and what each file's
size and hash must be; it is written last, and the folder gets its final name only then. Reading checks the hashes,
and any layout loads the slices it needs. Nothing is ever unpickled.

::

    checkpoints/step-00001000/model-rank0000.safetensors      masters and router loads
                              optimizer-rank0000.safetensors  moments
                              state.json                      step, loader, counters, the run's config
                              manifest.json                   parts, sizes, hashes
    checkpoints/latest                                        name of the newest, replaced atomically
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightbulb.config import load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.folder import FolderError, check_writable, explained, sync_folder, write_atomically
from lightbulb.models.language import LanguageModel
from lightbulb.nn.parameter import Logical, logical_of
from lightbulb.parallel.collective import agree, on_rank_zero
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.host import pick_device
from lightbulb.parallel.optimizer import MOMENTS
from lightbulb.train.config import RunConfig
from lightbulb.train.faults import fault_point

FORMAT = 1
FOLDER = "checkpoints"
Part = dict[str, Any]  # {"file", "start": [...], "shape": [...]} of one stored piece of a logical tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file or field and the fix."""


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs besides tensors to go on exactly where it stopped."""

    step: int
    tokens: int
    optimizer_step: int
    skipped_steps: int
    loader: dict[str, Any]
    config: dict[str, Any]
    layout: str


def step_folder(run: Path, step: int) -> Path:
    """Folder of one checkpoint."""
    return run / FOLDER / f"step-{step:08d}"


def save_checkpoint(run: Path, engine: Engine, state: TrainState, keep: int) -> Path:
    """Write a checkpoint from all ranks; older ones beyond ``keep`` go once it is complete.

    Raises:
        FolderError: on every rank, when any rank could not write; earlier checkpoints are untouched.
    """
    final = step_folder(run, state.step)
    partial = final.with_name(f".{final.name}.partial")
    rank = dist.get_rank()
    model, moments, shapes = _collect(engine)
    need = sum(t.numel() * t.element_size() for t in (*model.values(), *moments.values()))

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        check_writable(partial, need)

    on_rank_zero(prepare)
    error: Exception | None = None
    files: dict[str, dict[str, Any]] = {}
    try:
        for kind, tensors in (("model", model), ("optimizer", moments)):
            fault_point("save")
            files |= _write_tensors(partial / f"{kind}-rank{rank:04d}.safetensors", tensors)
    except (OSError, SafetensorError) as caught:
        error = caught if isinstance(caught, FolderError) else FolderError(f"{partial}: cannot be written: {caught}")
    try:
        agree(error)
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (files, shapes))
    on_rank_zero(lambda: _publish(partial, final, gathered, state, keep))
    return final


def _collect(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Tensors this rank writes, and where each lies in its logical tensor. Replicas take turns as writers."""
    model: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(engine.named_parameters()):
        values = engine.read_parameter(parameter)
        logical = logical_of(parameter)
        replicas = engine.replicas(parameter)
        is_copy = logical.tensor_dim is None and engine.tensor_rank > 0
        if is_copy or replicas.rank() != index % replicas.size():
            continue
        model[name] = values["master"].cpu().contiguous()
        moments |= {f"{name}:{moment}": values[moment].cpu().contiguous() for moment in MOMENTS}
        start = [part.start for part in logical.slices()]
        shapes |= dict.fromkeys((name, *(f"{name}:{m}" for m in MOMENTS)), (logical.shape, start))
    for name, router in engine.routers():
        if engine.is_first_copy:
            model[f"{name}.load"] = router.load.cpu()
            shapes[f"{name}.load"] = (tuple(router.load.shape), [0])
    return model, moments, shapes


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write one file to disk; its manifest entry, with the shape of every tensor in it. Nothing when empty."""
    if not tensors:
        return {}
    with explained(path, sum(t.numel() * t.element_size() for t in tensors.values())):
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return {path.name: {"size": path.stat().st_size, "xxh3_128": _hash(path), "tensors": shapes}}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _publish(partial: Path, final: Path, gathered: list[Any], state: TrainState, keep: int) -> None:
    """Rank 0, after every rank has written: manifest, final name, pointer, removal of the oldest."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank_files, shapes in gathered:
        for file, entry in rank_files.items():
            stored = entry.pop("tensors")
            files[file] = entry
            for key, shape in stored.items():
                logical_shape, start = shapes[key]
                record = tensors.setdefault(key, {"shape": list(logical_shape), "parts": []})
                record["parts"].append({"file": file, "start": start, "shape": shape})
    write_atomically(partial / "state.json", json.dumps(asdict(state), indent=1))
    files["state.json"] = {"size": (partial / "state.json").stat().st_size, "xxh3_128": _hash(partial / "state.json")}
    manifest = {"format": FORMAT, "step": state.step, "files": files, "tensors": tensors}
    write_atomically(partial / "manifest.json", json.dumps(manifest))
    with explained(final):
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name)
    for old in complete_checkpoints(final.parent.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints with a manifest, newest step first. Folders of interrupted saves start with a dot."""
    found = [p for p in (run / FOLDER).glob("step-*") if p.is_dir() and (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def sweep_partial(run: Path) -> None:
    """Remove what interrupted saves left behind."""
    for partial in (run / FOLDER).glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


class Checkpoint:
    """A verified checkpoint, open for reading logical tensors slice by slice.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the manifest is not one of ours.
    """

    def __init__(self, folder: Path, verify: bool = True):
        self.folder = folder
        manifest = self._json("manifest.json")
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise CheckpointError(f"{folder}/manifest.json: format {found!r}, this version reads {FORMAT}")
        self.files: dict[str, Any] = manifest["files"]
        self.tensors: dict[str, Any] = manifest["tensors"]
        if verify:
            self._verify()
        for name, record in self.tensors.items():
            for part in record["parts"]:
                if part["file"] not in self.files:
                    raise CheckpointError(f"{folder}/manifest.json: {part['file']!r} of {name!r} is not listed")
        try:
            self.state = TrainState(**self._json("state.json"))
        except TypeError as error:
            raise CheckpointError(f"{folder}/state.json: written by another version ({error})") from None

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """The part of a logical tensor that the slices select.

        Raises:
            CheckpointError: no such tensor, another shape, or parts that do not cover the slices.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}; it belongs to another model")
        result = torch.empty([s.stop - s.start for s in slices])
        covered = 0
        for part in self.tensors[name]["parts"]:
            covered += self._copy_overlap(name, part, slices, result)
        if covered != result.numel():
            raise CheckpointError(f"{self.folder}: parts of {name!r} cover {covered} of {result.numel()} values")
        return result

    def read_parameter(self, name: str, logical: Logical, with_moments: bool = True) -> dict[str, Tensor]:
        """Master weight (and moments) of the local part of a parameter."""
        shape = tuple(self.tensors.get(name, {}).get("shape", ()))
        if name in self.tensors and shape != logical.shape:
            raise CheckpointError(f"{self.folder}: {name!r} has shape {shape}, the model expects {logical.shape}")
        values = {"master": self.read(name, logical.slices())}
        if with_moments:
            values |= {moment: self.read(f"{name}:{moment}", logical.slices()) for moment in MOMENTS}
        return values

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name}: unreadable ({error}); use an earlier checkpoint") from None

    def _verify(self) -> None:
        for name, entry in self.files.items():
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(f"{path}: missing; use an earlier checkpoint")
            if path.stat().st_size != entry["size"] or _hash(path) != entry["xxh3_128"]:
                raise CheckpointError(f"{path}: damaged (not as manifest.json says); use an earlier checkpoint")

    def _copy_overlap(self, name: str, part: Part, slices: tuple[slice, ...], result: Tensor) -> int:
        source, target = [], []
        for wanted, start, size in zip(slices, part["start"], part["shape"], strict=True):
            low, high = max(wanted.start, start), min(wanted.stop, start + size)
            if low >= high:
                return 0
            source.append(slice(low - start, high - start))
            target.append(slice(low - wanted.start, high - wanted.start))
        with safe_open(self.folder / part["file"], framework="pt") as file:
            values = file.get_slice(name)[tuple(source)]
        result[tuple(target)] = values
        return values.numel()


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    problems: list[str] = []
    for folder in complete_checkpoints(run):
        try:
            return Checkpoint(folder), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def load_into(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put every local part of the checkpoint into the engine's model, optimizer and routers."""
    engine.optimizer_step = checkpoint.state.optimizer_step
    for name, parameter in engine.all_parameters():
        engine.write_parameter(parameter, checkpoint.read_parameter(name, logical_of(parameter)))
    for name, router in engine.routers():
        router.load.copy_(checkpoint.read(f"{name}.load", (slice(0, router.num_experts),)))


def load_model_for_inference(run: Path) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The newest checkpoint of a run as one whole model in evaluation mode, on CUDA when there is a device.

    Raises:
        CheckpointError: not a run folder, or no intact checkpoint in it.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: not a run folder (it has no config.yaml); name one that pretrain wrote")
    config = load_config(RunConfig, run / "config.yaml")
    checkpoint, problems = newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(problems[0] if problems else f"{run}: has no checkpoint yet; let pretrain save one first")
    device = pick_device()
    model = config.model.build()
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        logical = logical_of(parameter)
        values = checkpoint.read_parameter(name, logical, with_moments=False)["master"]
        parameter.data = values.to(device, torch.float32 if logical.keep_fp32 else dtype)
    return model.to(device).eval().requires_grad_(False), Tokenizer.load(run / "tokenizer.json"), config
