"""The mixture of attention heads against attention with fixed heads, and its promises: causal, decode, documents."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import Attention, AttentionConfig
from lightbulb.mixers.token.moa import MoA, MoAConfig
from lightbulb.nn.parameter import Init, initialise

DIM, WIDTH, LENGTH, BATCH = 12, 6, 9, 2
PLAIN = {"balance_loss": 0.0, "z_loss": 0.0}
JETMOE = {"num_kv_heads": 2}
ORIGINAL = {"num_kv_heads": 1, "router": PLAIN | {"normalizer_gradient": False}}
FORMS = pytest.mark.parametrize("form", [JETMOE, JETMOE | {"qk_norm": True}, ORIGINAL], ids=str)


def mixer(dtype: torch.dtype = torch.float64, **changes: Any) -> MoA:
    values = {"num_experts": 4, "num_kv_heads": 2, "head_dim": WIDTH, "router": PLAIN} | changes
    module = build_config(MoAConfig, values).build(DIM, 64, Init(0.4, 0.4))
    initialise(module, 0)
    return module.to(dtype)


def attention(moa: MoA, experts: list[int], scale: float = 1.0) -> Attention:
    """Attention whose query heads are those of ``experts``, each result times ``scale``."""
    config, kv_heads = moa.config, moa.config.num_kv_heads
    heads = len(experts) * kv_heads
    values = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": WIDTH, "qk_norm": config.qk_norm}
    module = AttentionConfig.model_validate(values).build(DIM, 64, Init(0.4, 0.4)).double()
    with torch.no_grad():
        # Key/value head h serves head h of every expert, and attention wants its query heads side by side.
        query = moa.query.weight[experts].view(len(experts), kv_heads, WIDTH, DIM)
        module.query.weight.copy_(query.transpose(0, 1).flatten(0, 2))
        output = moa.output.weight[experts].view(len(experts), DIM, kv_heads, WIDTH)
        module.output.weight.copy_(scale * output.permute(1, 2, 0, 3).flatten(1))
        for name in ("key", "value"):
            getattr(module, name).weight.copy_(getattr(moa, name).weight)
        if config.qk_norm:
            module.query_norm.weight.copy_(moa.query_norm.weight)
            module.key_norm.weight.copy_(moa.key_norm.weight)
    return module


def draw(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randn(length, batch, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(module: MoA | Attention, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return module(x, Context(torch.arange(len(x)), ids))[0]


def documents() -> Tensor:
    positions = torch.arange(LENGTH)
    return torch.stack([positions // 3, (positions >= 5).long()])


def naive(module: MoA, x: Tensor) -> Tensor:
    """Every expert attends everywhere; each token then takes those it chose."""
    config = module.config
    logits = x @ module.router.weight.t()
    chosen = logits.topk(config.router.top_k, dim=-1).indices
    if config.router.normalizer_gradient:
        gates = logits.gather(-1, chosen).softmax(-1)
    else:
        gates = logits.softmax(-1).gather(-1, chosen)
        gates = gates / gates.sum(-1, keepdim=True).detach()
    weights = torch.zeros_like(logits).scatter(-1, chosen, gates)
    results = [weights[..., e, None] * run(view(module, e), x) for e in range(config.num_experts)]
    return torch.stack(results).sum(0)


def view(module: MoA, expert: int) -> Any:
    """Attention by one expert as a function of the mixer's own parameters, so that gradients reach them."""
    twin = attention(module, [expert])
    own = {"query.weight": module.query.weight[expert], "output.weight": module.output.weight[expert]}
    own |= {n: p for n, p in module.named_parameters() if n.split(".")[0] in ("key", "value", "query_norm", "key_norm")}
    return lambda *args: torch.func.functional_call(twin, own, args)


@FORMS
@pytest.mark.parametrize("top_k", [2, 3])
def test_equality_values_and_gradients_with_every_expert_everywhere(form: dict[str, Any], top_k: int) -> None:
    module = mixer(**form | {"router": form.get("router", PLAIN) | {"top_k": top_k}})
    x = draw().requires_grad_()
    parameters = [x, *module.parameters()]
    found, wanted = run(module, x), naive(module, x)
    assert torch.allclose(found, wanted, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad((found**2).sum(), parameters),
        torch.autograd.grad((wanted**2).sum(), parameters),
        strict=True,
    ):
        assert theirs.any() and torch.allclose(ours, theirs, atol=1e-9)


