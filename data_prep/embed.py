"""Documents to vectors of length one, whose products are similarities.

TF-IDF and a truncated singular value decomposition, as c-BTM does (Gururangan et al. 2023, arXiv:2303.14177: English
stop words, one word for all that begins with a digit, 100 dimensions), or the mean of a sentence model's last hidden
states (as Contriever, Izacard et al. 2021, arXiv:2112.09118), read from a folder. A fitted TF-IDF model is saved
without pickles and embeds new text later: prompts, or held-out documents.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson
import xxhash
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from lightbulb.data_prep.counts import CorpusError
from lightbulb.folder import explained, write_atomically

MAX_CHARS = 1 << 14
"""Characters of a document that are looked at: its subject shows in its beginning."""
MIN_DOCUMENTS = 2
"""A word counts that stands in so many."""

_WORD = re.compile(r"(?u)\b\w\w+\b")
_MODEL, _VECTORS, _SENTENCE_MODEL = "tfidf.json", "tfidf.npy", "sentence_model.json"
_SENTENCE_BATCH = 32
_READ_BYTES = 1 << 20


class Embedder(Protocol):
    """Gives texts their vectors."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """``[texts, dimensions]`` float32 of length one, or zero for a text without a known word."""

    def save(self, folder: Path) -> None:
        """Write what :func:`load_embedder` reads."""


class SentenceEmbedder:
    """A model of sentences: the mean of its last hidden states, without padding.

    Args:
        folder: of the model, as transformers saves one, with its tokenizer.

    Raises:
        CorpusError: the folder holds no such model.
    """

    def __init__(self, folder: Path):
        # Imported here: they take seconds, and only this embedder needs them.
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.folder, self._torch = folder, torch
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise CorpusError(f"embed.path: {folder} holds no model that transformers can load ({error})") from None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        parts = [np.empty((0, self._model.config.hidden_size), dtype=np.float32)]
        for start in range(0, len(texts), _SENTENCE_BATCH):
            batch = [text[:MAX_CHARS] for text in texts[start : start + _SENTENCE_BATCH]]
            tokens = self._tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            with self._torch.no_grad():
                states = self._model(**tokens).last_hidden_state
            is_token = tokens["attention_mask"][..., None].to(states.dtype)
            parts.append(((states * is_token).sum(1) / is_token.sum(1).clamp(min=1)).float().numpy())
        return normalised(np.concatenate(parts))

    def save(self, folder: Path) -> None:
        write_atomically(folder / _SENTENCE_MODEL, orjson.dumps({"folder": str(self.folder.resolve())}))


def model_digest(folder: Path) -> str:
    """Hash of every file of a model's folder.

    Raises:
        CorpusError: there is no such folder.
    """
    folder, hasher = folder.expanduser(), xxhash.xxh3_128()
    if not folder.is_dir():
        raise CorpusError(f"embed.path: {folder}: no such folder; name one that transformers can load a model from")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hasher.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                hasher.update(block)
    return hasher.hexdigest()


def load_embedder(folder: Path) -> Embedder:
    """The embedder that was saved in a folder."""
    if (folder / _SENTENCE_MODEL).is_file():
        return SentenceEmbedder(Path(orjson.loads((folder / _SENTENCE_MODEL).read_bytes())["folder"]))
    return TfidfEmbedder.load(folder)


class TfidfEmbedder:
    """Word frequencies, weighted by rarity and projected.

    Args:
        vocabulary: the words, in the order of the columns.
        idf: ``[words]`` float32 weights.
        components: ``[dimensions, words]`` float32.
    """

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, components: np.ndarray):
        self.vocabulary, self.idf, self.components = list(vocabulary), idf, components
        self._vectorizer = _vectorizer(vocabulary=self.vocabulary)
        self._vectorizer.idf_ = idf

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int, max_features: int, seed: int) -> "TfidfEmbedder":
        """A model of these texts; it has fewer dimensions where there are too few texts or words.

        Raises:
            CorpusError: the texts have no word that two of them share.
        """
        vectorizer = _vectorizer(max_features=max_features, min_df=MIN_DOCUMENTS)
        try:
            weights = vectorizer.fit_transform([text[:MAX_CHARS] for text in texts])
        except ValueError:
            raise CorpusError(
                f"embed: no word stands in {MIN_DOCUMENTS} of the {len(texts)} documents; add documents"
            ) from None
        size = max(1, min(dimensions, *(side - 1 for side in weights.shape)))
        _, _, components = randomized_svd(weights, size, random_state=seed)
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, components.astype(np.float32))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        weights: csr_matrix = self._vectorizer.transform([text[:MAX_CHARS] for text in texts])
        return normalised(weights @ self.components.T)

    def words_of(self, vector: np.ndarray, count: int) -> list[str]:
        """The words that speak most for a direction ``[dimensions]``."""
        return [self.vocabulary[i] for i in np.argsort(-(vector @ self.components), kind="stable")[:count]]

    def save(self, folder: Path) -> None:
        write_atomically(folder / _MODEL, orjson.dumps({"vocabulary": self.vocabulary, "idf": self.idf.tolist()}))
        with explained(folder / _VECTORS):
            np.save(folder / _VECTORS, self.components)

    @classmethod
    def load(cls, folder: Path) -> "TfidfEmbedder":
        """What :meth:`save` wrote; nothing is unpickled."""
        model = orjson.loads((folder / _MODEL).read_bytes())
        components = np.load(folder / _VECTORS, allow_pickle=False)
        return cls(model["vocabulary"], np.array(model["idf"]), components)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, float32; zero rows stay zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if not word[0].isdigit()]


def _vectorizer(**options: object) -> TfidfVectorizer:
    return TfidfVectorizer(
        tokenizer=_words,
        token_pattern=None,
        lowercase=False,
        stop_words=sorted(ENGLISH_STOP_WORDS),
        sublinear_tf=True,
        dtype=np.float32,
        **options,
    )
