"""A model with packed BitLinear layers as a folder of its own: written from a run, read without unpacking anything.

::

    OUT/model.safetensors   packed codes, scales, and all other weights in the run's precision
        config.yaml         of the run
        tokenizer.json      of the run
        packed.json         format, layers, sizes and hashes of the files, and the receipt

The folder gets its name when everything in it is on disk and the model read back was compared: each packed layer's
products with exact ones of the same inputs, whose bound is rounding; and the logits with those of the quantised model
it was made of, which differ by more, see :func:`~lightbulb.modifiers.packed.rounding`. Nothing is ever unpickled.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightbulb.config import describe, load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.folder import built_beside, explained, write_atomically
from lightbulb.models.language import LanguageModel
from lightbulb.modifiers.packed import PackedLinear, is_packable, make_ready, pack, packed, packed_shapes, put, rounding
from lightbulb.nn.parameter import keeper_of, logical_of, set_values, stored_values
from lightbulb.ops import PackFormat
from lightbulb.parallel.host import pick_device
from lightbulb.routing.router import Router
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import CheckpointError, FileEntry, digest_of, entry, read_json
from lightbulb.train.tensor_file import FileRecord, TensorFileError, hash_file, sync_file

MANIFEST, TENSORS, CONFIG, TOKENIZER = "packed.json", "model.safetensors", "config.yaml", "tokenizer.json"
FORMAT = 1
AGAIN = "pack the run again"
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
"""Bound of a packed layer's products by the model's dtype, in standard deviations: some ten times what was seen in
float32; in bfloat16 the rounding of the largest results, four to eight deviations."""


class PackError(RuntimeError):
    """A model that cannot be packed; the message says why."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Receipt(_Strict):
    """What packing did."""

    layers: int
    """Packed."""
    bytes_before: int
    """Of their weights in bfloat16."""
    bytes_after: int
    """Of their codes and scales."""
    tokens: int
    """On which both comparisons were made."""
    greatest_rounding: float
    """Of a packed layer's product from the exact one of the same inputs, in standard deviations of what it gives."""
    greatest_difference: float
    """Of any logit from the quantised model's, in standard deviations of all logits."""
    same_choices: float
    """Share of the tokens for which both have the same greatest logit."""


class PackedManifest(_Strict):
    """The content of packed.json, without the digest of itself."""

    format: Literal[1]
    packing: PackFormat
    layers: list[str]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")], FileEntry]
    receipt: Receipt


@torch.no_grad()
def write_packed(
    model: LanguageModel, run: Path, out: Path, packing: PackFormat, tokens: Tensor, bound: float
) -> Receipt:
    """Pack a run's model and write it to a new folder.

    Args:
        model: of the run, quantised, in evaluation mode; packed afterwards.
        run: its folder.
        out: the folder to be written; it must not exist, or be empty.
        packing: how codes are packed.
        tokens: ``[batch, length]`` on which the result is compared with the model.
        bound: of the greatest difference of a logit, in standard deviations of all.

    Raises:
        PackError: the model has no layer to pack, a packed layer is not exact, or logits differ by more than the bound.
        FolderError: ``out`` is in use or cannot be written.
    """
    layers = {name: layer for name, layer in model.named_modules() if is_packable(layer)}
    if not layers:
        raise PackError(f"{run}: the model has no bitlinear layers to pack; add the modifier bitlinear and train")
    before = sum(2 * math.prod(logical_of(layer.weight).local_shape()) for layer in layers.values())
    expected = model(tokens).float()
    pack(model, packing)
    with built_beside(out) as partial:
        after = _write_files(model, run, partial, list(layers))
        rebuilt = _build(partial, packing, list(layers))[0]
        found = rebuilt(tokens).float()
        receipt = Receipt(
            layers=len(layers), bytes_before=before, bytes_after=after, tokens=tokens.numel(),
            greatest_rounding=rounding(rebuilt, tokens),
            greatest_difference=float((found - expected).abs().max() / expected.std()),
            same_choices=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        )  # fmt: skip
        dtype = next(p.dtype for p in rebuilt.parameters() if p.is_floating_point())  # the embedding's
        if not receipt.greatest_rounding <= ROUNDING[dtype]:  # nor if it is not a number
            raise PackError(
                f"{run}: a packed layer's product is {receipt.greatest_rounding:.3g} standard deviations from the "
                "exact one, which is more than rounding; please report it, with the machine's processor"
            )
        if not receipt.greatest_difference <= bound:
            raise PackError(
                f"{run}: a logit of the packed model differs by {receipt.greatest_difference:.3g} standard deviations "
                f"from that of the quantised model, the bound is {bound:g}; raise --bound if this is near enough"
            )
        _write_manifest(partial, packing, list(layers), receipt)
    return receipt