@FORMS
def test_equality_one_expert_is_attention(form: dict[str, Any]) -> None:
    module = mixer(**form | {"num_experts": 1, "router": {"top_k": 1, "normalize_gates": False}})
    assert torch.allclose(run(module, draw()), run(attention(module, [0]), draw()), atol=1e-10)


@FORMS
@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_equality_identical_experts_are_attention(form: dict[str, Any], top_k: int) -> None:
    module = mixer(**form | {"router": form.get("router", PLAIN) | {"top_k": top_k}})
    with torch.no_grad():
        for weight in (module.query.weight, module.output.weight):
            weight.copy_(weight[:1].expand_as(weight))
    assert torch.allclose(run(module, draw()), run(attention(module, [0]), draw()), atol=1e-10)


@FORMS
def test_equality_all_experts_with_even_gates_are_grouped_query_attention(form: dict[str, Any]) -> None:
    module = mixer(**form | {"router": form.get("router", PLAIN) | {"top_k": 4}})
    with torch.no_grad():
        module.router.weight.zero_()
    assert torch.allclose(run(module, draw()), run(attention(module, [0, 1, 2, 3], 0.25), draw()), atol=1e-10)


@FORMS
def test_equality_names_of_experts_do_not_matter(form: dict[str, Any]) -> None:
    module, renamed = mixer(**form), mixer(**form)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for part in (renamed.router, renamed.query, renamed.output):
            part.weight.copy_(part.weight[order])
    assert torch.allclose(run(renamed, draw()), run(module, draw()), atol=1e-12)


@FORMS
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [6, 1, 2], [9]], ids=str)
def test_equality_decode_is_forward(form: dict[str, Any], chunks: list[int]) -> None:
    module, x = mixer(**form), draw(9, 3)
    state, parts, start = module.init_state(3, 12, x.device, x.dtype), [], 0
    assert state["key"].shape == (3, module.config.num_kv_heads, 12, WIDTH)  # however many experts attend
    with torch.no_grad():
        for chunk in x.split(chunks):
            part, state = module(chunk, Context(torch.arange(start, start + len(chunk))), state)
            parts.append(part)
            start += len(chunk)
        assert torch.allclose(torch.cat(parts), run(module, x), atol=1e-12)


@FORMS
def test_equality_recompute_changes_nothing(form: dict[str, Any]) -> None:
    module, results = mixer(**form), []
    for mode in ("none", "selective"):
        module.zero_grad()
        y, _ = module(draw(), Context(torch.arange(LENGTH), documents(), recompute=mode))
        (y**2).sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FORMS
def test_equality_documents_are_as_if_alone(form: dict[str, Any]) -> None:
    module, x, ids = mixer(**form), draw(), documents()
    whole = run(module, x, ids)
    for sample in range(BATCH):
        for document in ids[sample].unique():
            rows = (ids[sample] == document).nonzero().flatten()
            alone, _ = module(x[rows, sample : sample + 1], Context(rows))  # rotary positions go on
            assert torch.allclose(whole[rows, sample], alone[:, 0], atol=1e-10)


def chosen() -> tuple[Tensor, Tensor]:
    """Positions ``[5, 2]`` that the samples keep, and ``[2, 5]``: which of them are no fillers."""
    positions = torch.tensor([[0, 1], [2, 2], [3, 6], [7, 8], [8, 0]])
    return positions, torch.tensor([[True] * 5, [True] * 4 + [False]])


@FORMS
def test_equality_tokens_with_gaps_are_as_if_alone(form: dict[str, Any]) -> None:
    module, x, (positions, present) = mixer(**form), draw(5), chosen()
    found, _ = module(x, Context(positions, present=present))
    for sample in range(BATCH):
        kept = present[sample]
        alone, _ = module(x[kept, sample : sample + 1], Context(positions[kept, sample]))
        assert torch.allclose(found[kept, sample], alone[:, 0], atol=1e-10)


