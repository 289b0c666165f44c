"""Evaluation of run folders: what is read of them, and what ``evaluation.json`` says.

A result is known by the corpus's held-out rows, the checkpoint's hash and the precision: what is there already is not
computed again. The file's own keys are the result that was asked for last; ``earlier`` holds the others.

::

    RUN/evaluation.json            {"bpb": ..., "domain_bpb": {...}, "experts": {...}, "key": {...}, ..., "earlier": []}
        experts-by-domain.png      shares of each domain's tokens by expert, and the same by cluster
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lightbulb.config import Config, ConfigError, load_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.ensemble import Centres, Ensemble, EnsembleConfig, score_ensemble, training_shares
from lightbulb.evaluation.held_out import (
    HeldOutText,
    Progress,
    Scores,
    batch_losses,
    score,
    stored_losses,
    token_losses,
)
from lightbulb.evaluation.kept_losses import KeptLosses
from lightbulb.evaluation.results import FILE, find, record
from lightbulb.evaluation.specialisation import ExpertUse, draw
from lightbulb.folder import check_writable, claim
from lightbulb.models.language import LanguageModel
from lightbulb.parallel.host import Precision, pick_device
from lightbulb.train.checkpoint import build_for_inference, open_run
from lightbulb.train.config import RunConfig
from lightbulb.train.kernels import use_kernels
from lightbulb.train.manifest import CheckpointError, complete_checkpoints
from lightbulb.train.origin import parent_of, read_origin
from lightbulb.train.packed_folder import MANIFEST, is_packed, read_packed


class EvaluationConfig(Config):
    """How models are run; only ``precision`` and ``max_contexts`` change results."""

    batch_size: int = Field(8, ge=1)
    """Contexts per forward pass."""
    device: str | None = None
    """Such as cpu or cuda:1; None for CUDA when there is a device."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; None for the run's own."""
    max_contexts: int | None = Field(None, ge=1)
    """Evaluate so many held-out contexts only, evenly spaced."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text: bits per byte, and which experts the tokens of each domain go to."""

    scores: Scores
    experts: dict[str, Any]


def evaluate_model(model: LanguageModel, text: HeldOutText, progress: Progress | None = None) -> Evaluation:
    """Evaluate a model in memory, in evaluation mode, in one pass over the text."""
    use = ExpertUse(model, text.groups)

    def counted() -> Iterator[Any]:
        for batch, losses in batch_losses(model, text, progress):
            use.add(batch)
            yield batch, losses

    with use.watching():
        scores = score(text, counted())
    return Evaluation(scores, use.report())


class Subject:
    """A run folder, or what `lightbulb pack` made of one, before its model is loaded.

    Args:
        folder: of the run.
        options: how it is to be run.

    Raises:
        CheckpointError: no run, or one without a checkpoint.
        TokenizerError: it has no tokenizer.
        ConfigError: a precision or device for a packed model, which has its own, or no such device.
    """

    def __init__(self, folder: Path, options: EvaluationConfig):
        self.folder, self.options = folder, options
        self.is_packed = is_packed(folder)
        if not (folder / "config.yaml").is_file():
            raise CheckpointError(f"{folder}: not a run folder (it has no config.yaml); name one that pretrain wrote")
        if self.is_packed and (options.precision or options.device):
            raise ConfigError(f"{folder}: a packed model has its own precision and device; leave both options out")
        self.config = load_config(RunConfig, folder / "config.yaml")
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        own: Precision = "bf16" if self.config.train.precision == "bf16" else "fp32"
        self.precision: Precision = options.precision or own
        self.device = _device(options.device)
        if self.is_packed:
            digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            self.key: dict[str, Any] = {"checkpoint": digest, "step": None, "precision": "packed"}
            return
        checkpoints = complete_checkpoints(folder)
        if not checkpoints:
            raise CheckpointError(f"{folder}: has no checkpoint yet; let pretrain save one first")
        self.key = self._key_of(checkpoints[0])

    @property
    def name(self) -> str:
        """For people."""
        return self.folder.resolve().name

    def load(self) -> LanguageModel:
        """The model, in evaluation mode; ``key`` then is that of the checkpoint it was read from: the newest that is
        intact.

        Raises:
            CheckpointError: no checkpoint is intact.
        """
        use_kernels(self.config.train.kernels)
        if self.is_packed:
            return read_packed(self.folder)[0]
        config, checkpoint = open_run(self.folder)
        self.key = self._key_of(checkpoint.folder)
        return build_for_inference(config, checkpoint, self.device, self.precision)

    def text(self, corpus: Path) -> HeldOutText:
        """The held-out text of a corpus as the model is to read it.

        Raises:
            DataError: it does not fit the model.
        """
        config, options = self.config, self.options
        mask = config.data.document_mask
        return HeldOutText(corpus, config.model, self.tokenizer, options.batch_size, mask, options.max_contexts)

    def cluster(self) -> int:
        """The cluster it was trained on, if it is a branch.

        Raises:
            ConfigError: it does not say.
        """
        origin = read_origin(self.folder)
        cluster = None if origin is None or origin.kind != "branch" else origin.detail.get("cluster")
        if not isinstance(cluster, int):
            raise ConfigError(
                f"{self.folder}: does not say which cluster it was trained on (origin.json); say it with --clusters, "
                "a number for each run in their order"
            )
        return cluster

    def _key_of(self, checkpoint: Path) -> dict[str, Any]:
        parent = parent_of(checkpoint)
        return {"checkpoint": parent.digest, "step": parent.step, "precision": self.precision}


def evaluate_run(
    subject: Subject, corpus: Path, again: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluate a run on a corpus, or read what was found before; writes ``evaluation.json`` and pictures.

    Raises:
        CheckpointError, DataError: run or corpus cannot be read, or do not fit together.
        FolderError: the run folder cannot be written.
    """
    text = subject.text(corpus)
    on = {"corpus": text.digest, "contexts": len(text)}
    known = find(subject.folder / FILE, subject.key | on)
    if known is not None and not again:
        return record(subject.folder / FILE, known)
    check_writable(subject.folder)  # before it is read, which may take hours
    found = evaluate_model(subject.load(), text, progress)
    for kind in ("domain", "cluster"):
        draw(found.experts, kind, subject.folder / f"experts-by-{kind}.png")
    key = {"key": subject.key | on, "data": str(corpus)}
    return record(subject.folder / FILE, key | asdict(found.scores) | {"experts": found.experts})


def evaluate_ensemble(
    subjects: Sequence[Subject],
    corpus: Path,
    config: EnsembleConfig,
    out: Path,
    clusters: Sequence[int] | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate runs on a corpus as one ensemble, or read what was found before; writes ``OUT/evaluation.json``.

    What each branch makes of the text is kept in the folder: after an interruption no finished branch reads it again.

    Args:
        subjects: the branches, loaded one after another.
        corpus: folder of the corpus, with its clusters if they are needed.
        config: how the branches are weighted.
        out: folder to write to.
        clusters: which cluster each branch was trained on; None if they say it themselves.
        again: compute what is known already, and have every branch read again.
        progress: called with the contexts read by all branches, and once more by the ensemble.

    Raises:
        ConfigError: a branch's cluster is needed and not known, or there are not as many clusters as branches.
        CheckpointError, DataError: a run or the corpus cannot be read, or they do not fit together.
        FolderError: the folder cannot be written, or another process evaluates there.
    """
    needs_clusters = config.weights == "tfidf" or config.prior == "cluster"
    if needs_clusters and clusters is None:
        clusters = [subject.cluster() for subject in subjects]
    if clusters is not None and len(clusters) != len(subjects):
        raise ConfigError(f"--clusters: {len(clusters)} for {len(subjects)} runs; give one for each, in their order")
    texts = [subject.text(corpus) for subject in subjects]
    text, of_clusters = texts[0], list(clusters) if needs_clusters and clusters is not None else []
    on = {"corpus": text.digest, "contexts": len(text), "ensemble": config.model_dump(), "clusters": of_clusters}
    known = find(out / FILE, on | {"branches": [subject.key for subject in subjects]})
    if known is not None and not again:
        return record(out / FILE, known)
    centres = Centres.load(corpus, of_clusters, subjects[0].tokenizer) if config.weights == "tfidf" else None
    prior = None
    if config.prior == "cluster":
        prior = training_shares(corpus, subjects[0].config.model, text.context_length, of_clusters)
    ensemble = Ensemble(config, len(subjects), centres, prior)
    with claim(out):
        kept = KeptLosses(out)
        losses = _losses_of(subjects, texts, kept, again, progress)
        found = score_ensemble(ensemble, text, losses, _after(progress, len(subjects), len(subjects) + 1))
        result = {
            "key": on | {"branches": [subject.key for subject in subjects]},
            "data": str(corpus),
            **asdict(found.scores),
            "weights": found.weights,
            "branches_in_use": found.branches_in_use,
            "flops_per_token": ensemble.flops([subject.config.model.cost().forward_flops for subject in subjects]),
            "members": [_member(s, text, part) for s, part in zip(subjects, losses, strict=True)],
        }
        record(out / FILE, result)
        kept.remove_others()
    return result


def _losses_of(
    subjects: Sequence[Subject], texts: Sequence[HeldOutText], kept: KeptLosses, again: bool, progress: Progress | None
) -> list[Tensor]:
    """Token losses of each branch, those that are kept as they are; one model in memory at a time."""

    def key(number: int) -> dict[str, Any]:
        text = texts[number]
        on = {"corpus": text.digest, "contexts": len(text), "document_mask": text.document_mask}
        return subjects[number].key | on

    places = range(len(subjects))
    shapes = [(len(text), text.context_length) for text in texts]
    found = {n: part for n in places if not again and (part := kept.find(key(n), shapes[n])) is not None}
    if found and progress is not None:
        progress(len(found) * len(texts[0]), (len(subjects) + 1) * len(texts[0]))
    for number in places:
        if number not in found:
            model = subjects[number].load()  # which settles the key
            found[number] = token_losses(model, texts[number], _after(progress, len(found), len(subjects) + 1))
            kept.keep(key(number), found[number])
    return [found[number] for number in places]


def _after(progress: Progress | None, done: int, of: int) -> Progress | None:
    """Progress of one reading of a text, after ``done`` others, of so many."""
    return None if progress is None else lambda read, contexts: progress(done * contexts + read, of * contexts)


def _member(subject: Subject, text: HeldOutText, losses: Tensor) -> dict[str, Any]:
    """What a branch makes of the text alone."""
    alone = ((batch, part[0]) for batch, part in stored_losses(text, [losses]))
    return {"run": str(subject.folder)} | asdict(score(text, alone))


def _device(name: str | None) -> torch.device:
    if name is None:
        return pick_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from None
    return device