def is_packed(folder: Path) -> bool:
    """Whether :func:`write_packed` wrote a folder."""
    return (folder / MANIFEST).is_file()


def read_packed(folder: Path) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model of a folder in evaluation mode, on CUDA when there is a device.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    manifest = _read_manifest(folder)
    for name, wanted in manifest.files.items():
        try:
            if hash_file(folder / name, wanted.size) != wanted.xxh3_128:
                raise TensorFileError(f"{folder / name}: damaged: its hash is not the one that was written")
        except TensorFileError as error:
            raise CheckpointError(f"{error}; {AGAIN}") from None
    return _build(folder, manifest.packing, manifest.layers)


def _build(folder: Path, packing: PackFormat, layers: list[str]) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    config = load_config(RunConfig, folder / CONFIG)
    # Weights are created without values: memory that nobody has written to is not there yet, and never will be for
    # those that make room for packed codes.
    model = config.model.build()
    path = folder / TENSORS
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in layers:
                layer = model.get_submodule(name)
                shapes = packed_shapes(layer, packing)
                values = [_read(path, tensors, f"{name}.{key}", shape) for key, shape in shapes.items()]
                put(model, name, packed(layer, packing, *values))
            _fill(model, path, tensors)
    except (SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, or of another version ({error}); {AGAIN}") from None
    model = model.to(pick_device()).eval().requires_grad_(False)
    make_ready(model)
    return model, Tokenizer.load(folder / TOKENIZER), config


def _fill(model: nn.Module, path: Path, tensors: Any) -> None:
    """Read what is not packed."""
    done = {id(p) for layer in model.modules() if isinstance(layer, PackedLinear) for p in (layer.codes, layer.scale)}
    for name, parameter in model.named_parameters():
        if id(parameter) in done:
            continue
        values = _read(path, tensors, name, logical_of(parameter).local_shape())
        if keeper_of(parameter) is None:
            parameter.data = values
        else:
            set_values(parameter, values)
    for name, buffer in _router_buffers(model):
        buffer.copy_(_read(path, tensors, name, tuple(buffer.shape)))


def _read(path: Path, tensors: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    values = tensors.get_tensor(name)
    if tuple(values.shape) != shape:
        raise CheckpointError(f"{path}: {name!r} has shape {tuple(values.shape)}, the model expects {shape}; {AGAIN}")
    return values


def _router_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Loads and biases, with their global names: biases decide where tokens go."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            for key, value in module.named_buffers():
                yield f"{name}.{key}", value


def _write_files(model: nn.Module, run: Path, folder: Path, layers: list[str]) -> int:
    """Write all files but the manifest; the bytes of codes and scales."""
    values = {name: p.data if keeper_of(p) is None else stored_values(p) for name, p in model.named_parameters()}
    packed_bytes = 0
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        values[f"{name}.codes"] = layer.rows()
        packed_bytes += values[f"{name}.codes"].nbytes + values[f"{name}.scale"].nbytes
    values |= dict(_router_buffers(model))
    with explained(folder / TENSORS, sum(tensor.nbytes for tensor in values.values())):
        save_file({name: tensor.cpu().contiguous() for name, tensor in values.items()}, folder / TENSORS)
    sync_file(folder / TENSORS)
    for name in (CONFIG, TOKENIZER):
        write_atomically(folder / name, (run / name).read_bytes())
    return packed_bytes


def _write_manifest(folder: Path, packing: PackFormat, layers: list[str], receipt: Receipt) -> None:
    files = {}
    for name in (TENSORS, CONFIG, TOKENIZER):
        size = (folder / name).stat().st_size
        files[name] = entry(FileRecord(size, hash_file(folder / name, size)))
    values = {
        "format": FORMAT, "packing": packing, "layers": layers, "files": files, "receipt": receipt.model_dump()
    }  # fmt: skip
    write_atomically(
        folder / MANIFEST, orjson.dumps(values | {"digest": digest_of(values)}, option=orjson.OPT_INDENT_2)
    )


def _read_manifest(folder: Path) -> PackedManifest:
    path = folder / MANIFEST
    values = read_json(path, AGAIN)
    if not isinstance(values, dict) or values.pop("digest", None) != digest_of(values):
        raise CheckpointError(f"{path}: damaged: its digest is not that of its content; {AGAIN}")
    try:
        return PackedManifest.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: of another version: {describe(error)[0]:.500}; {AGAIN}") from None
