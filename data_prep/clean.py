"""Text to cleaner text, or the reason why it is dropped.

The limits on repetition and the stop words are Gopher's (Rae et al. 2021, arXiv:2112.11446, appendix A1). datatrove's
filter of that name is not used: it wants a word tokenizer per language, and words between spaces serve here.
"""

import re
from collections import Counter
from collections.abc import Sequence

from lightbulb.data_prep.config import CleanConfig, RepetitionConfig
from lightbulb.data_prep.conversation import changed
from lightbulb.data_prep.counts import Counts
from lightbulb.data_prep.documents import Document

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
LINE_BREAKS = re.compile(r"\n+")
PARAGRAPH_BREAKS = re.compile(r"\n{2,}")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


def cleaned(document: Document, config: CleanConfig, counts: Counts) -> Document | None:
    """The document as it is written, or None where it is dropped; repairs and drops are counted."""
    text, answers = document.text, document.answers
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        if config.encoding == "drop":
            counts.drop("not_text", document.path, document.text)
            return None
        text, answers = changed(text, answers, _without_surrogates)
    if config.controls == "strip" and CONTROLS.search(text):
        text, answers = changed(text, answers, lambda piece: CONTROLS.sub("", piece))
        counts.repaired["controls"] += 1
    reason = _reason(text, config)
    if reason is not None:
        counts.drop(reason, document.path, text)
        return None
    return document if text is document.text else document._replace(text=text, answers=answers)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reason(text: str, config: CleanConfig) -> str | None:
    """Why a text is dropped, the cheapest reason first."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "not_text"
    if len(text) < config.min_chars:
        return "too_short"
    if config.max_chars is not None and len(text) > config.max_chars:
        return "too_long"
    if config.min_stop_words and len(STOP_WORDS.intersection(text.lower().split())) < config.min_stop_words:
        return "few_stop_words"
    if config.repetition is not None and _repeats(text, config.repetition):
        return "repetitive"
    return None


def _repeats(text: str, limits: RepetitionConfig) -> bool:
    """Whether any share of the text that repeats is above its limit."""
    lines, paragraphs = LINE_BREAKS.split(text.strip()), PARAGRAPH_BREAKS.split(text.strip())
    for pieces, most, most_characters in (
        (paragraphs, limits.duplicate_paragraphs, limits.duplicate_paragraph_characters),
        (lines, limits.duplicate_lines, limits.duplicate_line_characters),
    ):
        repeated, characters = _repeated(pieces)
        if repeated > most * len(pieces) or characters > most_characters * len(text):
            return True
    words = text.split()
    return any(_top_ngram(words, n) > most * len(text) for n, most in limits.top_ngrams.items()) or any(
        _repeated_ngrams(words, n) > most * len(text) for n, most in limits.duplicate_ngrams.items()
    )


def _repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces stood before, and their characters."""
    counted = Counter(pieces)
    return len(pieces) - len(counted), sum((n - 1) * len(piece) for piece, n in counted.items())


def _top_ngram(words: Sequence[str], n: int) -> int:
    """Characters in all occurrences of the most frequent n-gram; 0 where none stands twice."""
    counted = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    ngram, count = max(counted.items(), key=lambda item: item[1], default=((), 1))
    return count * (sum(map(len, ngram)) + n - 1) if count > 1 else 0


def _repeated_ngrams(words: Sequence[str], n: int) -> int:
    """Characters in n-grams that stood before, each word counted once."""
    ends = [0]
    for word in words:
        ends.append(ends[-1] + len(word))
    seen: set[tuple[str, ...]] = set()
    characters, i = 0, 0
    while i + n <= len(words):
        ngram = tuple(words[i : i + n])
        if ngram in seen:
            characters += ends[i + n] - ends[i]
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters
