"""Retention against its formula in float64, and its promises: causal, decode equals forward, documents apart."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.retention import Retention, RetentionConfig
from lightbulb.nn.parameter import Init, initialise
from lightbulb.nn.rope import rotary_angles

DIM = 16


def mixer(dtype: torch.dtype = torch.float64, **changes: object) -> Retention:
    config = RetentionConfig.model_validate({"num_heads": 4, "chunk_size": 4} | changes)
    module = config.build(DIM, 64, Init(0.3, 0.3))
    initialise(module, 0)
    return module.to(dtype)


def hidden(length: int, batch: int = 2) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(length, batch, DIM, dtype=torch.float64, requires_grad=True)


def run(module: Retention, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


def naive(module: Retention, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """The paper's parallel form, the rotation as complex numbers, the decay as powers."""
    config, (length, batch, _) = module.config, x.shape
    query, key, value = (
        (x @ layer.weight.t()).view(length, batch, config.num_heads, -1).permute(1, 2, 0, 3)
        for layer in (module.query, module.key, module.value)
    )
    cos, sin = rotary_angles(torch.arange(length), module.width, config.rope_theta)
    turn = torch.complex(cos, sin)[:, 0, 0].to(torch.complex128)
    query, key = (torch.complex(*t.chunk(2, -1)) * turn for t in (query, key))
    scores = (query @ key.conj().transpose(2, 3)).real / module.width**0.5
    gap = torch.arange(length)[:, None] - torch.arange(length)
    gamma = 1 - 2.0 ** (-5 - torch.arange(config.num_heads, dtype=torch.float64))
    decay = torch.where(gap >= 0, gamma[:, None, None] ** gap.clamp(min=0), 0.0)
    if ids is not None:
        decay = decay * (ids[:, :, None] == ids[:, None])[:, None]
    mixed = (scores * decay) @ value
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return (silu(x @ module.gate.weight.t()) * mixed.permute(2, 0, 1, 3).flatten(2)) @ module.output.weight.t()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"value_factor": 1}, {"key_dim": 6}, {"num_heads": 1, "chunk_size": 64}], ids=str
)
@pytest.mark.parametrize("length", [1, 4, 11])
def test_equality_mixer_is_the_papers_parallel_form(
    length: int, changes: dict[str, object], with_documents: bool
) -> None:
    module, x = mixer(**changes), hidden(length)
    ids = torch.stack([torch.arange(length) // 3, (torch.arange(length) >= 5).long()]) if with_documents else None
    found, wanted = run(module, x, ids), naive(module, x, ids)
    assert torch.allclose(found, wanted, atol=1e-10)
    parameters = [x, *module.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((y**2).sum(), parameters) for y in (found, wanted)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_equality_any_chunk_size(chunk_size: int) -> None:
    x = hidden(13)
    assert torch.allclose(run(mixer(chunk_size=chunk_size), x), run(mixer(), x), atol=1e-12)


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [6, 1, 4], [11], [3, 1, 1, 6]], ids=str)
def test_equality_decode_is_forward(cuts: Sequence[int]) -> None:
    module, x = mixer(), hidden(11, batch=3)
    state, parts, start = module.init_state(3, 12, x.device, x.dtype), [], 0
    with torch.no_grad():
        for piece in x.split(list(cuts)):
            part, state = module(piece, Context(torch.arange(start, start + len(piece))), state)
            parts.append(part)
            start += len(piece)
        assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


def test_decode_state_does_not_grow_and_is_wide() -> None:
    module = mixer(torch.bfloat16)
    state = module.init_state(3, 10_000, torch.device("cpu"), torch.bfloat16)
    assert state["memory"].shape == (3, 4, 4, 8) and state["memory"].dtype == torch.float32
    x = torch.randn(1, 3, DIM, dtype=torch.bfloat16)
    with torch.no_grad():
        after = module(x, Context(torch.arange(1)), state)[1]
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in state.items()}
    assert after["memory"].dtype == torch.float32


def chosen(x: Tensor, kept: list[list[int]]) -> tuple[Tensor, Context]:
    """Some tokens of each sample with their true positions, filled up with tokens that are not there."""
    longest = max(map(len, kept))
    index = torch.tensor([row + [0] * (longest - len(row)) for row in kept])
    present = torch.tensor([[i < len(row) for i in range(longest)] for row in kept])
    rows = x.gather(0, index.t()[..., None].expand(-1, -1, DIM))
    return rows, Context(index.t(), present=present)


def test_equality_gaps_decay_by_true_positions_and_fillers_are_not_there() -> None:
    """Tokens left out are tokens whose keys are zero."""
    module, x, kept = mixer(), hidden(12), [[1, 2, 6, 7, 11], [0, 5, 9]]
    rows, context = chosen(x, kept)
    found = module(rows, context)[0]
    for sample, positions in enumerate(kept):
        alone, past = x[:, sample : sample + 1], module.init_state(1, 12, x.device, x.dtype)
        wanted = []
        for position in range(12):  # decoding, with a state that only kept tokens may write to
            result, after = module(alone[position : position + 1], Context(torch.tensor([position])), past)
            if position in positions:
                wanted.append(result)
                past = after
        assert torch.allclose(found[: len(positions), sample : sample + 1], torch.cat(wanted), atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_equality_decode_with_gaps_is_forward_with_gaps(cut: int) -> None:
    module, x = mixer(), hidden(12)
    rows, context = chosen(x, [[1, 2, 6, 7, 11], [0, 5, 9]])
    state = module.init_state(2, 12, x.device, x.dtype)
    with torch.no_grad():
        whole, parts = module(rows, context)[0], []
        for start in range(0, 5, cut):
            span = slice(start, start + cut)
            here = Context(context.positions[span], present=context.present[:, span])
            part, state = module(rows[span], here, state)
            parts.append(part)
    there = context.present.t()
    assert torch.allclose(torch.cat(parts)[there], whole[there], atol=1e-12)


def test_equality_documents_are_separate_runs() -> None:
    """Retention sees differences of positions only, so that a document may stand anywhere."""
    module, x = mixer(), hidden(11)
    found = run(module, x, (torch.arange(11) >= 5).long().expand(2, -1))
    wanted = torch.cat([run(module, part) for part in x.split([5, 6])])
    assert torch.allclose(found, wanted, atol=1e-6)  # angles are float32


def test_the_future_changes_nothing() -> None:
    module, x = mixer(), hidden(11)
    changed = x.detach().clone()
    changed[6:] += 1.0
    before, after = run(module, x), run(module, changed)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_equality_recompute_changes_nothing() -> None:
    module, x = mixer(), hidden(11)
    plain = run(module, x)
    again = module(x, Context(torch.arange(11), recompute="selective"))[0]
    assert torch.equal(plain, again)
    grads = [torch.autograd.grad(y.sum(), [x, *module.parameters()]) for y in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_is_close() -> None:
    exact, lower, x = mixer(), mixer(torch.bfloat16), hidden(50).detach().bfloat16()
    found, wanted = run(lower, x), run(exact, x.double())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 3e-2 * wanted.norm()


@pytest.mark.parametrize("changes", [{}, {"value_factor": 1}, {"key_dim": 6}], ids=str)
def test_cost_counts_the_parameters(changes: dict[str, object]) -> None:
    module = mixer(**changes)
    assert module.config.cost(DIM, 64).params == sum(p.numel() for p in module.parameters())


def test_flops_are_linear_in_the_length() -> None:
    config = RetentionConfig(num_heads=4)
    assert config.cost(DIM, 8192).forward_flops == config.cost(DIM, 512).forward_flops


@pytest.mark.parametrize(
    ("values", "said"), [({"num_heads": 4, "key_dim": 5}, "key_dim 5 is odd"), ({"num_heads": 0}, "num_heads")]
)
def test_configs_that_cannot_be(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config(RetentionConfig, values)


def test_layouts_that_cannot_be() -> None:
    config = RetentionConfig(num_heads=6)
    with pytest.raises(ValueError, match="num_heads 6 cannot be split over parallel.tensor 4"):
        config.check_tensor_parallel(4)
    with pytest.raises(ValueError, match="parallel.tensor 2 x parallel.ulysses 2"):
        config.check_ulysses(2, 2)
    with pytest.raises(ValueError, match="dim 20 does not divide into num_heads 6"):
        config.build(20, 16, Init(0.1, 0.1))
