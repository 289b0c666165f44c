"""Cluster-weighted ensembles of branches: c-BTM (Gururangan et al. 2023, arXiv:2303.14177).

Each branch was trained on one cluster. Together they predict with ``p(x_t) = sum_j w_j p_j(x_t)``, a mixture of
probabilities, not of logits, whose weights depend on what is before ``x_t`` and nothing else:

- ``tfidf``: ``w_j ~ exp(-|h(x_<t) - c_j|^2 / T)``, the corpus's own embedding of the context against the clusters'
  centres. It is computed anew every so many tokens, until the context has as many as ``prefix`` says; before the first
  time all branches count alike.
- ``likelihood``: the posterior probability that branch j wrote the context,
  ``w_j ~ prior_j (prod_{s<t} p_j(x_s))^{1/T}``.
- ``uniform``: all alike.

With ``top_k`` all but the largest weights are zero and the rest is divided by its sum. The probability of a token needs
its probability under each branch only, so branches read the text one after another, in the memory of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Config
from lightbulb.data.config import DataError
from lightbulb.data.corpus import Corpus
from lightbulb.data.loader import IGNORED_LABEL, Batch
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.cluster import Clusters
from lightbulb.data_prep.embed import Embedder, load_embedder
from lightbulb.evaluation.held_out import HeldOutText, Progress, Scores, cluster_of, score, stored_losses
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.documents import run_starts

MODELS = "clusters"
"""Folder of a corpus with the models that give text its cluster, as data_prep/pipeline.py names it."""


class EnsembleConfig(Config):
    """How the branches of an ensemble are weighted."""

    weights: Literal["tfidf", "likelihood", "uniform"]
    """What weights are made of: distances to the clusters' centres, the branches' own likelihoods, or nothing."""
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Lower is sparser. None for 0.1 with tfidf, as published, and 1 with likelihood, Bayes' rule."""
    top_k: int | None = Field(None, ge=1)
    """Branches with a weight above zero; None for all."""
    prior: Literal["uniform", "cluster"] = "uniform"
    """With likelihood, the weights at the start: all alike, or each cluster's share of the training tokens."""
    update_every: int = Field(32, ge=1)
    """With tfidf, tokens between computations of the weights."""
    prefix: int | None = Field(None, ge=1)
    """With tfidf, tokens of the context that weights depend on; None for all that is before the token."""
    by_document: bool = False
    """The context begins with the document, not with the row."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "EnsembleConfig":
        users = {"tfidf": {"temperature", "top_k", "update_every", "prefix", "by_document"}}
        users |= {"likelihood": {"temperature", "top_k", "prior", "by_document"}, "uniform": set()}
        idle = sorted(self.model_fields_set - {"weights"} - users[self.weights])
        if changed := [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"{changed[0]}: has no effect with weights {self.weights!r}; leave it out")
        return self

    def divisor(self) -> float:
        """The temperature in force."""
        return self.temperature or (0.1 if self.weights == "tfidf" else 1.0)


class Centres:
    """Where the branches' clusters are, and where text is.

    Args:
        embedder: of the corpus.
        centres: ``[branches, dimensions]``.
        tokenizer: gives text back.
    """

    def __init__(self, embedder: Embedder, centres: np.ndarray, tokenizer: Tokenizer):
        self.embedder, self.tokenizer = embedder, tokenizer
        self.centres = centres.astype(np.float64)

    @classmethod
    def load(cls, corpus: Path, clusters: Sequence[int], tokenizer: Tokenizer) -> "Centres":
        """Those of a corpus's clusters.

        Args:
            corpus: folder of the corpus.
            clusters: of each branch.
            tokenizer: of the corpus.

        Raises:
            DataError: the corpus has no clusters, or not these.
        """
        folder = corpus.expanduser() / MODELS
        try:
            found, embedder = Clusters.load(folder), load_embedder(folder)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: no model of clusters ({error}); give a corpus that preprocess wrote with cluster:, or "
                "weigh by likelihood"
            ) from None
        unknown = [number for number in clusters if not 0 <= number < len(found.centres)]
        if unknown:
            raise DataError(f"{folder}: has no cluster {unknown[0]}; it has 0 to {len(found.centres) - 1}")
        return cls(embedder, found.centres[list(clusters)], tokenizer)

    def log_weights(self, texts: Sequence[str], temperature: float) -> Tensor:
        """``[branches, texts]`` float64: the logarithm of the weights; a text without a known word has even ones."""
        vectors = self.embedder.embed(texts).astype(np.float64)
        squares = (self.centres**2).sum(1)[:, None] - 2 * self.centres @ vectors.T  # |h|^2 is the same for all
        squares[:, ~vectors.any(1)] = 0.0
        # Differences first: a temperature near zero would overflow the rest.
        return torch.from_numpy((squares.min(0) - squares) / temperature).log_softmax(0)


class Ensemble:
    """Weights of branches in context.

    Args:
        config: how they are weighted.
        branches: how many there are.
        centres: of the branches' clusters, for ``tfidf``.
        prior: ``[branches]`` positive weights at the start, for ``likelihood``; None for even ones.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        branches: int,
        centres: Centres | None = None,
        prior: Sequence[float] | None = None,
    ):
        if config.weights == "tfidf" and centres is None:
            raise ValueError("weights tfidf needs the centres of the branches' clusters")
        self.config, self.branches, self.centres = config, branches, centres
        self.log_prior = torch.tensor(prior or [1.0] * branches, dtype=torch.float64).log().log_softmax(0)

    def log_weights(self, batch: Batch, losses: Tensor) -> Tensor:
        """The logarithm of each branch's weight for each label, of sum 1 over the branches.

        Args:
            batch: the text, with document ids.
            losses: ``[branches, batch, length]`` nats of the labels.

        Returns:
            ``[branches, batch, length]`` float64.
        """
        if self.config.weights == "uniform":
            return torch.zeros(losses.shape, dtype=torch.float64).log_softmax(0)
        starts = self._starts(batch)
        found = self._posterior(losses, starts) if self.centres is None else self._by_distance(batch, starts)
        return largest(found, self.config.top_k)

    def flops(self, each: Sequence[float]) -> float:
        """FLOPs of one predicted token, from those of each branch's forward pass: ``likelihood`` asks all branches;
        else those without a weight are left out (one that gets a weight later must first read the context)."""
        asked = min(self.config.top_k or self.branches, self.branches)
        return sum(each) * (1.0 if self.config.weights != "tfidf" else asked / self.branches)

    def _starts(self, batch: Batch) -> Tensor:
        """``[batch, length]``: the position where the context of each position begins."""
        assert batch.document_ids is not None
        return run_starts(batch.document_ids) if self.config.by_document else torch.zeros_like(batch.tokens)

    def _posterior(self, losses: Tensor, starts: Tensor) -> Tensor:
        evidence = -losses.double()
        before = evidence.cumsum(-1) - evidence  # of the labels before each
        if self.config.by_document:
            before = before - before.gather(-1, starts.expand(len(losses), -1, -1))
        scaled = (before - before.amax(0)) / self.config.divisor()
        return (self.log_prior[:, None, None] + scaled).log_softmax(0)

    def _by_distance(self, batch: Batch, starts: Tensor) -> Tensor:
        """Each label's context is its inputs up to its own, cut down to a multiple of ``update_every``."""
        assert self.centres is not None
        config, (rows, length) = self.config, starts.shape
        known = torch.arange(1, length + 1) - starts
        known = known - known % config.update_every
        known = known.clamp_max(config.prefix or length)
        row = torch.arange(rows)[:, None].expand_as(starts)
        contexts, which = torch.stack([row, starts, known], dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
        texts = [
            self.centres.tokenizer.decode(batch.tokens[r, start : start + count].tolist())
            for r, start, count in contexts.tolist()
        ]
        return self.centres.log_weights(texts, config.divisor())[:, which].view(-1, rows, length)


def mixture(losses: Tensor, log_weights: Tensor) -> Tensor:
    """``-log sum_j w_j p_j`` from nats and log-weights, both ``[branches, ...]``; float64."""
    return -(log_weights.double() - losses.double()).logsumexp(0)


def largest(log_weights: Tensor, top_k: int | None) -> Tensor:
    """Keep the ``top_k`` largest over the first dimension, of equal ones the first, and let them sum to 1 again."""
    if top_k is None or top_k >= len(log_weights):
        return log_weights
    dropped = log_weights.argsort(dim=0, descending=True, stable=True)[top_k:]
    return log_weights.scatter(0, dropped, -torch.inf).log_softmax(0)


@dataclass(frozen=True)
class EnsembleScores:
    """What an ensemble makes of a text.

    Attributes:
        scores: bits per byte.
        weights: mean weight of each branch, by group.
        branches_in_use: mean of the exponential of the weights' entropy.
    """

    scores: Scores
    weights: dict[str, list[float]]
    branches_in_use: float


def score_ensemble(
    ensemble: Ensemble, text: HeldOutText, losses: Sequence[Tensor], progress: Progress | None = None
) -> EnsembleScores:
    """Score a text under an ensemble.

    Args:
        ensemble: the weights.
        text: that the branches have read.
        losses: of each branch, ``[contexts, length]``, as :func:`token_losses` of held_out.py gives them.
        progress: called with the contexts scored.
    """
    # By group: weight of each branch, exponential of the weights' entropy, tokens.
    sums = torch.zeros(len(text.groups), ensemble.branches + 2, dtype=torch.float64)

    def mixed() -> Iterator[tuple[Batch, Tensor]]:
        done = 0
        for batch, here in stored_losses(text, losses):
            log_weights = ensemble.log_weights(batch, here)
            weights = log_weights.exp()
            entropy = -torch.special.xlogy(weights, weights).sum(0, keepdim=True)
            counted = (batch.labels != IGNORED_LABEL).double()
            facts = torch.cat([weights, entropy.exp(), torch.ones_like(entropy)]) * counted
            sums.index_add_(0, batch.groups, facts.sum(-1).t())
            yield batch, mixture(here, log_weights)
            done += len(batch.tokens)
            if progress is not None:
                progress(done, len(text))

    scores = score(text, mixed())
    seen = {name: row for name, row in zip(text.groups, sums, strict=True) if row[-1]}
    return EnsembleScores(
        scores=scores,
        weights={name: (row[:-2] / row[-1]).tolist() for name, row in seen.items()},
        branches_in_use=float(sums[:, -2].sum() / sums[:, -1].sum().clamp_min(1)),
    )


def training_shares(corpus: Path, model: LanguageConfig, context_length: int, clusters: Sequence[int]) -> list[float]:
    """Training tokens of clusters, for a prior.

    Raises:
        DataError: a cluster has none.
    """
    groups = Corpus(corpus.expanduser(), "train", context_length, model.vocab_size).groups
    names = [f"cluster-{number:02d}" for number in clusters]
    tokens = [sum(group.tokens for name, group in groups.items() if cluster_of(name) == wanted) for wanted in names]
    if 0 in tokens:
        raise DataError(f"{corpus}: no training tokens in {names[tokens.index(0)]}; set prior: uniform")
    return [float(count) for count in tokens]
