"""What one source says of a corpus's rows: its likeliest tokens at every position, and how well it predicts a row."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightbulb.config import ConfigError
from lightbulb.data.corpus import Corpus
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.memory import check_memory
from lightbulb.experts.source import Source, build_model
from lightbulb.experts.translate import Translation, has_same_vocabulary
from lightbulb.parallel.host import pick_device

_PADDING = 0
"""Document number behind the last document of a row."""
_NOTHING_READ = 1e4
"""Loss of a source that has no token to predict in a row."""


class Opinion(NamedTuple):
    """Of some rows.

    Attributes:
        ids: ``[rows, length, k]`` the student's tokens.
        probabilities: ``[rows, length, k]``; 0 where there is no token.
        loss: ``[rows]`` nats for each of the row's labels, of the whole text, whatever tokens it was read in.
    """

    ids: Tensor
    probabilities: Tensor
    loss: Tensor


class Teacher:
    """A source, ready to read rows.

    Args:
        source: the model.
        student: tokenizer of the rows.
        top_k: tokens to keep.
        document_mask: keep the documents of a row apart, as the student does.

    Raises:
        ConfigError: the source's tokenizer is another model's, or the source does not fit into memory.
    """

    def __init__(self, source: Source, student: Tokenizer, top_k: int, document_mask: bool):
        self.device, self.top_k, self.document_mask = pick_device(), top_k, document_mask
        self.vocab_size = student.vocab_size
        own = Tokenizer.load(source.tokenizer_path)
        if own.vocab_size > source.model_config.vocab_size:
            raise ConfigError(
                f"{source.path}: its tokenizer has {own.vocab_size} entries, its model rows for "
                f"{source.model_config.vocab_size}; give it its own tokenizer.json"
            )
        self.translation = None if has_same_vocabulary(own, student) else Translation(own, student)
        self.length = source.model_config.context_length
        check_memory(source.model_config.cost().params, f"asking {source.path} about a corpus")
        self.model = build_model(source).to(self.device)

    @torch.no_grad()
    def read(self, corpus: Corpus, rows: range) -> Opinion:
        """Its opinion of consecutive rows."""
        read = [corpus[row] for row in rows]
        tokens = torch.stack([torch.from_numpy(row.tokens) for row in read])
        documents = torch.stack([torch.from_numpy(row.document_ids) for row in read])
        is_label = documents[:, 1:] != _PADDING
        if self.translation is None:
            return self._directly(tokens, documents, is_label)
        parts = [
            self._translated(ids[: 1 + int(has.sum())], len(has)) for ids, has in zip(tokens, is_label, strict=True)
        ]
        return Opinion(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def _directly(self, tokens: Tensor, documents: Tensor, is_label: Tensor) -> Opinion:
        mask = documents[:, :-1].to(self.device) if self.document_mask else None
        log_probabilities = self.model(tokens[:, :-1].to(self.device), None, mask).log_softmax(-1).cpu()
        nats = -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0]
        best = log_probabilities.topk(min(self.top_k, log_probabilities.shape[-1]), dim=-1)
        probabilities = best.values.exp() * (is_label[..., None] & (best.indices < self.vocab_size))
        missing = self.top_k - probabilities.shape[-1]
        loss = (nats * is_label).sum(1) / is_label.sum(1).clamp_min(1)
        return Opinion(
            nn.functional.pad(best.indices, (0, missing)), nn.functional.pad(probabilities, (0, missing)), loss
        )

    def _translated(self, row: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """A row without its padding, read in the source's own tokens."""
        assert self.translation is not None
        found = self.translation.align(row.tolist())
        ids = torch.tensor(found.ids[: self.length + 1], dtype=torch.int64)
        targets, probabilities = torch.zeros(length, self.top_k, dtype=torch.int64), torch.zeros(length, self.top_k)
        if len(ids) < 2:
            return targets, probabilities, torch.tensor(_NOTHING_READ)
        log_probabilities = self.model(ids[None, :-1].to(self.device))[0].log_softmax(-1).cpu()
        nats = -log_probabilities.gather(-1, ids[1:, None]).sum()
        best = log_probabilities.topk(min(4 * self.top_k, log_probabilities.shape[-1]), dim=-1)
        pairs = [(i - 1, j - 1) for i, j in zip(found.ours, found.theirs, strict=True) if i and 0 < j < len(ids)]
        if pairs:
            ours, theirs = torch.tensor(pairs).t()
            translated = self.translation.translated(best.indices[theirs])
            targets[ours], probabilities[ours] = combined(translated, best.values[theirs].exp(), self.top_k)
        # Of the whole row, where the source's context was shorter.
        whole = nats * (len(found.ids) - 1) / (len(ids) - 1)
        return targets, probabilities, whole / max(len(row) - 1, 1)


def combined(ids: Tensor, probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of lists in which tokens may stand twice (their probabilities are added), or be none.

    Args:
        ids: ``[..., n]``; -1 for none.
        probabilities: ``[..., n]``.
        top_k: tokens to keep.
    """
    ids, order = ids.sort(dim=-1)
    ordered = probabilities.gather(-1, order).masked_fill(ids < 0, 0.0)
    group = nn.functional.pad(ids[..., 1:] != ids[..., :-1], (1, 0)).long().cumsum(-1)
    total = torch.zeros_like(ordered).scatter_add(-1, group, ordered)
    token = torch.zeros_like(ids).scatter(-1, group, ids.clamp_min(0))
    missing = max(0, top_k - ids.shape[-1])
    best = nn.functional.pad(total, (0, missing)).topk(top_k, dim=-1)
    return nn.functional.pad(token, (0, missing)).gather(-1, best.indices), best.values
