"""Tokens trained on and held-out losses, by domain.

A cluster counts for its domain. Training tokens are predicted ones, so that they add up to the run's tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightbulb.data.loader import IGNORED_LABEL, Batch, HeldOut, TrainLoader
from lightbulb.data.mixture import domain_of

MAX_GROUPS = 64
"""With more groups a step's record has no epochs of each; the run's summary has them."""


def bytes_predicted(batches: Sequence[Batch], token_bytes: Tensor) -> int:
    """Bytes of text of the labels; ``token_bytes [vocabulary]``."""
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    return int(token_bytes[labels[labels != IGNORED_LABEL]].sum())


class DomainAccount:
    """What a run has read of each domain.

    Attributes:
        tokens: predicted tokens by domain, of all ranks.
    """

    def __init__(self, loader: TrainLoader):
        self._loader = loader
        domains = [domain_of(name) for name in loader.sequence.names]
        self.tokens = dict.fromkeys(domains, 0)
        numbers = {domain: number for number, domain in enumerate(self.tokens)}
        self._domain_of_group = np.array([numbers[domain] for domain in domains])
        self._told: set[str] = set()

    def count(self, batches: Sequence[Batch]) -> list[int]:
        """Predicted tokens of this rank's batches, by domain."""
        predicted = torch.cat([(batch.labels != IGNORED_LABEL).sum(1) for batch in batches]).numpy()
        groups = torch.cat([batch.groups for batch in batches]).numpy()
        counts = np.bincount(self._domain_of_group[groups], weights=predicted, minlength=len(self.tokens))
        return [int(count) for count in counts]

    def add(self, counts: Sequence[int]) -> None:
        """Add a step's counts over all ranks."""
        for domain, count in zip(self.tokens, counts, strict=True):
            self.tokens[domain] += count

    def news(self) -> list[str]:
        """What changes from the next step on, each in a sentence: mixture, batch size, groups that are used up."""
        fresh = [name for name in self._loader.exhausted() if name not in self._told]
        self._told.update(fresh)
        epochs = self._loader.group_epochs if fresh else {}
        now = self._loader.samples_consumed
        before, stage = (self._loader.sequence.stage(at) for at in (now - 1, now))
        begins = [f"the next one begins data.stages.{stage - 1} and its mixture"] if stage != before else []
        sizes = self._loader.batch_sizes
        old, new = (sizes.of_step(sizes.step_at(at)) for at in (now - 1, now))
        begins += [f"the next one has {new} contexts, this one had {old}"] if new != old else []
        return begins + [
            f"group {name} has been read {epochs[name]:.4g} times, as often as max_epochs allows; its weight goes to "
            "the others"
            for name in fresh
        ]

    def record(self) -> dict[str, Any]:
        """What the metrics of a step say."""
        found: dict[str, Any] = {"domain_tokens": self.tokens}
        if len(self._domain_of_group) <= MAX_GROUPS:
            found["group_epochs"] = self._loader.group_epochs
        return found


class HeldOutTally:
    """Sums of a held-out evaluation.

    Args:
        held_out: what is evaluated.
        token_bytes: ``[vocabulary]`` bytes of text of each token.
    """

    def __init__(self, held_out: HeldOut, token_bytes: Tensor):
        self._held_out = held_out
        self._token_bytes = token_bytes
        self.domains = held_out.domains
        self.bytes = [0] * len(self.domains)
        """Of this rank's labels, by domain."""
        self._nats = [0.0] * len(self.domains)
        self._tokens = [0] * len(self.domains)

    def by_domain(self, step: int, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """The batch once for each domain that any rank reads in this step, other rows without labels."""
        present, own = self._held_out.domains_of(step)
        for domain in present:
            keep = torch.from_numpy(own == domain)[:, None]
            yield domain, batch._replace(labels=torch.where(keep, batch.labels, IGNORED_LABEL))

    def add(self, domain: int, batch: Batch, nats: float, tokens: int) -> None:
        """Add what all ranks found for a domain."""
        self._nats[domain] += nats
        self._tokens[domain] += tokens
        self.bytes[domain] += bytes_predicted([batch], self._token_bytes)

    def results(self, text_bytes: Sequence[int]) -> dict[str, Any]:
        """Nats per token and bits per byte, of all and by domain; ``text_bytes`` by domain, of all ranks."""
        seen = [i for i, tokens in enumerate(self._tokens) if tokens]
        bits = [nats / math.log(2) for nats in self._nats]
        return {
            "held_out_loss": sum(self._nats) / max(sum(self._tokens), 1),
            "held_out_bpb": sum(bits) / max(sum(text_bytes), 1),
            "domain_loss": {self.domains[i]: self._nats[i] / self._tokens[i] for i in seen},
            "domain_bpb": {self.domains[i]: bits[i] / max(text_bytes[i], 1) for i in seen},
        }
