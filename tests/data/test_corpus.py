"""A split is opened only when every file is the one its manifest lists."""

from pathlib import Path

import orjson
import pytest

from lightbulb.data.config import DataError
from lightbulb.data.corpus import Corpus

LENGTH, VOCAB = 16, 300


def test_rows_of_all_domains_have_one_numbering(corpus: Path) -> None:
    train = Corpus(corpus, "train", LENGTH, VOCAB)
    assert list(train.domains) == ["plain", "poems"]
    assert len(train) == sum(map(len, train.domains.values()))
    border = len(train.domains["plain"])
    assert train[border].tokens.tolist() == train.domains["poems"][0].tokens.tolist()
    assert train[border - 1].tokens.tolist() == train.domains["plain"][border - 1].tokens.tolist()
    assert Corpus(corpus, "held_out", LENGTH, VOCAB).digest != train.digest


def test_index_of_another_corpus_is_refused(corpus: Path) -> None:
    other = (corpus / "held_out" / "plain" / "index.json").read_bytes()
    (corpus / "train" / "plain" / "index.json").write_bytes(other)
    with pytest.raises(DataError, match=r"plain/index\.json: not the file manifest\.json lists"):
        Corpus(corpus, "train", LENGTH, VOCAB)


def test_changed_tokenizer_is_refused(corpus: Path) -> None:
    with (corpus / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the file manifest\.json lists"):
        Corpus(corpus, "train", LENGTH, VOCAB)


def test_missing_tokenizer_is_named(corpus: Path) -> None:
    (corpus / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        Corpus(corpus, "train", LENGTH, VOCAB)


def test_model_that_does_not_fit_the_corpus_is_told_both_values(corpus: Path) -> None:
    with pytest.raises(DataError, match="written for context_length=16, the model has 32"):
        Corpus(corpus, "train", 32, VOCAB)
    with pytest.raises(DataError, match="tokenizer has 300 entries, the model's vocab_size is 256"):
        Corpus(corpus, "train", LENGTH, 256)


def test_folder_without_a_corpus_is_told_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: missing; set data\.path .* `lightbulb preprocess CONFIG`"):
        Corpus(tmp_path, "train", LENGTH, VOCAB)


@pytest.mark.parametrize("domain", ["../train/plain", "/etc", "a/b", ""], ids=repr)
def test_manifest_cannot_lead_outside_the_corpus(corpus: Path, domain: str) -> None:
    manifest = orjson.loads((corpus / "manifest.json").read_bytes())
    manifest["splits"]["train"][domain] = manifest["splits"]["train"].pop("plain")
    (corpus / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: splits\.train"):
        Corpus(corpus, "train", LENGTH, VOCAB)


def test_row_count_of_the_manifest_must_hold(corpus: Path) -> None:
    manifest = orjson.loads((corpus / "manifest.json").read_bytes())
    manifest["splits"]["train"]["plain"]["rows"] += 1
    (corpus / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(DataError, match=r"train/plain: \d+ rows, manifest\.json says \d+"):
        Corpus(corpus, "train", LENGTH, VOCAB)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 2}'], ids=["empty", "bare", "list", "newer"])
def test_unusable_manifest_is_named(corpus: Path, content: bytes) -> None:
    (corpus / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        Corpus(corpus, "train", LENGTH, VOCAB)