@FORMS
def test_equality_decode_with_gaps_is_forward(form: dict[str, Any]) -> None:
    module, x, (positions, present) = mixer(**form), draw(5), chosen()
    state, parts = module.init_state(2, 12, x.device, x.dtype), []
    with torch.no_grad():
        for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
            y, state = module(x[part], Context(positions[part], present=present[:, part]), state)
            parts.append(y)
        wanted, _ = module(x, Context(positions, present=present))
    kept = present.t()
    assert torch.allclose(torch.cat(parts)[kept], wanted[kept], atol=1e-12)


@FORMS
def test_prompts_are_seen_through_their_gists_only(form: dict[str, Any]) -> None:
    module, x, gist = mixer(**form), draw(), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    assert torch.allclose(module(x, Context(torch.arange(LENGTH), gist=gist))[0], run(module, x), atol=1e-12)
    gist[:, 4] = True
    changed = x.clone()
    changed[:4] += 1.0
    before, after = (module(x, Context(torch.arange(LENGTH), gist=gist))[0] for x in (x, changed))
    assert torch.allclose(before[5:], after[5:], atol=1e-12) and not torch.allclose(before[4], after[4], atol=1e-4)


@FORMS
def test_the_future_changes_nothing(form: dict[str, Any]) -> None:
    module, x = mixer(**form), draw()
    changed = x.clone()
    changed[6:] += 1.0
    before, after = run(module, x), run(module, changed)
    assert torch.allclose(before[:6], after[:6], atol=1e-12)
    assert not torch.allclose(before[6:], after[6:])


@FORMS
def test_the_router_and_every_expert_learn(form: dict[str, Any]) -> None:
    module = mixer(**form)
    (run(module, draw(40)) ** 2).sum().backward()
    assert module.router.weight.grad.norm() > 1e-3
    for part in (module.query, module.output):
        assert part.weight.grad.flatten(1).norm(dim=1).min() > 1e-3


def test_auxiliary_losses_reach_the_router_and_statistics_are_counted() -> None:
    module = mixer(router={"balance_loss": 0.3, "z_loss": 0.2})
    module.router.set_load(torch.tensor([5.0, 1.0, 1.0, 3.0]))
    (run(module, draw()) * 0.0).sum().backward()
    assert module.router.weight.grad.norm() > 1e-3
    assert module.router.statistics.take(torch.device("cpu"))[:4].sum() == 2 * LENGTH * BATCH
    assert module.config.routers() == {"router": 4}


def test_what_is_not_finite_does_not_reach_other_samples() -> None:
    module, x = mixer().eval(), draw()
    broken = x.clone()
    broken[4, 1] = float("nan")
    clean, found = run(module, x), run(module, broken)
    assert torch.allclose(found[:, 0], clean[:, 0], atol=1e-12) and found[4:, 1].isnan().all()


@FORMS
def test_bfloat16_is_close_to_float32_when_both_route_alike(form: dict[str, Any]) -> None:
    half, single, x = mixer(torch.bfloat16, **form), mixer(torch.float32, **form), draw(40).bfloat16()
    half.router.float()
    with torch.no_grad():
        for ours, theirs in zip(single.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    found, wanted = run(half, x), run(single, x.float())
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.02 * wanted.norm()
    (found.float() ** 2).sum().backward()
    (wanted**2).sum().backward()
    for ours, theirs in zip(half.parameters(), single.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.03 * theirs.grad.norm()


@FORMS
def test_cost_counts_the_parameters(form: dict[str, Any]) -> None:
    module = mixer(**form)
    cost = module.config.cost(DIM, 64)
    assert cost.params == sum(p.numel() for p in module.parameters())
    unused = 2 * module.query.weight[0].numel() * 2  # query and output of the two experts a token did not choose
    assert cost.active_params == cost.params - unused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"router": {"top_k": 5}}, "router.top_k 5 exceeds num_experts 4"),
        ({"router": {"top_k": 1}}, "gives every gate the value 1"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mixer(**changes)


def test_splits_that_cannot_work_are_refused() -> None:
    config = mixer().config
    config.check_tensor_parallel(2)
    config.check_ulysses(1, 2)
    with pytest.raises(ValueError, match="num_kv_heads 2 cannot be split over parallel.tensor 4"):
        config.check_tensor_parallel(4)
    with pytest.raises(ValueError, match="choose a multiple of 4"):
        config.check_ulysses(2, 2)
