"""Weights of a model by LightBulb's names, wherever they lie: in a run of ours or in a Hugging Face folder."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lightbulb.config import load_config
from lightbulb.experts.hf.families import family_named
from lightbulb.experts.hf.family import Family, InteropError
from lightbulb.experts.hf.folder import CONFIG, TOKENIZER, TensorFolder, read_values
from lightbulb.experts.hf.links import LinkTable
from lightbulb.experts.layers import LayeredModel
from lightbulb.experts.receipt import RECEIPT, Digests, digest, read_receipt
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.nn.parameter import set_values
from lightbulb.parallel.optimizer import MOMENTS
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, newest_checkpoint
from lightbulb.train.config import RunConfig
from lightbulb.train.origin import Parent, parent_of

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of tensors that old folders hold and nobody reads: frequencies, and GPT-2's causal masks."""


class Source(ABC):
    """A model to read from.

    Attributes:
        path: its folder.
        model_config: our config of it.
        tokenizer_path: its ``tokenizer.json``; there may be no such file.
    """

    path: Path
    model_config: LanguageConfig
    tokenizer_path: Path

    @abstractmethod
    def names(self) -> list[str]:
        """The logical tensors there are: all parameters, and biases of routers that have some."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A logical tensor in float32; it may be a view of a file, which writing to it does not change.

        Raises:
            CheckpointError: missing or damaged, in a run.
            InteropError: missing or damaged, in a Hugging Face folder.
        """

    @abstractmethod
    def parent(self) -> Parent:
        """What the origin of a run made of it says."""

    @abstractmethod
    def digests(self) -> Digests:
        """Records of all tensors as they lie in the folder, under the names they have there; one at a time is read."""

    def read_part(self, name: str, place: tuple[int, ...]) -> Tensor:
        """What a logical tensor has at an index of its leading dimensions: one expert's matrix, say."""
        return self.read(name)[place]


class RunSource(Source):
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none that is whole.
    """

    def __init__(self, path: Path):
        self.path, self.tokenizer_path = path, path / "tokenizer.json"
        self.config = load_config(RunConfig, path / "config.yaml")
        self.model_config = self.config.model
        checkpoint, problems = newest_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(problems[0] if problems else f"{path}: has no checkpoint yet; let pretrain save one")
        self.checkpoint: Checkpoint = checkpoint

    def names(self) -> list[str]:
        endings = (".load", *(f":{moment}" for moment in MOMENTS))
        return [name for name in self.checkpoint.manifest.tensors if not name.endswith(endings)]

    def read(self, name: str) -> Tensor:
        return self.read_part(name, ())

    def parent(self) -> Parent:
        return parent_of(self.checkpoint.folder)

    def digests(self) -> Digests:
        return {name: digest(self.read(name), record=True) for name in self.names()}

    def read_part(self, name: str, place: tuple[int, ...]) -> Tensor:
        record = self.checkpoint.manifest.tensors.get(name)
        shape = tuple(record.shape) if record else ()
        rest = (slice(0, size) for size in shape[len(place) :])
        slices = (*(slice(index, index + 1) for index in place), *rest)
        return self.checkpoint.read(name, slices, shape)[(0,) * len(place)]


class HuggingFaceSource(Source):
    """A folder with config.json and safetensors, in one of the architectures of :data:`FAMILIES`.

    Raises:
        InteropError: another architecture, or weights that our model has no place for.
    """

    def __init__(self, path: Path):
        self.path, self.tokenizer_path = path, path / TOKENIZER
        self.their_config = read_values(path / CONFIG)
        if self.their_config.get("quantization_config"):
            raise InteropError(f"{path / CONFIG}: its weights are quantised; name a folder in bfloat16 or float32")
        self.family: Family = family_named(self.their_config, str(path / CONFIG))
        self.model_config = self.family.config(self.their_config, str(path / CONFIG))
        receipt = read_receipt(path / RECEIPT)
        self.folder = TensorFolder(path, receipt.tensors_out if receipt else None)
        self._is_bare = not any(name.startswith(self.family.prefix) for name in self.folder.files)
        self._check_rest()

    @cached_property
    def table(self) -> LinkTable:
        """Whose tensors are whose."""
        return self.family.table(self.model_config)

    def names(self) -> list[str]:
        return list(self.table.shapes)

    def read(self, name: str) -> Tensor:
        if name not in self.table.shapes:
            raise InteropError(f"{self.path}: has no tensor {name!r}; it belongs to another model")
        try:
            return self.table.ours(name, lambda theirs: self.folder.read(self._stored(theirs)))
        except InteropError:
            raise
        except ValueError as error:
            raise InteropError(f"{self.path}: {error}") from None

    def parent(self) -> Parent:
        return Parent(run=str(self.path.resolve()))

    def digests(self) -> Digests:
        names = (name for name in self.folder.files if not name.endswith(IGNORED))
        return {name: digest(self.folder.stored(name), record=True) for name in names}

    def _stored(self, theirs: str) -> str:
        """A tensor's name in this folder."""
        return theirs.removeprefix(self.family.prefix) if self._is_bare else theirs

    def _check_rest(self) -> None:
        """What we have no place for must be nothing."""
        zeros = set(map(self._stored, self.table.zeros))
        linked = set(map(self._stored, self.table.their_shapes)) - zeros
        if self.model_config.tie_embeddings:
            linked.add("lm_head.weight")  # some write the table twice
        for name in self.folder.files:
            if (
                name in linked
                or name.endswith(IGNORED)
                or (name == "lm_head.weight" and "head" not in self.table.shapes)
            ):
                continue
            may_be_zero = name in zeros or name.endswith(".bias")
            if not may_be_zero or torch.count_nonzero(self.folder.read(name)):
                why = f"is not zero, and by {CONFIG} there is none" if may_be_zero else "is unknown"
                raise InteropError(f"{self.path}: the tensor {name!r} {why}; this model cannot be imported")


def build_model(source: Source) -> LanguageModel:
    """The whole model in float32 and evaluation mode."""
    model, names = source.model_config.build(), set(source.names())
    for name, parameter in model.named_parameters():
        set_values(parameter, source.read(name))
    for name, buffer in model.named_buffers():
        if name in names:  # biases of routers, which decide where tokens go
            buffer.copy_(source.read(name))
    return model.eval().requires_grad_(False)


def layered(
    source: Source, dtype: torch.dtype = torch.float32, compute_in: torch.dtype = torch.float32
) -> LayeredModel:
    """The model, its weights rounded to ``dtype``, to be run layer by layer."""

    def read(name: str) -> Tensor:
        return source.read(name).to(dtype).float()

    return LayeredModel(source.model_config, read, set(source.names()), compute_in)


def open_source(path: Path | str) -> Source:
    """A model to read from: a run folder, or one of Hugging Face.

    Raises:
        CheckpointError: a run without a whole checkpoint.
        InteropError: neither, or an architecture that LightBulb cannot express.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return RunSource(path)
    if (path / CONFIG).is_file():
        return HuggingFaceSource(path)
    raise InteropError(f"{path}: neither a run (config.yaml) nor a Hugging Face folder ({CONFIG}); check the path")
