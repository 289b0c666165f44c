"""The tokenizer: lossless, blind to control tokens in text, exact about bytes."""

import hashlib
import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lightbulb.data import tokenizer as tokenizer_module
from lightbulb.data.tokenizer import EOS, MAX_PART_CHARS, Tokenizer, TokenizerError

CODE = "def add(first_1, second):\n    # sum of two\n    return first_1 + second\n\n\nclass Adder:\n    pass\n"
AWKWARD = [
    "",
    " ",
    "\n\n\t x",
    "\x00\x1b",
    "é漢字🎉 \u200b\u202e",
    "a\r\nb\r",
    "    \n" * 5,
    "\ufeffx",
    "1234567",
    "___",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([CODE] * 4 + ["the quick brown fox\n"], vocab_size=400)


@pytest.mark.parametrize("text", [*AWKWARD, CODE], ids=repr)
def test_decoding_restores_the_text(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_control_token_in_a_document_is_text(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_batch([f"a {EOS} b"])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a {EOS} b"


def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int64 and len(sizes) == tokenizer.vocab_size
    assert sizes[tokenizer.eos_id] == 0
    for text, ids in zip(AWKWARD, tokenizer.encode_batch(AWKWARD), strict=True):
        assert sizes[ids].sum() == len(text.encode())


def test_bytes_cut_inside_a_letter_are_exact(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_batch(["é"])
    assert tokenizer.decode_bytes(ids[:1]) == "é".encode()[:1]
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_ids_that_are_no_tokens_stand_for_nothing(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_batch(["a"])
    assert tokenizer.decode_bytes([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 100]) == b"a"


def test_newline_and_indentation_are_one_token(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_batch(["x\n    y"])
    assert [tokenizer.decode_bytes([i]) for i in ids] == [b"x", b"\n    ", b"y"]


def test_batch_order_is_kept_across_calls(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_CALL_CHARS", 1 << 10)
    monkeypatch.setattr(tokenizer_module, "MAX_PART_CHARS", 1 << 8)
    texts = [CODE * n for n in (1, 15, 0, 50, 2, 80)]
    together = tokenizer.encode_batch(texts)
    assert together == [tokenizer.encode_batch([text])[0] for text in texts]


@pytest.mark.parametrize("letter", ["x", " ", "\n", "漢", "-"], ids=repr)
def test_endless_run_of_one_letter_is_encoded(tokenizer: Tokenizer, letter: str) -> None:
    text = letter * (3 * MAX_PART_CHARS + 1)
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text


def test_training_twice_gives_the_same_digest(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train([CODE] * 4 + ["the quick brown fox\n"], vocab_size=400)
    assert again.digest == tokenizer.digest


def test_training_reports_each_text() -> None:
    seen: list[int] = []
    Tokenizer.train(["abc", "de"], 257, seen.append)
    assert seen == [3, 2]


def test_saved_file_is_the_digest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == tokenizer.digest
    loaded = Tokenizer.load(path)
    assert (loaded.digest, loaded.vocab_size, loaded.eos_id) == (tokenizer.digest, tokenizer.vocab_size, 0)
    assert loaded.encode_batch([CODE]) == tokenizer.encode_batch([CODE])
    assert loaded.encode_batch([EOS]) == tokenizer.encode_batch([EOS])


def test_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size: 100 is too small; it needs at least 257"):
        Tokenizer.train(["x"], 100)


def test_loading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none\.json: cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"bad\.json: not a Hugging Face tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    (tmp_path / "wp.json").write_text(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "</s>": 1})).to_str())
    with pytest.raises(TokenizerError, match=r"wp\.json: neither byte-level nor with byte fallback"):
        Tokenizer.load(tmp_path / "wp.json")


def test_end_of_text_must_be_known_or_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "renamed.json"
    path.write_text(tokenizer._text.replace(EOS, "<stop>"))
    with pytest.raises(TokenizerError, match=r"renamed\.json: no end-of-text token .* set tokenizer\.eos"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, eos="<stop>").eos_id == 0


def test_end_of_text_not_marked_special_is_still_text_in_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    description = json.loads(tokenizer._text)
    description["added_tokens"][0]["special"] = False
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(description))
    loaded = Tokenizer.load(path)
    assert loaded.eos_id not in loaded.encode_batch([EOS])[0]
    assert loaded.token_bytes()[loaded.eos_id] == 0


def test_byte_fallback_tokenizer_counts_bytes(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "\u2581")  # type: ignore[assignment]
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    specials = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(["the fox the fox"], trainers.BpeTrainer(vocab_size=300, special_tokens=specials))
    description = json.loads(inner.to_str())
    description["added_tokens"] = description["added_tokens"][:2]
    path = tmp_path / "fallback.json"
    path.write_text(json.dumps(description))
    loaded = Tokenizer.load(path)
    [ids] = loaded.encode_batch(["the fox é"])
    assert loaded.decode_bytes(ids) == "the fox é".encode()
    assert loaded.token_bytes()[ids].sum() == len("the fox é".encode())


# tiktoken's core in place of the tokenizers library: the same ids, or not at all.


def gpt2_like(**changes: object) -> dict:
    """A byte-level BPE whose pieces are not bounded, as GPT-2's."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([CODE, "aaaa bbbb " * 30, "    " * 50], trainer)
    return json.loads(inner.to_str()) | changes


@given(text=st.text(alphabet=st.one_of(st.sampled_from(list(CODE + EOS)), st.characters(exclude_categories=["Cs"]))))
def test_equality_of_the_fast_path(tokenizer: Tokenizer, text: str) -> None:
    for each in (tokenizer, GPT2):
        assert each.is_fast
        assert each.encode_batch([text]) == each._encode([text])


GPT2 = Tokenizer(json.dumps(gpt2_like()))


def test_threads_change_nothing(tokenizer: Tokenizer) -> None:
    texts = [CODE * (i + 1) for i in range(20)] + [""]
    one, two = (tokenizer.encode_arrays(texts, threads) for threads in (1, 2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert len(two[-1]) == 0


def reordered() -> dict:
    """Merges that do not come in the order of their ids."""
    description = gpt2_like()
    description["model"]["merges"].reverse()
    return description


@pytest.mark.parametrize(
    "description",
    [
        gpt2_like(normalizer={"type": "NFC"}),
        gpt2_like(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        reordered(),
    ],
    ids=["normalizer", "prefix_space", "order"],
)
def test_what_is_not_equivalent_is_left_to_the_tokenizers_library(description: dict) -> None:
    tokenizer = Tokenizer(json.dumps(description))
    assert not tokenizer.is_fast
    assert tokenizer.encode_batch([CODE]) == tokenizer._encode([CODE])


@pytest.mark.parametrize("letter", ["a", " ", "é", "!"])
def test_endless_pieces_take_linear_time_and_little_memory(letter: str) -> None:
    """Fault M33: 8 MB of one letter."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [ids] = GPT2.encode_arrays([letter * 8_000_000])
    assert GPT2.token_bytes()[ids].sum() == 8_000_000 * len(letter.encode())
    assert time.process_time() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


def test_unigram_is_lossless_too() -> None:
    tokenizer = Tokenizer.train([CODE] * 4, 300, method="unigram")
    assert not tokenizer.is_fast and json.loads(tokenizer._text)["model"]["type"] == "Unigram"
    for text in [*AWKWARD, CODE, EOS]:
        [ids] = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids
