"""Token ids of a cluster's text: of a prepared corpus, or of prompts; ids that are no text where there is none."""

from pathlib import Path

import numpy as np
import torch

from lightbulb.config import ConfigError
from lightbulb.data.config import DataConfig, MixtureConfig
from lightbulb.data.corpus import Corpus
from lightbulb.data.mixture import choose, resolve
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
        source: names prompts or a corpus.
        own: what the source was trained on, if that is known: a corpus, and of it what its mixture draws.
        tokenizer: of prompts.
        model: whose contexts they are.
        tokens: how many.

    Raises:
        ConfigError: there is neither prompt nor corpus, or the corpus's ids are of another tokenizer.
        DataError: the corpus is not one, or not of this context length.
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
    return _rows(corpus, own.mixture if own and not source.text else None, model, tokens)


def _rows(corpus: Corpus, mixture: MixtureConfig | None, model: LanguageConfig, tokens: int) -> list[list[int]]:
    """Rows that are trained on, evenly spaced in each group of the corpus, of about so many tokens in all."""
    count = min(len(corpus), -(-tokens // model.context_length))
    if mixture is None:
        rows = [corpus[number * len(corpus) // count] for number in range(count)]
    else:
        groups = list(corpus.domains.values())
        drawn = np.bincount(choose(0, 0, count, resolve(mixture, corpus.groups).weights), minlength=len(groups))
        wanted = [min(int(number), len(group)) for number, group in zip(drawn, groups, strict=True)]
        rows = [
            group[number * len(group) // of_group]
            for of_group, group in zip(wanted, groups, strict=True)
            for number in range(of_group)
        ]
    return [ids[:-1][documents[:-1] != _PADDING].tolist() for ids, documents, _ in rows]


def random_contexts(model: LanguageConfig, tokens: int, seed: int) -> list[list[int]]:
    """Ids that are no text."""
    generator = torch.Generator().manual_seed(seed)
    length = min(model.context_length, tokens)
    return torch.randint(model.vocab_size, (-(-tokens // length), length), generator=generator).tolist()
