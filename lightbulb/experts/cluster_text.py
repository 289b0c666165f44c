"""Token ids of a cluster's text: of a prepared corpus, or of prompts; ids that are no text where there is none."""

from pathlib import Path

import numpy as np
import torch

from lightbulb.config import ConfigError
from lightbulb.data.config import DataConfig, MixtureConfig, PartConfig
from lightbulb.data.corpus import Corpus
from lightbulb.data.mixture import resolve
from lightbulb.data.sequence import rows_of_part
from lightbulb.data.shards import Row
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.upcycle_config import SourceConfig
from lightbulb.models.language import LanguageConfig

_PADDING = 0
"""Document number behind the last document of a row."""


def contexts_of(
    source: SourceConfig, own: DataConfig | None, tokenizer: Path, model: LanguageConfig, tokens: int
) -> list[list[int]]:
    """About so many tokens of a cluster, in contexts.

    Args:
        source: names prompts, or a corpus and its clusters.
        own: what the source was trained on, if that is known.
        tokenizer: of prompts.
        model: whose contexts they are.
        tokens: how many.

    Raises:
        ConfigError: there is neither prompt nor corpus, or the corpus's ids are of another tokenizer.
        DataError: the corpus is not one, or not of this context length, or has no such cluster.
        TokenizerError: prompts, and no tokenizer to read them.
    """
    if source.prompts:
        ids = Tokenizer.load(tokenizer).encode_batch(source.prompts)
        return [part[: model.context_length] for part in ids if part]
    path = source.text or (own.path if own else None)
    if path is None:
        raise ConfigError(f"{source.path}: learned routers need text of its domain; give it text (a corpus) or prompts")
    corpus = Corpus(path.expanduser(), "train", model.context_length, model.vocab_size)
    if tokenizer.is_file() and Tokenizer.load(tokenizer).digest != corpus.tokenizer_digest:
        raise ConfigError(f"{path}: written with another tokenizer than {tokenizer}; preprocess it with this one")
    count = -(-tokens // model.context_length)
    mixture, part = source.mixture, None
    if own is not None and not (source.text or mixture):
        mixture, part = own.mixture, own.part
    found = _rows(corpus, mixture or MixtureConfig(), count) if part is None else _rows_of_part(corpus, part, count)
    return [ids[:-1][documents[:-1] != _PADDING].tolist() for ids, documents, _ in found]


def _rows_of_part(corpus: Corpus, part: PartConfig, count: int) -> list[Row]:
    """So many rows of a random part, evenly spaced."""
    rows = rows_of_part(len(corpus), part.number, part.of)
    places = np.unique(np.arange(count) * len(rows) // count)  # no row of a few twice
    return [corpus[int(row)] for row in rows[places]]


def _rows(corpus: Corpus, mixture: MixtureConfig, count: int) -> list[Row]:
    """So many rows of a mixture: of each group its share, evenly spaced."""
    # the i-th of n rows is that of the group in whose part of [0, 1) the middle of the i-th n-th lies, and as far in it
    middles, ends = (np.arange(count) + 0.5) / count, np.cumsum(resolve(mixture, corpus.groups).weights)
    groups = np.searchsorted(ends / ends[-1], middles, side="right")
    shards, begins = list(corpus.domains.values()), np.r_[0.0, ends / ends[-1]]
    sizes = np.array([len(rows) for rows in shards])[groups]
    places = np.minimum((middles - begins[groups]) / np.diff(begins)[groups] * sizes, sizes - 1).astype(int)
    chosen = dict.fromkeys(zip(groups.tolist(), places.tolist(), strict=True))  # no row of a few twice
    return [shards[group][place] for group, place in chosen]


def random_contexts(model: LanguageConfig, tokens: int, seed: int) -> list[list[int]]:
    """Ids that are no text."""
    generator = torch.Generator().manual_seed(seed)
    length = min(model.context_length, tokens)
    return torch.randint(model.vocab_size, (-(-tokens // length), length), generator=generator).tolist()
