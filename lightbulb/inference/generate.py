"""Text from a model, whatever its mixers: sampling as a stream of tokens, and beam search.

A model is asked for two things only, ``init_state`` and ``decode``; its state is a set of tensors whose first
dimension is the batch, so attention caches, retention matrices and Mamba states are treated alike.

Top-k: "Hierarchical Neural Story Generation", 2018 (https://arxiv.org/abs/1805.04833). Top-p: "The Curious Case of
Neural Text Degeneration", 2019 (https://arxiv.org/abs/1904.09751). Beam search divides a hypothesis' log-probability
by ``length ** length_penalty``: the length normalisation of "Google's Neural Machine Translation System", 2016
(https://arxiv.org/abs/1609.08144) without its offset of 5 and its coverage term.

Shapes: B batch (sequences or beams), T tokens, V vocabulary.
"""

import codecs
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lightbulb.config import Config, build_config
from lightbulb.mixers.base import ModelState

logger = logging.getLogger(__name__)


class GenerationError(ValueError):
    """A prompt or a model that no text can be drawn from; the message names the cause and the fix."""


class Decoder(Protocol):
    """What decoding needs of a language model."""

    context_length: int

    def init_state(self, batch_size: int, max_length: int) -> ModelState:
        """An empty state for sequences of up to ``max_length`` tokens."""

    def decode(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """``tokens [B, T]`` that continue the state, to ``logits [B, T, V]`` and the state that includes them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights; tokens are placed on their device."""


class SamplingConfig(Config):
    """How the next token is chosen."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Logits are divided by it; 0 picks the most likely token."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of most likely tokens whose probabilities add up to this."""
    num_beams: int = Field(1, ge=1)
    """Above 1, beam search: no sampling, the most likely whole texts."""
    max_new_tokens: int = Field(128, ge=1)
    """Stop after this many tokens."""
    length_penalty: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Beam search ranks by log-probability / length ** length_penalty; 0 ranks by log-probability."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Two runs with one seed draw the same tokens."""

    @model_validator(mode="after")
    def _beams_do_not_sample(self) -> "SamplingConfig":
        idle = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) != _default(name)]
        if self.num_beams > 1 and idle:
            raise ValueError(
                f"num_beams={self.num_beams} does not sample, so {', '.join(idle)} would have no effect; "
                f"leave {', '.join(idle)} out or set num_beams to 1"
            )
        return self


def _default(name: str) -> float:
    return SamplingConfig.model_fields[name].default


