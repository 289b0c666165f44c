"""Compression baselines on text whose entropy is known."""

import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from lightbulb.data.loader import HeldOut
from lightbulb.data.shards import Row
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.compression import baselines, context_bytes


def test_unigram_of_equally_likely_bytes_is_their_entropy() -> None:
    assert baselines([bytes(range(256))] * 4)["unigram_bpb"] == pytest.approx(8.0)
    assert baselines([b"abcd" * 10])["unigram_bpb"] == pytest.approx(2.0)


def test_training_counts_cost_more_than_the_texts_own() -> None:
    text = [b"aaab" * 50]
    counts = np.bincount(np.frombuffer(b"bbba" * 50, dtype=np.uint8), minlength=256)
    own, trained = baselines(text), baselines(text, counts)
    assert trained["unigram_bpb"] > own["unigram_bpb"]
    # A byte that training never saw has a cost, not an infinite one.
    assert np.isfinite(baselines([b"z"], counts)["unigram_bpb"])


def test_compressors_see_more_when_they_see_everything() -> None:
    source = Path(string.__file__).read_bytes()
    contexts = [source[i : i + 2000] for i in range(0, len(source), 2000)]
    numbers = baselines(contexts)
    assert 1.0 < numbers["gzip_all_bpb"] < numbers["gzip_context_bpb"] < numbers["unigram_bpb"] < 6.0
    assert numbers["xz_all_bpb"] < numbers["gzip_context_bpb"]


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="hold no bytes"):
        baselines([b"", b""])


def test_contexts_are_the_bytes_of_the_labels() -> None:
    tokenizer = Tokenizer.train(["ab"], 257)
    [ids] = tokenizer.encode_batch(["xaébc"])
    row = Row(np.array([*ids, tokenizer.eos_id, 0, 0]), np.array([1] * (len(ids) + 1) + [0, 0]))
    held_out = cast(HeldOut, cast(Any, SimpleNamespace(rows=np.array([1]), corpus=[None, row])))
    assert context_bytes(held_out, tokenizer) == ["aébc".encode()]
