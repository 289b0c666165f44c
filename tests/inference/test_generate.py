"""Decoding: filters, streaming and beam search, on a small model with a recurrent and an attention state."""

import itertools
import logging

import pytest
import torch
from torch import Tensor, nn

from lightbulb.config import ConfigError
from lightbulb.inference.generate import (
    GenerationError,
    SamplingConfig,
    TextStream,
    beam_search,
    filter_scores,
    generate,
    reorder_state,
    sample_next,
)
from lightbulb.mixers.base import ModelState

EOS = 0
PROMPT = [1, 2, 3]


class TinyDecoder(nn.Module):
    """A leaky recurrence followed by one attention head; honours the contract of a language model."""

    def __init__(self, vocab_size: int = 5, dim: int = 8, context_length: int = 64, seed: int = 0, scale: float = 3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.context_length = context_length
        self.embed = nn.Parameter(torch.randn(vocab_size, dim, generator=generator))
        self.query = nn.Parameter(torch.randn(dim, dim, generator=generator))
        self.head = nn.Parameter(torch.randn(dim, vocab_size, generator=generator) * scale / dim**0.5)
        self.decoded: list[tuple[int, ...]] = []

    def init_state(self, batch_size: int, max_length: int) -> ModelState:
        dim = self.embed.shape[1]
        layers = {
            "recur": {"h": torch.zeros(batch_size, dim)},
            "attend": {"kv": torch.zeros(batch_size, max_length, dim)},
        }
        return {**layers, "position": 0}

    def decode(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        self.decoded.append(tuple(tokens.shape))
        hidden, cache, position, logits = state["recur"]["h"], state["attend"]["kv"].clone(), state["position"], []
        for token in tokens.T:
            hidden = torch.tanh(0.7 * hidden + self.embed[token])
            cache[:, position] = hidden
            position += 1
            weights = torch.einsum("bd,bld->bl", hidden @ self.query, cache[:, :position]).softmax(-1)
            logits.append(torch.einsum("bl,bld->bd", weights, cache[:, :position]) @ self.head)
        return torch.stack(logits, 1), {"recur": {"h": hidden}, "attend": {"kv": cache}, "position": position}


def full_logits(model: TinyDecoder, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.decode(torch.tensor([ids]), model.init_state(1, len(ids)))[0][0]


def greedy(model: TinyDecoder, max_new_tokens: int, eos_id: int | None = EOS) -> list[int]:
    """Greedy decoding that runs the whole sequence again for each token."""
    ids = list(PROMPT)
    for _ in range(max_new_tokens):
        token = int(full_logits(model, ids)[-1].argmax())
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(PROMPT) :]


def every_text(model: TinyDecoder, max_new_tokens: int, penalty: float) -> list[tuple[list[int], float]]:
    """All texts that end or reach the length limit, best first."""
    vocab_size, found = model.embed.shape[0], []
    for length in range(1, max_new_tokens + 1):
        for ids in itertools.product(range(vocab_size), repeat=length):
            if EOS in ids[:-1] or (ids[-1] != EOS and length < max_new_tokens):
                continue
            logp = full_logits(model, [*PROMPT, *ids]).double().log_softmax(-1)
            total = sum(float(logp[len(PROMPT) - 1 + i, token]) for i, token in enumerate(ids))
            found.append(([token for token in ids if token != EOS], total / length**penalty))
    return sorted(found, key=lambda text: -text[1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_beam_is_greedy_is_top_k_one(seed: int, penalty: float):
    model = TinyDecoder(seed=seed)
    expected = greedy(model, 12)
    top_one = SamplingConfig(top_k=1, max_new_tokens=12)
    assert list(generate(model, PROMPT, SamplingConfig(temperature=0, max_new_tokens=12), EOS)) == expected
    assert list(generate(model, PROMPT, top_one, EOS)) == expected
    assert beam_search(model, PROMPT, 1, 12, EOS, penalty)[0][0] == expected


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beam_search_finds_what_brute_force_finds(seed: int, penalty: float):
    model = TinyDecoder(vocab_size=4, seed=seed)
    expected = every_text(model, 4, penalty)
    found = beam_search(model, PROMPT, len(expected), 4, EOS, penalty)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_narrow_beam_search_reports_true_scores_and_repeats_itself(num_beams: int):
    model = TinyDecoder(vocab_size=4, seed=7, scale=1.5)
    expected = {tuple(ids): score for ids, score in every_text(model, 5, 1.0)}
    found = beam_search(model, PROMPT, num_beams, 5, EOS, 1.0)
    assert len(found) == num_beams
    for ids, score in found:
        assert score == pytest.approx(expected[tuple(ids)], abs=1e-5)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert found == beam_search(model, PROMPT, num_beams, 5, EOS, 1.0)


class ScriptedDecoder(TinyDecoder):
    """Next-token probabilities looked up by the last token: a Markov chain."""

    def __init__(self, table: list[list[float]]):
        super().__init__(vocab_size=len(table))
        self.table = torch.tensor(table).log()

    def decode(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self.table[tokens], super().decode(tokens, state)[1]


def test_beam_search_keeps_open_beams_when_one_ends_and_stops_when_none_can_win():
    # token 3 starts; ending at once has 0.4, but 1 -> end has 0.5 * 0.9 = 0.45
    table = [[1.0, 0, 0, 0], [0.9, 0.05, 0.05, 0], [0.5, 0.25, 0.25, 0], [0.4, 0.5, 0.1, 0]]
    model = ScriptedDecoder(table)
    found = beam_search(model, [3], 2, 40, EOS, length_penalty=0.0)
    assert [ids for ids, _ in found] == [[1], []]
    assert [score for _, score in found] == pytest.approx(torch.tensor([0.45, 0.4]).double().log().tolist())
    # prefill and one step: nothing open can reach 0.4 after that
    assert model.decoded == [(1, 1), (2, 1)]


def test_beam_search_goes_on_while_an_open_beam_can_win():
    # after two steps [] (0.3) and [1] (0.12) have ended, but 1 -> 2 has 0.48 and its end is two steps away
    table = [
        [1.0, 0, 0, 0, 0, 0],
        [0.2, 0, 0.8, 0, 0, 0],
        [0, 0, 0, 0, 0, 1.0],
        [0.3, 0.6, 0, 0, 0.1, 0],
        [0.9, 0, 0.1, 0, 0, 0],
        [1.0, 0, 0, 0, 0, 0],
    ]
    found = beam_search(ScriptedDecoder(table), [3], 2, 40, EOS, length_penalty=0.0)
    assert [ids for ids, _ in found] == [[1, 2, 5], []]
    assert [score for _, score in found] == pytest.approx(torch.tensor([0.48, 0.3]).double().log().tolist())


def test_beam_search_breaks_ties_by_token_id_and_skips_impossible_tokens():
    model = ScriptedDecoder([[0.25] * 4, [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0]])
    found = beam_search(model, [3], 4, 2, EOS)
    assert [ids for ids, _ in found] == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert len(beam_search(model, [3], 8, 1, EOS)) == 2


def test_reordered_state_continues_the_chosen_sequences():
    model = TinyDecoder()
    _, state = model.decode(torch.tensor([[1, 2], [3, 4], [2, 2]]), model.init_state(3, 8))
    moved = reorder_state(state, torch.tensor([2, 0, 0]))
    logits, _ = model.decode(torch.tensor([[1], [3], [4]]), moved)
    for row, ids in enumerate([[2, 2, 1], [1, 2, 3], [1, 2, 4]]):
        torch.testing.assert_close(logits[row, -1], full_logits(model, ids)[-1])
    assert moved["position"] == 2


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, [2]), (0.45, [2]), (0.55, [0, 2]), (0.85, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]):
    scores = torch.tensor([[0.3, 0.15, 0.5, 0.05]]).log()
    assert filter_scores(scores, 0, top_p).isfinite().nonzero()[:, 1].tolist() == kept


def test_top_k_keeps_k_and_comes_before_top_p():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert filter_scores(scores, 2, 1.0).isfinite().tolist() == [[True, True, False, False]] * 2
    # of the top two, renormalised to 0.571 and 0.429, the first alone reaches 0.55; without top-k it would not
    assert filter_scores(scores, 2, 0.55).isfinite().sum(-1).tolist() == [1, 2]
    assert filter_scores(scores, 0, 0.55).isfinite().sum(-1).tolist() == [2, 3]


def test_draws_follow_the_tempered_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    drawn = sample_next(logits, temperature=2.0, generator=torch.Generator().manual_seed(0)).bincount(minlength=3)
    # four standard deviations of a frequency over 20,000 draws
    assert drawn / 20_000 == pytest.approx((logits[0] / 2).softmax(-1), abs=0.014)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_temperature_towards_zero_is_greedy(temperature: float):
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)) * 30
    assert torch.equal(sample_next(logits, temperature=temperature), sample_next(logits, temperature=0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature: .*greater than or equal to 0.*-0.1"),
        ({"temperature": float("nan")}, "temperature: .*finite"),
        ({"top_k": -1}, "top_k: .*greater than or equal to 0.*-1"),
        ({"top_p": 0.0}, "top_p: .*greater than 0.*0.0"),
        ({"top_p": 1.5}, "top_p: .*less than or equal to 1.*1.5"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_range(settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        sample_next(torch.zeros(1, 3), **settings)


def test_beam_search_refuses_sampling_settings_and_bad_values():
    with pytest.raises(ValueError, match="num_beams=2 does not sample, so top_k would have no effect"):
        SamplingConfig(num_beams=2, top_k=5)
    with pytest.raises(ConfigError, match="num_beams: .*greater than or equal to 1"):
        beam_search(TinyDecoder(), PROMPT, 0, 5, EOS)
    with pytest.raises(GenerationError, match="call beam_search"):
        generate(TinyDecoder(), PROMPT, SamplingConfig(num_beams=2), EOS)


def test_broken_logits_are_an_error():
    with pytest.raises(GenerationError, match="not finite"):
        sample_next(torch.tensor([[0.0, float("nan")]]), temperature=0)


def test_generation_prefills_once_then_feeds_single_tokens_lazily():
    model = TinyDecoder()
    stream = generate(model, PROMPT, SamplingConfig(temperature=0, max_new_tokens=3), eos_id=None)
    assert model.decoded == []
    first = next(stream)
    assert model.decoded == [(1, 3)]
    rest = list(stream)
    assert model.decoded == [(1, 3), (1, 1), (1, 1)]
    assert [first, *rest] == greedy(model, 3, eos_id=None)


def test_one_seed_draws_one_text():
    model = TinyDecoder(scale=0.3)
    texts = [list(generate(model, PROMPT, SamplingConfig(seed=seed, max_new_tokens=20), None)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_stops_with_a_warning_where_the_context_is_full(caplog: pytest.LogCaptureFixture):
    model = TinyDecoder(context_length=8)
    with caplog.at_level(logging.WARNING):
        assert len(list(generate(model, PROMPT, SamplingConfig(max_new_tokens=50), None))) == 5
        assert len(beam_search(model, PROMPT, 2, 50, None)[0][0]) == 5
    assert [r.getMessage() for r in caplog.records] == [
        "stopped after 5 of 50 new tokens: the model's context_length of 8 is full"
    ] * 2


def test_prompts_that_are_empty_or_too_long_are_refused_at_once():
    with pytest.raises(GenerationError, match="prompt_ids is empty"):
        generate(TinyDecoder(), [], SamplingConfig(), EOS)
    with pytest.raises(GenerationError, match=r"8 tokens but the model's context_length is 8; shorten .* at most 7"):
        generate(TinyDecoder(context_length=8), [1] * 8, SamplingConfig(), EOS)


def test_text_stream_joins_characters_split_over_tokens():
    text = "naïve — 电灯 💡!"
    stream = TextStream()
    pieces = [stream.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish() == ""


def test_text_stream_replaces_what_is_no_utf8():
    stream = TextStream()
    assert stream.feed(b"a\xffb\xe7\x94") == "a\ufffdb"
    assert stream.finish() == "\ufffd"
