"""Held-out text, predicted token by token: nats of every label, bits per byte of all, by domain and by cluster.

The figures are those of a run's own final evaluation (``summary.json``), for any corpus of the run's tokenizer. Bits
per byte divides the summed bits by the bytes of the predicted tokens' text.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightbulb.data.config import DataConfig, DataError
from lightbulb.data.corpus import context_length_of, tokenizer_of
from lightbulb.data.loader import IGNORED_LABEL, PADDING_SAMPLE, Batch, HeldOut
from lightbulb.data.mixture import domain_of
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.models.language import LanguageConfig, LanguageModel

Progress = Callable[[int, int], None]
"""Called with how many contexts a model has read, and of how many."""


@dataclass(frozen=True)
class Scores:
    """How well held-out text is predicted; domains and clusters without a label are left out.

    Attributes:
        loss: nats per token.
        bpb: bits per byte.
        tokens: predicted tokens.
        bytes: of their text.
        domain_loss: nats per token, by domain.
        domain_bpb: bits per byte, by domain.
        cluster_bpb: bits per byte, by cluster over all domains; empty for a corpus without clusters.
    """

    loss: float
    bpb: float
    tokens: int
    bytes: int
    domain_loss: dict[str, float]
    domain_bpb: dict[str, float]
    cluster_bpb: dict[str, float]


class HeldOutText:
    """The held-out split of a corpus, in batches.

    Args:
        path: folder of the corpus.
        model: whose tokens they are. Contexts are the corpus's, which may be shorter than the model's.
        tokenizer: of the model.
        batch_size: contexts per batch.
        document_mask: let no token see another document.
        max_contexts: take so many contexts only, evenly spaced; None for all.

    Attributes:
        held_out: rows and groups.
        tokenizer: as given.

    Raises:
        DataError: no corpus, one of another tokenizer or of longer contexts, or one without held-out text.
    """

    def __init__(
        self,
        path: Path,
        model: LanguageConfig,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        document_mask: bool = False,
        max_contexts: int | None = None,
    ):
        path = path.expanduser()
        found = tokenizer_of(path)
        if found != tokenizer.digest:
            raise DataError(
                f"{path}: written with the tokenizer {found[:16]}, the model reads {tokenizer.digest[:16]} (sha256 of "
                "tokenizer.json): its ids mean other text; run preprocess with tokenizer.path set to the run's "
                "tokenizer.json"
            )
        length = min(context_length_of(path), model.context_length)  # of a longer one the corpus says what to do
        # Documents are always read: ensembles want them, and the model is given them with document_mask only.
        data = DataConfig(path=path, document_mask=True)
        self.held_out = HeldOut(data, length, model.vocab_size, batch_size, max_rows=max_contexts)
        self.tokenizer = tokenizer
        self.document_mask = document_mask
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes())

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.held_out)

    def __len__(self) -> int:
        """Contexts."""
        return len(self.held_out.rows)

    @property
    def context_length(self) -> int:
        """Tokens of a context."""
        return self.held_out.corpus.context_length

    @property
    def digest(self) -> str:
        """Changes with any held-out row of the corpus."""
        return self.held_out.corpus.digest

    @property
    def groups(self) -> list[str]:
        """Names of the domains, or of the clusters of each, by number."""
        return list(self.held_out.corpus.groups)

    def bytes_of(self, labels: Tensor) -> Tensor:
        """Bytes of text of each label, 0 where there is none; of the labels' shape."""
        return torch.where(labels == IGNORED_LABEL, 0, self.token_bytes[labels.clamp_min(0)])


@torch.no_grad()
def batch_losses(
    model: LanguageModel, text: HeldOutText, progress: Progress | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch of the text with the model's nats of its labels, ``[batch, length]`` float32 on the CPU; 0 where
    there is no label."""
    device = next(model.parameters()).device
    done = 0
    for batch in text:
        assert batch.document_ids is not None
        documents = batch.document_ids.to(device) if text.document_mask else None
        yield batch, model(batch.tokens.to(device), batch.labels.to(device), documents).float().cpu()
        done += int((batch.sample_ids != PADDING_SAMPLE).sum())
        if progress is not None:
            progress(done, len(text))


def token_losses(model: LanguageModel, text: HeldOutText, progress: Progress | None = None) -> Tensor:
    """Nats of every label of the text, ``[contexts, length]`` float32 on the CPU."""
    return torch.cat([losses for _, losses in batch_losses(model, text, progress)])[: len(text)]


def stored_losses(text: HeldOutText, losses: Sequence[Tensor]) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch of the text again, with what several models made of it, ``[models, batch, length]``; a last batch
    that the text does not fill is cut.

    Args:
        text: that the models have read.
        losses: of each model, as :func:`token_losses` gives them.
    """
    first = 0
    for batch in text:
        here = torch.stack([part[first : first + len(batch.tokens)] for part in losses])
        first += len(batch.tokens)
        rows = slice(here.shape[1])
        changes = {name: part[rows] for name, part in batch._asdict().items() if part is not None}
        yield batch._replace(**changes), here


def score(text: HeldOutText, found: Iterable[tuple[Batch, Tensor]]) -> Scores:
    """Sum up batches with the nats of their labels, ``[batch, length]`` each."""
    sums = torch.zeros(len(text.groups), 3, dtype=torch.float64)  # nats, tokens, bytes
    for batch, losses in found:
        here = batch.groups != PADDING_SAMPLE
        labels = batch.labels[here]
        counted = labels != IGNORED_LABEL
        nats = losses[here].double().where(counted, 0.0)
        sums.index_add_(
            0, batch.groups[here], torch.stack([nats.sum(1), counted.sum(1), text.bytes_of(labels).sum(1)], dim=1)
        )
    by_group = sums.numpy()
    domains = _summed(text.groups, by_group, domain_of)
    clusters = _summed(text.groups, by_group, cluster_of)
    nats, tokens, size = by_group.sum(0).tolist()
    return Scores(
        loss=nats / max(tokens, 1),
        bpb=_bits_per_byte(by_group.sum(0)),
        tokens=int(tokens),
        bytes=int(size),
        domain_loss={name: float(part[0] / part[1]) for name, part in domains.items()},
        domain_bpb={name: _bits_per_byte(part) for name, part in domains.items()},
        cluster_bpb={name: _bits_per_byte(part) for name, part in clusters.items()},
    )


def cluster_of(group: str) -> str | None:
    """The cluster that a group is, whatever its domain; None for a whole domain."""
    return group.partition("/")[2] or None


def _summed(groups: list[str], sums: np.ndarray, name_of: Callable[[str], str | None]) -> dict[str, np.ndarray]:
    """Rows of ``sums`` added up by a name of their group, those without a name or without a token left out."""
    found: dict[str, np.ndarray] = {}
    for group, row in zip(groups, sums, strict=True):
        name = name_of(group)
        if name is not None and row[1]:
            found[name] = found.get(name, 0) + row
    return dict(sorted(found.items()))


def _bits_per_byte(sums: np.ndarray) -> float:
    return float(sums[0] / math.log(2) / max(sums[2], 1))
