"""Real text to compare two models on."""

import textwrap
from pathlib import Path

import orjson
from torch import Tensor, tensor

from lightbulb.data.config import DataError
from lightbulb.data.corpus import Corpus
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.receipt import Text

ROWS, LENGTH = 4, 256


def held_out_text(tokenizer: Tokenizer, corpus: Path | None, context_length: int) -> Text:
    """Rows of equal length, at most ``ROWS`` of at most ``LENGTH`` tokens.

    Args:
        tokenizer: of the model.
        corpus: folder of a corpus, whose held-out split is taken, whatever it was tokenised with; None for the source
            of a module of Python's library.
        context_length: longest the model reads.

    Raises:
        DataError: no corpus, or one without as much held-out text as a row.
        TokenizerError: the corpus's tokenizer cannot be read.
    """
    if corpus is None:
        source, text = f"{textwrap.__name__}.py of Python's library", Path(textwrap.__file__).read_text("utf-8")
    else:
        source, text = f"{corpus}, held out", _held_out(corpus)
    ids = tokenizer.encode_batch([text])[0]
    length = min(context_length, LENGTH)
    rows = [ids[start : start + length] for start in range(0, length * ROWS, length)]
    whole = [row for row in rows if len(row) == length]
    if not whole:
        raise DataError(f"{source}: has {len(ids)} tokens, fewer than the {length} that models are compared on")
    return Text(source=source, token_ids=whole)


def tokens_of(text: Text) -> Tensor:
    """``[rows, length]``."""
    return tensor(text.token_ids)


def _held_out(path: Path) -> str:
    """The first held-out rows as text."""
    try:
        manifest = orjson.loads((path / "manifest.json").read_bytes())
        context_length, vocab_size = int(manifest["context_length"]), int(manifest["tokenizer"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no corpus ({error}); name a folder that `lightbulb preprocess` wrote") from None
    corpus = Corpus(path, "held_out", context_length, vocab_size)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    rows = -(-ROWS * LENGTH * 4 // context_length)  # another tokenizer may need fewer tokens for them
    return "".join(tokenizer.decode(corpus[row].tokens[:-1].tolist()) for row in range(min(rows, len(corpus))))
