"""What general compressors make of the held-out text: the numbers a language model has to beat.

All are bits per byte of the bytes that the evaluated labels stand for, over the same rows as the model's:

- ``unigram_bpb``: entropy of single bytes;
- ``gzip_context_bpb``: gzip -9 of each context by itself, which like the model sees nothing outside it;
- ``gzip_all_bpb``, ``xz_all_bpb``: gzip -9 and xz -9 of everything at once, which may look back across contexts.
"""

import gzip
import lzma
from collections.abc import Sequence

import numpy as np

from lightbulb.data.loader import IGNORED_LABEL, HeldOut
from lightbulb.data.tokenizer import Tokenizer


def context_bytes(held_out: HeldOut, tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of the labels of every evaluated row, over all ranks; laid end to end they are the held-out text."""
    contexts = []
    for number in held_out.rows:
        labels = held_out.corpus[int(number)].labels()
        contexts.append(tokenizer.decode_bytes(labels[labels != IGNORED_LABEL].tolist()))
    return contexts


def baselines(contexts: Sequence[bytes], train_counts: np.ndarray | None = None) -> dict[str, float]:
    """Bits per byte of each baseline.

    Args:
        contexts: bytes of each evaluated context.
        train_counts: ``[256]`` how often each byte occurs in the training text; without it the held-out text's own
            counts are used, which is the best any unigram model can do on it.

    Raises:
        ValueError: there is not one byte.
    """
    text = b"".join(contexts)
    if not text:
        raise ValueError("the held-out contexts hold no bytes; evaluate at least one row of text")
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    # One is added to each training count, so that a byte that training never saw still has a finite cost.
    model = counts if train_counts is None else train_counts + 1
    seen = counts > 0
    nats = -np.sum(counts[seen] * np.log(model[seen] / model.sum()))
    return {
        "unigram_bpb": float(nats / np.log(2) / len(text)),
        "gzip_context_bpb": 8 * sum(len(gzip.compress(context, 9, mtime=0)) for context in contexts) / len(text),
        "gzip_all_bpb": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_all_bpb": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
