"""Vectors of documents: length, subjects, and the same after saving."""

from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.embed import SentenceEmbedder, TfidfEmbedder, load_embedder

SEA = ["the ship sails over the sea with wind in its sails", "waves of the sea and a ship in the wind"]
SUMS = ["add the numbers and divide the sum by 2024", "a sum of numbers, divide and multiply the numbers"]


def test_tfidf_puts_one_subject_together() -> None:
    embedder = TfidfEmbedder.fit([*SEA, *SUMS] * 3, 2, 100, seed=0)
    vectors = embedder.embed([*SEA, *SUMS, "", "zzz"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 0, 0], atol=1e-6)
    similar = vectors[:4] @ vectors[:4].T
    assert min(similar[0, 1], similar[2, 3]) > 0.9 and similar[:2, 2:].max() < 0.2
    assert {"ship", "sea"} <= set(embedder.words_of(vectors[0], 4))


def test_numbers_and_stop_words_do_not_count() -> None:
    vocabulary = TfidfEmbedder.fit(SUMS * 2, 2, 100, seed=0).vocabulary
    assert "numbers" in vocabulary and not {"2024", "the", "and"} & set(vocabulary)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    embedder = TfidfEmbedder.fit([*SEA, *SUMS] * 2, 3, 100, seed=0)
    embedder.save(tmp_path)
    np.testing.assert_array_equal(load_embedder(tmp_path).embed(SEA), embedder.embed(SEA))


def test_documents_without_common_words_are_refused() -> None:
    with pytest.raises(CorpusError, match="no word stands in 2 of the 2 documents; add documents"):
        TfidfEmbedder.fit(["apple", "pear"], 2, 100, seed=0)


def test_a_sentence_model_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ship", "sea", "sum", "numbers"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **shape)).save_pretrained(folder)
    embedder = SentenceEmbedder(folder)
    embedder.save(tmp_path)
    vectors = load_embedder(tmp_path).embed(["ship sea", "ship sea sum numbers ship " * 9, "sum"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # padding to the longest of a batch changes nothing
    np.testing.assert_allclose(embedder.embed(["ship sea"])[0], vectors[0], atol=1e-5)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="embed.path: .* holds no model"):
        SentenceEmbedder(tmp_path)
