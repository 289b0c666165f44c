"""Prompts and answers: only answers count, whole pairs in a row, markup in them is text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbulb.config import ConfigError, build_config
from lightbulb.data.config import DataConfig
from lightbulb.data.corpus import Corpus, holds_conversations
from lightbulb.data.loader import IGNORED_LABEL, TrainLoader
from lightbulb.data.tokenizer import EOS, Tokenizer
from lightbulb.data_prep.clean import cleaned
from lightbulb.data_prep.config import CleanConfig, CorpusConfig
from lightbulb.data_prep.conversation import ConversationConfig, changed, join, render, split
from lightbulb.data_prep.counts import Counts
from lightbulb.data_prep.documents import Document
from lightbulb.data_prep.inspect import open_manifest, samples
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.data_prep.verify import verify_corpus
from lightbulb.launcher.inspect import shown

LENGTH = 96
ODD = f"{EOS} is text\n\nassistant:\nso"


def records() -> list[dict[str, Any]]:
    """Sixty pairs; one that holds markup, one too long for a row, one whose prompt alone is, and three broken ones."""
    pairs = [{"q": f"What is {i} plus {i}?", "a": f"It is {2 * i}."} for i in range(60)]
    pairs += [{"q": ODD, "a": ODD[::-1]}, {"q": "Count.", "a": "one two three " * 60}, {"q": "word " * 200, "a": "x"}]
    return [*pairs, {"q": "no answer"}, {"q": "empty", "a": " "}, {"q": 1, "a": "x"}]


def write(folder: Path, found: list[dict[str, Any]], conversation: dict[str, Any], **changes: Any) -> CorpusConfig:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    source = {"type": "jsonl", "domain": "sums", "path": str(folder / "pairs.jsonl"), "conversation": conversation}
    values = {
        "output": str(folder / "corpus"), "context_length": LENGTH, "held_out_fraction": 0.2, "sources": [source],
        "shard_bytes": 1 << 12, "tokenizer": {"vocab_size": 300}, "executor": {"workers": 1},
    }  # fmt: skip
    return build_config(CorpusConfig, values | changes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = write(tmp_path_factory.mktemp("pairs"), records(), {"prompt": "q", "answer": "a"})
    return config.output, preprocess(config).manifest


def pieces(corpus: Path, split_name: Any) -> list[tuple[str, str]]:
    """Every conversation of a split as it stands in the rows: what does not count, what does with ends of text."""
    rows, tokenizer = Corpus(corpus, split_name, LENGTH, 300), Tokenizer.load(corpus / "tokenizer.json")
    found = []
    for row in (rows[number] for number in range(len(rows))):
        for document in range(1, row.document_ids.max() + 1):
            ids, mask = (values[row.document_ids == document] for values in (row.tokens, row.loss_mask))
            answer = ids[mask].tolist()
            text = tokenizer.decode(answer) + ("<end>" if answer[-1] == tokenizer.eos_id else "")
            found.append((tokenizer.decode(ids[~mask].tolist()), text))
            assert tokenizer.eos_id not in ids[~mask] and tokenizer.eos_id not in answer[:-1]
    return found


def test_rows_hold_whole_pairs_of_which_the_answers_count(pairs: tuple[Path, dict[str, Any]]) -> None:
    corpus, manifest = pairs
    whole = {(f"user:\n{r['q']}\n\nassistant:\n", r["a"] + "<end>") for r in records()[:61]}
    found = pieces(corpus, "train") + pieces(corpus, "held_out")
    cut = [answer for prompt, answer in found if "Count." in prompt]
    assert len(cut) == 1 and ("one two three " * 60).startswith(cut[0]) and len(cut[0]) > 20
    assert {pair for pair in found if "Count." not in pair[0]} == whole and len(found) == 62
    (source,) = manifest["sources"]
    dropped = {"no_answer": 1, "no_field_a": 1, "no_field_q": 1, "longer_than_a_context": 1}
    assert source["dropped"] == dropped and source["documents"] == 62
    assert source["repaired"] == {"cut_to_a_context": 1}
    lineage = pq.read_table(corpus / "lineage" / "documents.parquet").to_pylist()
    (longest,) = (line for line in lineage if line["dropped"])
    assert (longest["dropped"], longest["split"], longest["tokens"]) == ("longer_than_a_context", None, 0)


def test_counted_tokens_are_the_labels(pairs: tuple[Path, dict[str, Any]]) -> None:
    corpus, manifest = pairs
    assert holds_conversations(corpus) and not holds_conversations(corpus / "nowhere")
    group = manifest["splits"]["train"]["sums"]
    loader = TrainLoader(DataConfig(path=corpus), LENGTH, 300, 0, group["rows"], 1)
    labels = [batch.labels[0][batch.labels[0] != IGNORED_LABEL] for batch in loader.next_step()]
    loader.close()
    assert sum(map(len, labels)) == group["counted_tokens"] < group["tokens"] / 2


def test_verify_knows_the_mask_and_inspect_shows_it(pairs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    corpus, manifest = pairs
    assert verify_corpus(corpus).problems == []
    for sample in samples(corpus, open_manifest(corpus), "train", 5, 0):
        assert [counts for _, counts in sample.parts] == [False, True]
        (before, _), (answer, _) = sample.parts
        assert shown(sample).plain == f"{before}⟦{answer}⟧" and before.startswith("user:\n")


def test_messages_count_at_every_answer_and_end_there(tmp_path: Path) -> None:
    chat = [
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "?"),
    ]
    found = [{"m": [{"role": role, "content": content} for role, content in chat]}] * 9
    broken = [{"m": "text"}, {"m": [{"role": "tool", "content": "x"}]}, {"m": [{"role": "user"}]}, {"m": []}]
    config = write(
        tmp_path,
        found + broken,
        {"messages": "m"},
        held_out_fraction=0.0,
        tokenizer={"vocab_size": 257},
        context_length=96,
    )
    manifest = preprocess(config).manifest
    dropped = {"no_answer": 1, "no_field_m": 1, "not_a_message": 1, "unknown_role": 1}
    assert manifest["sources"][0]["dropped"] == dropped
    row, tokenizer = Corpus(config.output, "train", 96, 257)[0], Tokenizer.load(config.output / "tokenizer.json")
    ids, mask = (values[row.document_ids == 1] for values in (row.tokens, row.loss_mask))
    answers = np.split(ids, np.flatnonzero(np.diff(mask.astype(int))) + 1)
    texts = [tokenizer.decode(part.tolist()) for part in answers]
    assert texts == ["Be brief.\n\nuser:\n1+1?\n\nassistant:\n", "2", "user:\n2+2?\n\nassistant:\n", "4"]
    assert [part[-1] == tokenizer.eos_id for part in answers] == [False, True, False, True]


def test_plain_text_beside_pairs_counts_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of a book\n" * 200)
    config = write(tmp_path, records()[:20], {"prompt": "q", "answer": "a", "too_long": "drop"}, held_out_fraction=0.0)
    text = build_config(
        CorpusConfig, {"output": "x", "sources": [{"type": "text", "path": str(tmp_path / "book.txt")}]}
    )
    manifest = preprocess(config.model_copy(update={"sources": (*config.sources, *text.sources)})).manifest
    groups = manifest["splits"]["train"]
    assert groups["text"]["counted_tokens"] == groups["text"]["tokens"]
    assert groups["sums"]["counted_tokens"] < groups["sums"]["tokens"]


def test_a_pair_can_be_dropped_instead_of_cut(tmp_path: Path) -> None:
    config = write(tmp_path, records(), {"prompt": "q", "answer": "a", "too_long": "drop"})
    assert preprocess(config).manifest["sources"][0]["dropped"]["longer_than_a_context"] == 2


any_pieces = st.lists(st.tuples(st.text("ab\x01", min_size=1, max_size=4), st.booleans()), min_size=1, max_size=8)


@given(found=any_pieces)
def test_pieces_survive_being_joined_and_changed(found: list[tuple[str, bool]]) -> None:
    found = [*found, ("end", True)]
    whole = join(found)
    letters = [(letter, is_answer) for text, is_answer in split(*whole) for letter in text]
    assert letters == [(letter, is_answer) for text, is_answer in found for letter in text]
    stripped = changed(*whole, lambda text: text.replace("\x01", ""))
    assert [(letter, a) for text, a in split(*stripped) for letter in text] == [x for x in letters if x[0] != "\x01"]


def test_cleaning_keeps_answers_where_they_are() -> None:
    rendered = render(ConversationConfig(), ["a\x01b", "\x01c\x01"])
    assert not isinstance(rendered, str)
    document = cleaned(Document("p", rendered.text, "d", rendered.answers), CleanConfig(controls="strip"), Counts())
    assert document is not None
    assert list(split(document.text, document.answers)) == [("user:\nab\n\nassistant:\n", False), ("c", True)]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ({"turns": {"user": "{content}"}}, "has none for 'assistant'"),
        ({"turns": {"user": "x", "assistant": "{content}"}}, "user: 'x' must hold {content} once"),
        ({"prompt": "a", "answer": "a"}, "'a' is the prompt's field too"),
        ({"promt": "a"}, "unknown key 'promt', did you mean 'prompt'"),
    ],
)
def test_a_wrong_conversation_is_an_error(tmp_path: Path, conversation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, records(), conversation)
    assert message in str(caught.value)


def test_conversation_stands_alone(tmp_path: Path) -> None:
    source = {"type": "jsonl", "path": "x", "conversation": {}, "template": "{a}"}
    with pytest.raises(ConfigError, match="takes the place of text_field and template"):
        build_config(CorpusConfig, {"output": "x", "sources": [source]})
