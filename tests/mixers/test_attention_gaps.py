"""Attention where tokens are hidden behind gists, or left out, sample by sample."""

from typing import Any

import pytest
import torch
from attention_cases import DIM, LENGTH, NO_TURN, all_options, causal_options, decode, documents, inputs, mixer, run
from torch import Tensor

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.nn.attention_mask import Rule, Tokens, Visibility
from lightbulb.nn.parameter import initialise

# --- gist tokens


def gists(*places: tuple[int, int]) -> Tensor:
    """``[2, LENGTH]``: from the first to before the second place, of each sample."""
    marks = torch.zeros(2, LENGTH, dtype=torch.bool)
    for sample, (first, last) in enumerate(places):
        marks[sample, first:last] = True
    return marks


def test_equality_gist_mask_is_that_of_the_paper() -> None:
    marks = gists((3, 5), (6, 7))
    places = torch.arange(LENGTH)
    tokens = Tokens(places[None], places[None]).with_gists(marks)
    found = Visibility(Rule(), tokens, tokens).dense()[:, 0]
    for sample, (first, last) in enumerate(((3, 5), (6, 7))):
        after_last, before_first = places >= last, places < first
        wanted = torch.ones(LENGTH, LENGTH).tril().bool() & ~(after_last[:, None] & before_first[None])
        assert torch.equal(found[sample], wanted)


@all_options
def test_equality_no_gist_is_base(options: dict[str, Any]) -> None:
    x, module = inputs(), mixer(options)
    for ids in (None, documents()):
        plain, found = run(module, x, document_ids=ids), run(module, x, document_ids=ids, gist=gists())
        assert (plain - found).abs().max() < 1e-12


@all_options
def test_a_prompt_is_seen_through_its_gists_only(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs()
    (grad,) = torch.autograd.grad(run(module, x, gist=gists((3, 5), (6, 7)))[7:].square().sum(), x)
    assert grad[:3, 0].abs().max() == 0 and grad[:6, 1].abs().max() == 0
    assert grad[8].abs().min() > 0


def test_each_run_of_gists_stands_for_what_is_before_it() -> None:
    marks = gists((2, 3), (2, 3))
    marks[:, 5] = True
    places = torch.arange(LENGTH)
    tokens = Tokens(places[None], places[None]).with_gists(marks)
    seen = Visibility(Rule(), tokens, tokens).dense()[0, 0]
    assert seen[8].nonzero().flatten().tolist() == [2, 5, 6, 7, 8]
    assert seen[5].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert seen[2].nonzero().flatten().tolist() == [0, 1, 2]


@causal_options
def test_gists_stay_within_their_documents(options: dict[str, Any]) -> None:
    module, x, marks = mixer(options), inputs().detach(), gists((2, 3), (4, 6))
    marks[0, 6] = True
    whole = run(module, x, document_ids=documents(), gist=marks)
    for sample, (first, last) in ((0, (0, 4)), (0, (4, 8)), (1, (0, 7)), (1, (7, 9))):
        part = slice(first, last), slice(sample, sample + 1)
        alone = run(module, x[part], gist=marks[sample : sample + 1, first:last])
        assert (whole[part] - alone).abs().max() < 1e-6


@causal_options
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [6, 1, 2]], ids=str)
def test_equality_decode_with_gists_is_forward(options: dict[str, Any], chunks: list[int]) -> None:
    module, x, marks = mixer(options), inputs().detach(), gists((3, 5), (6, 7))
    found = decode(module, x, chunks, lambda a, b: Context(torch.arange(a, b), gist=marks[:, :b]))
    assert (found - run(module, x, gist=marks)).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{}, {"sink": "learned"}, NO_TURN | {"relative_positions": 3}], ids=str)
def test_equality_cached_gists_are_the_masked_prompt(options: dict[str, Any]) -> None:
    module, x, marks = mixer(options), inputs().detach(), gists((3, 5), (3, 5))
    with torch.no_grad():
        _, prompt = module(
            x[:5], Context(torch.arange(5), gist=marks[:, :5]), module.init_state(2, 12, x.device, x.dtype)
        )
        kept = module.init_state(2, 12, x.device, x.dtype)
        for name in ("key", "value"):
            kept[name][:, :, 3:5] = prompt[name][:, :, 3:5]
        kept["present"][:, 3:5] = True
        found, _ = module(x[5:], Context(torch.arange(5, 9), gist=marks), kept)
    assert (found - run(module, x, gist=marks)[5:]).abs().max() < 1e-10


class _Forgetful(AttentionConfig):
    """A mixer that knows neither gist tokens nor gaps."""

    keeps_gaps = False
    masks_gists = False


def language(**changes: Any) -> LanguageModel:
    token = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
    values = {"vocab_size": 24, "dim": DIM, "num_layers": 2, "context_length": 12, "gist_token_id": 23}
    block = {"token": token, "channel": {"type": "mlp", "hidden_dim": 24}}
    model = build_config(LanguageConfig, values | {"block_pattern": [block]} | changes).build()
    initialise(model, 0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [6, 1, 1, 4]], ids=str)
