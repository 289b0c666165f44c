"""Targets of several models for one that learns from them: `lightbulb upcycle` with ``method: fuse``.

FuseLLM (Wan et al. 2024, arXiv:2401.10491). One source after the other reads the corpus's training rows; its likeliest
tokens are kept in shards. Then the shards are fused, row by row. Each shard gets its name when it is whole, so that an
interrupted call loses one at most. What is written in the end is an ordinary run: the student's weights, and a config
whose ``distil`` names the targets.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightbulb.config import ConfigError, changed
from lightbulb.data.corpus import Corpus
from lightbulb.data.soft_targets import MANIFEST, DistilConfig, TargetManifest, TargetShard, hash_of
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.fuse_config import FuseConfig
from lightbulb.experts.receipt import Digests, Receipt, ReceiptError, digest, parameters, write_receipt
from lightbulb.experts.run_folder import untrained_config, whole_pieces, write_run
from lightbulb.experts.source import RunSource, Source, open_source
from lightbulb.experts.teacher import Opinion, Teacher, combined
from lightbulb.folder import built_beside, check_writable, claim, write_atomically
from lightbulb.train.config import DETACHED, RunConfig
from lightbulb.train.manifest import digest_of

SHARD_BYTES = 32 << 20
PLAN = "plan.json"

Progress = Callable[[str, int, int], None]
"""Called with what is done, rows done and rows in all."""


def fuse(config: FuseConfig, progress: Progress) -> Receipt:
    """Write the targets and the student's run.

    Raises:
        ConfigError: there is no corpus, or the folder of targets is of other settings.
        ReceiptError: the written weights are not the student's.
        CheckpointError, DataError, FolderError, InteropError, TokenizerError: something cannot be read or written.
    """
    sources = [open_source(source.path.expanduser()) for source in config.sources]
    student = open_source(config.student.expanduser()) if config.student else sources[0]
    run = run_config(config, student)
    tensors_in = {f"{j}:{name}": value for j, source in enumerate(sources) for name, value in source.digests().items()}
    data = run.data.path.expanduser()
    corpus = Corpus(data, "train", run.model.context_length, run.model.vocab_size)
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    folder, mask = config.targets.expanduser(), run.data.document_mask
    with built_beside(config.run.expanduser()) as out, claim(folder):
        targets = Targets(folder, config, corpus, tensors_in, mask)
        for number, source in enumerate(sources):
            targets.ask(number, partial(Teacher, source, tokenizer, config.top_k, mask), progress)
        about = targets.fuse(progress)
        pieces = whole_pieces(student.model_config, student.read, student.names())
        written = write_run(out, run, pieces, tokenizer_text(student, data))
        receipt = _receipt(config, sources, student, tensors_in, written, about)
        write_receipt(out, receipt)
    return receipt


def run_config(config: FuseConfig, student: Source) -> RunConfig:
    """The run that learns from the targets.

    Raises:
        ConfigError: no corpus is known, or the settings do not fit each other.
    """
    own = student.config if isinstance(student, RunSource) else None
    data = config.data or (own.data if own else None)
    if data is None:
        raise ConfigError("method: fuse: the student is no run, so that no corpus is known; set data.path")
    base = own or untrained_config(config.run, student.model_config, data.path)
    distil = DistilConfig(targets=config.targets, language_share=config.language_share)
    changes = {"run": str(config.run), "data": data, "train": config.train or base.train, "distil": distil}
    return changed(base, DETACHED | changes, source="method: fuse")


def tokenizer_text(student: Source, data: Path) -> str:
    """The student's tokenizer; the corpus's where it has none."""
    path = student.tokenizer_path if student.tokenizer_path.is_file() else data / "tokenizer.json"
    return path.read_text("utf-8")


class Targets:
    """A folder of targets while it is written.

    Raises:
        ConfigError: the folder was begun with other settings.
        FolderError: it cannot be written.
    """

    def __init__(self, folder: Path, config: FuseConfig, corpus: Corpus, sources: Digests, document_mask: bool):
        self.folder, self.config, self.corpus = folder, config, corpus
        row_bytes = 8 * config.top_k * corpus.context_length
        size = max(1, SHARD_BYTES // row_bytes)
        self.shards = [range(i, min(i + size, len(corpus))) for i in range(0, len(corpus), size)]
        settings = {
            "corpus": corpus.digest, "top_k": config.top_k, "fusion": config.fusion, "shard_rows": size,
            "document_mask": document_mask,
            "sources": {name: record.model_dump() for name, record in sources.items()},
        }  # fmt: skip
        plan = {"digest": digest_of(settings)}
        check_writable(folder, row_bytes * len(corpus))
        if not (folder / PLAN).exists():
            write_atomically(folder / PLAN, orjson.dumps(plan))
        if orjson.loads((folder / PLAN).read_bytes()) != plan:
            raise ConfigError(f"targets: {folder} was begun with other sources or settings; choose another folder")

    def ask(self, number: int, open_teacher: Callable[[], Teacher], progress: Progress) -> None:
        """Let a source read all rows that it has not read yet."""
        missing = [
            i for i in range(len(self.shards)) if not (self._opinion(number, i).exists() or self._final(i).exists())
        ]
        teacher = open_teacher() if missing else None
        for i in missing:
            assert teacher is not None
            rows = self.shards[i]
            parts = []
            for start in range(rows.start, rows.stop, self.config.batch):
                part = range(start, min(start + self.config.batch, rows.stop))
                parts.append(teacher.read(self.corpus, part))
                progress(f"source {number}", part.stop, len(self.corpus))
            _save(self._opinion(number, i), Opinion(*map(torch.cat, zip(*parts, strict=True)))._asdict())

    def fuse(self, progress: Progress) -> dict[str, Any]:
        """Fuse what the sources said, shard by shard, and write the manifest; says how it came out."""
        entries = []
        for i, rows in enumerate(self.shards):
            if not self._final(i).exists():
                opinions = [_load(self._opinion(j, i)) for j in range(len(self.config.sources))]
                weights = fusion_weights(torch.stack([opinion.loss for opinion in opinions]), self.config.fusion)
                ids, probabilities = fused(opinions, weights, self.config.top_k)
                loss = torch.stack([opinion.loss for opinion in opinions])
                tensors = {"ids": ids.int(), "probabilities": probabilities, "loss": loss, "weights": weights}
                _save(self._final(i), tensors)
            for j in range(len(self.config.sources)):
                self._opinion(j, i).unlink(missing_ok=True)
            file = self._final(i)
            entries.append(
                TargetShard(file=file.name, rows=len(rows), bytes=file.stat().st_size, xxh3_128=hash_of(file))
            )
            progress("fusing", rows.stop, len(self.corpus))
        about = self._about()
        manifest = TargetManifest(
            corpus_digest=self.corpus.digest, tokenizer_digest=self.corpus.tokenizer_digest,
            context_length=self.corpus.context_length, top_k=self.config.top_k, shards=entries, about=about,
        )  # fmt: skip
        write_atomically(self.folder / MANIFEST, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2))
        return about

    def _about(self) -> dict[str, Any]:
        """Of each source its loss and its share of the rows; the mean probability that the kept tokens have."""
        found = [_read(self._final(i), "loss", "weights") for i in range(len(self.shards))]
        loss, weights = (torch.cat([part[key] for part in found], dim=1) for key in ("loss", "weights"))
        has_target, kept = 0, 0.0
        for i in range(len(self.shards)):
            probability = _read(self._final(i), "probabilities")["probabilities"].sum(-1)
            has_target, kept = has_target + int((probability > 0).sum()), kept + float(probability.sum())
        return {
            "fusion": self.config.fusion,
            "sources": [str(source.path) for source in self.config.sources],
            "nats_per_token": loss.mean(1).tolist(),
            "share_of_rows": weights.mean(1).tolist(),
            "positions_with_targets": has_target / (len(self.corpus) * self.corpus.context_length),
            "probability_kept": kept / max(has_target, 1),
        }

    def _opinion(self, number: int, shard: int) -> Path:
        return self.folder / f".source-{number:02}-{shard:05}.safetensors"

    def _final(self, shard: int) -> Path:
        return self.folder / f"targets-{shard:05}.safetensors"


def fusion_weights(loss: Tensor, fusion: str) -> Tensor:
    """``[sources, rows]`` weights of sum 1 from each source's nats per token ``[sources, rows]``."""
    if fusion == "min_ce":
        return torch.nn.functional.one_hot(loss.argmin(0), len(loss)).t().float()
    return (-loss).softmax(0)