class TextStream:
    """Bytes in, whole characters out: holds back a multi-byte UTF-8 character until its last byte has come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: bytes) -> str:
        """The text completed by these bytes; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """U+FFFD if the stream ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def filter_scores(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """``scores [B, V]`` with the tokens outside top-k, then outside top-p, set to ``-inf``.

    At least one token stays in each row; equal scores are kept in order of token id.
    """
    if not (0 < top_k < scores.shape[-1] or top_p < 1):
        return scores
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    if top_p < 1:
        probabilities = ranked.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        ranked.masked_fill_(mass_before >= top_p, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ranked)


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of ``logits [B, V]``: temperature, then top-k, then top-p, then a draw; ``[B]`` int64.

    The draw happens on the generator's device, so a CPU generator gives the same tokens for any model device.

    Raises:
        ConfigError: a setting is out of range.
        GenerationError: the logits are not finite.
    """
    build_config(SamplingConfig, {"temperature": temperature, "top_k": top_k, "top_p": top_p}, "sampling")
    _check_finite(logits)
    if temperature == 0:
        return logits.argmax(-1)
    # float64 and a maximum of 0 keep a temperature near zero from overflowing
    scores = logits.to(generator.device if generator is not None else logits.device, torch.float64)
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    probabilities = filter_scores(scores, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1).to(logits.device)


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    sampling: SamplingConfig,
    eos_id: int | None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Stream the tokens that continue a prompt, without the end token.

    Ends at ``eos_id``, after ``max_new_tokens``, or, with a warning, where the model's context is full. Without a
    generator the draws follow ``sampling.seed``.

    Raises:
        GenerationError: the prompt is empty or leaves no room in the context, or ``num_beams`` asks for beam search.
    """
    if sampling.num_beams > 1:
        raise GenerationError(f"num_beams={sampling.num_beams}: call beam_search, or set it to 1 to sample")
    limit = _token_limit(model, prompt_ids, sampling.max_new_tokens)
    if generator is None:
        generator = torch.Generator().manual_seed(sampling.seed)
    return _stream(model, prompt_ids, sampling, eos_id, generator, limit)


@torch.no_grad()
def _stream(
    model: Decoder,
    prompt_ids: Sequence[int],
    sampling: SamplingConfig,
    eos_id: int | None,
    generator: torch.Generator,
    limit: int,
) -> Iterator[int]:
    logits, state = _prefill(model, prompt_ids, limit)
    for produced in range(1, limit + 1):
        token = sample_next(logits, sampling.temperature, sampling.top_k, sampling.top_p, generator)
        if token.item() == eos_id:
            return
        yield int(token.item())
        if produced < limit:
            logits, state = _step(model, token, state)
    _warn_if_full(model, limit, sampling.max_new_tokens)


@torch.no_grad()
def beam_search(
    model: Decoder,
    prompt_ids: Sequence[int],
    num_beams: int,
    max_new_tokens: int,
    eos_id: int | None,
    length_penalty: float = 1.0,
) -> list[tuple[list[int], float]]:
    """The ``num_beams`` best continuations found, best first, as (token ids without the end token, score).

    A score is the log-probability divided by ``length ** length_penalty``, the end token counted in both. A
    continuation that ends among the best ``num_beams`` candidates of its step moves to the finished ones and another
    open one takes its place; the search stops when ``num_beams`` are finished and the best open one, scored at its
    present length, is no better than the worst of them (exact for ``length_penalty`` 0, customary above). One beam is
    greedy decoding. Equal scores are ordered by beam, then by token id, so the result is deterministic.

    Raises:
        ConfigError: a setting is out of range.
        GenerationError: the prompt is empty or leaves no room in the context, or the logits are not finite.
    """
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    build_config(SamplingConfig, settings, "beam search")
    limit = _token_limit(model, prompt_ids, max_new_tokens)
    logits, state = _prefill(model, prompt_ids, limit)
    finished: list[tuple[list[int], float]] = []
    beams: list[list[int]] = [[]]
    totals = torch.zeros(1, dtype=torch.float64, device=logits.device)
    for length in range(1, limit + 1):
        candidates = _best_candidates(totals, logits, 2 * num_beams)
        norm = length**length_penalty
        ended = [(beams[row], total / norm) for row, token, total in candidates[:num_beams] if token == eos_id]
        finished = _best(finished + ended, num_beams)
        kept = [candidate for candidate in candidates if candidate[1] != eos_id][:num_beams]
        beams = [[*beams[row], token] for row, token, _ in kept]
        open_beams = [(ids, total / norm) for ids, (_, _, total) in zip(beams, kept, strict=True)]
        full = len(finished) == num_beams
        if not kept or (full and open_beams[0][1] <= finished[-1][1]):
            break
        if length == limit:
            _warn_if_full(model, limit, max_new_tokens)
            break
        rows, tokens, scores = zip(*kept, strict=True)
        state = reorder_state(state, torch.tensor(rows, device=logits.device))
        logits, state = _step(model, torch.tensor(tokens, device=logits.device), state)
        totals = torch.tensor(scores, dtype=torch.float64, device=logits.device)
    return _best(finished + open_beams, num_beams)


def reorder_state(state: ModelState, rows: Tensor) -> ModelState:
    """The state whose sequence i is the old sequence ``rows[i]``; rows may repeat or be left out."""

    def pick(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: pick(inner) for name, inner in part.items()}
        return part.index_select(0, rows) if isinstance(part, Tensor) else part

    return pick(state)


def _best_candidates(totals: Tensor, logits: Tensor, count: int) -> list[tuple[int, int, float]]:
    """The best (beam, token, log-probability) continuations, impossible ones left out, ties by beam, then token."""
    _check_finite(logits)
    scores = (totals[:, None] + logits.double().log_softmax(-1)).flatten()
    worst = scores.topk(min(count, len(scores))).values[-1]
    # topk breaks ties as it likes; a stable sort of everything that could be in it does not
    indices = ((scores >= worst) & (scores > -torch.inf)).nonzero().squeeze(1)
    indices = indices[scores[indices].sort(descending=True, stable=True).indices][:count]
    vocab_size = logits.shape[-1]
    return [
        (index // vocab_size, index % vocab_size, score)
        for index, score in zip(indices.tolist(), scores[indices].tolist(), strict=True)
    ]


def _best(hypotheses: list[tuple[list[int], float]], count: int) -> list[tuple[list[int], float]]:
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis[1])[:count]


def _token_limit(model: Decoder, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    """How many new tokens fit in the context, at most ``max_new_tokens``."""
    if not prompt_ids:
        raise GenerationError("prompt_ids is empty; start from the end-of-text token, [eos_id]")
    room = model.context_length - len(prompt_ids)
    if room < 1:
        raise GenerationError(
            f"the prompt has {len(prompt_ids)} tokens but the model's context_length is {model.context_length}; "
            f"shorten the prompt to at most {model.context_length - 1} tokens"
        )
    return min(max_new_tokens, room)


def _prefill(model: Decoder, prompt_ids: Sequence[int], limit: int) -> tuple[Tensor, ModelState]:
    device = next(iter(model.parameters())).device
    state = model.init_state(1, len(prompt_ids) + limit)
    logits, state = model.decode(torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device), state)
    return logits[:, -1], state


def _step(model: Decoder, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    logits, state = model.decode(tokens[:, None], state)
    return logits[:, -1], state


def _check_finite(logits: Tensor) -> None:
    # the maximum is nan or inf if any logit is, and -inf if no token is possible
    if not logits.amax(-1).isfinite().all():
        raise GenerationError("the model's logits are not finite; its weights are damaged, load an earlier checkpoint")


def _warn_if_full(model: Decoder, limit: int, max_new_tokens: int) -> None:
    if limit < max_new_tokens:
        logger.warning(
            "stopped after %d of %d new tokens: the model's context_length of %d is full",
            limit,
            max_new_tokens,
            model.context_length,
        )