def test_equality_language_model_decodes_gists_as_in_one_pass(chunks: list[int]) -> None:
    tokens = torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, 4:6] = tokens[1, 7] = 23
    model, plain = language(), language(gist_token_id=None)
    whole, state, parts = model(tokens), model.init_state(3, 12), []
    for chunk in tokens.split(chunks, 1):
        logits, state = model.decode(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    without = plain(tokens)
    torch.testing.assert_close(whole[2], without[2], rtol=1e-4, atol=1e-5)
    assert (whole[0, 6:] - without[0, 6:]).abs().amax(-1).min() > 1e-4


def test_gist_tokens_the_model_cannot_have() -> None:
    with pytest.raises(ConfigError, match="gist_token_id 24 is no row of vocab_size 24"):
        language(gist_token_id=24)
    block = {"token": _Forgetful(num_heads=4), "channel": {"type": "mlp", "hidden_dim": 24}}
    with pytest.raises(ConfigError, match=r"gist_token_id 23: block_pattern.0.token of type 'attention' carries"):
        language(block_pattern=[block])


# --- positions per sample, with gaps and fillers


PLACES = torch.tensor([[0, 2, 3, 7, 8, 0], [1, 4, 5, 6, 0, 0]]).t()  # [length, batch]
PRESENT = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()


@all_options
@pytest.mark.parametrize("packed", [False, True])
def test_equality_gaps_are_tokens_left_out(options: dict[str, Any], packed: bool) -> None:
    """The rows that are present, as if the sample had no others: fillers at the end or in between."""
    module, x = mixer(options), inputs(6).detach()
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]) if packed else None
    for order in (torch.arange(6), torch.tensor([0, 5, 1, 2, 3, 4]), torch.tensor([5, 0, 1, 2, 3, 4])):
        present = PRESENT[:, order]
        mixed = {"present": present, "document_ids": None if ids is None else ids[:, order]}
        if packed and not torch.equal(order, torch.arange(6)):
            continue
        found = run(module, x[order], positions=PLACES[order], **mixed)
        assert found.isfinite().all() and found.transpose(0, 1)[~present].abs().max() == 0
        for sample in range(2):
            kept = present[sample].nonzero()[:, 0]
            alone = run(
                module,
                x[order][kept, sample : sample + 1],
                positions=PLACES[order][kept, sample : sample + 1],
                document_ids=None if ids is None else ids[sample : sample + 1, order][:, kept],
            )
            assert (found[kept, sample : sample + 1] - alone).abs().max() < 1e-10


@all_options
def test_fillers_get_and_give_no_gradient(options: dict[str, Any]) -> None:
    module, x = mixer(options), inputs(6)
    present = PRESENT.clone()
    present[1] = False  # a sample without any token
    found = run(module, x, positions=PLACES, present=present)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    assert grad.isfinite().all() and grad.transpose(0, 1)[~present].abs().max() == 0
    assert grad[:5, 0].abs().min() > 0


@causal_options
@pytest.mark.parametrize("given", [{}, {"positions": True}], ids=["shared", "per sample"])
def test_equality_positions_per_sample_without_gaps_are_plain(options: dict[str, Any], given: dict[str, bool]) -> None:
    module, x = mixer(options), inputs()
    positions = torch.arange(LENGTH)[:, None].expand(-1, 2) if given else torch.arange(LENGTH)
    for ids in (None, documents()):
        found = run(module, x, positions=positions, document_ids=ids)
        assert (found - run(module, x, document_ids=ids)).abs().max() < 1e-12


@causal_options
@pytest.mark.parametrize("chunks", [[1] * 6, [3, 3], [4, 1, 1]], ids=str)
def test_equality_decode_with_gaps_and_fillers_is_forward(options: dict[str, Any], chunks: list[int]) -> None:
    module, x = mixer(options), inputs(6).detach()
    for order in (torch.arange(6), torch.tensor([5, 0, 1, 2, 3, 4])):
        places, present = PLACES[order], PRESENT[:, order]
        found = decode(module, x[order], chunks, lambda a, b, p=places, q=present: Context(p[a:b], present=q[:, a:b]))
        wanted = run(module, x[order], positions=places, present=present)
        assert (found - wanted).abs().max() < 1e-10


@torch.no_grad()
@causal_options
def test_equality_layers_that_skip_tokens_decode_as_in_one_pass(options: dict[str, Any]) -> None:
    token = {"type": "attention", "num_heads": 4, "num_kv_heads": 2} | options
    block = {"token": token, "channel": {"type": "mlp", "hidden_dim": 24}}
    model = language(block_pattern=[block], modifiers=[{"type": "mixture_of_depths", "every": 1, "capacity": 0.5}])
    tokens = torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, 4:6] = tokens[1, 7] = 23
    whole, state, parts = model(tokens), model.init_state(3, 12), []
    for chunk in tokens.split([5, 1, 1, 5], 1):
        logits, state = model.decode(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_gists_are_looked_up_by_true_position() -> None:
    module, x = mixer({}), inputs(6).detach()
    marks = torch.zeros(2, LENGTH, dtype=torch.bool)
    marks[:, 3] = True  # sample 0 holds it, sample 1 has left it out: its prompt is gone all the same
    found = run(module, x, positions=PLACES, present=PRESENT, gist=marks)
    changed = x.clone()
    changed[0] += 1.0
    after = run(module, changed, positions=PLACES, present=PRESENT, gist=marks)
    assert torch.equal(found[3:], after[3:]) and torch.equal(found[1:, 1], after[1:, 1])
    assert not torch.allclose(found[2, 0], after[2, 0])