def fused(opinions: Sequence[Opinion], weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """One distribution for every position: the weighted average of those that the sources have there.

    Args:
        opinions: of each source on the same rows.
        weights: ``[sources, rows]``.
        top_k: tokens to keep.

    Returns:
        ids and probabilities ``[rows, length, k]``.
    """
    has = torch.stack([opinion.probabilities.sum(-1) > 0 for opinion in opinions]) * weights[:, :, None]
    shares = has / has.sum(0).clamp_min(1e-12)
    ids = torch.cat([opinion.ids.masked_fill(opinion.probabilities == 0, -1) for opinion in opinions], dim=-1)
    weighted = [o.probabilities * share[..., None] for o, share in zip(opinions, shares, strict=True)]
    return combined(ids, torch.cat(weighted, dim=-1), top_k)


def _receipt(
    config: FuseConfig, sources: list[Source], student: Source, given: Digests, written: Digests, about: dict[str, Any]
) -> Receipt:
    for name in student.names():
        if written[name] != digest(student.read(name), record=True):
            raise ReceiptError(f"{config.run}: {name!r} is not what {student.path} has; nothing was written")
    notes = [
        f"source {j}: {loss:.4f} nats per token of the student's, weight {share:.1%}"
        for j, (loss, share) in enumerate(zip(about["nats_per_token"], about["share_of_rows"], strict=True))
    ]
    return Receipt(
        conversion="fuse",
        sources=[str(source.path) for source in sources],
        architecture=config.fusion,
        parameters_in=parameters(given),
        parameters_out=student.model_config.cost().params,
        tensors_in=given,
        tensors_out=written,
        routers={},
        notes=[*notes, f"{about['positions_with_targets']:.1%} of the positions have targets, which keep "
               f"{about['probability_kept']:.1%} of the probability"],
        versions={name: version(name) for name in ("lightbulb", "torch")},
    )  # fmt: skip


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, save({name: values.contiguous() for name, values in tensors.items()}))


def _load(path: Path) -> Opinion:
    return Opinion(**_read(path, *Opinion._fields))


def _read(path: Path, *names: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}
