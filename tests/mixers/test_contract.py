"""The contract of every part, over every model that configs/debug/parts proves, and over random compositions of them.

What holds exactly: outside training every model is causal, decodes as it computes whole sequences, and keeps packed
documents apart. In training, a mixture of depths chooses with the whole sequence in view. LORY's ``own_mean`` rule
lets the first segment of a document see itself whole, and nothing else.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightbulb.config import ConfigError, build_config
from lightbulb.evaluation.proof import load_variants
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.modifiers.packed import pack
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise, logical_of, set_values, values_of
from lightbulb.registry import names

FOLDER = Path(__file__).parents[2] / "configs/debug/parts"
BATCH = 2


def configs() -> Iterator[tuple[str, LanguageConfig]]:
    for path in sorted(FOLDER.glob("*.yaml")):
        for variant, run in load_variants(str(path)).items():
            yield f"{path.stem}-{variant}" if variant else path.stem, run.model


MODELS = dict(configs())


def compositions(count: int) -> Iterator[tuple[str, LanguageConfig]]:
    """Three blocks and two modifiers, picked from the models above by a seed."""
    blocks = [block for model in MODELS.values() for _, block in model.written_blocks()]
    tokens = {str(block.token): block.token for block in blocks}
    channels = {str(block.channel): block.channel for block in blocks if block.channel is not None}
    modifiers = {m.type: m for model in MODELS.values() for m in model.modifiers}
    for seed in range(count):
        draw = random.Random(seed)
        while True:
            pattern = [
                {"token": draw.choice(list(tokens.values())), "channel": draw.choice(list(channels.values()))}
                for _ in range(3)
            ]
            values = {
                "vocab_size": 128,
                "dim": 64,
                "num_layers": 6,
                "context_length": 32,
                "block_pattern": pattern,
                "modifiers": draw.sample(list(modifiers.values()), 2),
            }
            try:
                config = build_config(LanguageConfig, values)
            except ConfigError as error:  # a mixture of depths over a part that needs every token
                assert "needs every token" in str(error), error
                continue
            name = "+".join([*(b.token.type + "/" + b.channel.type for b in config.block_pattern if b.channel)])
            yield f"{seed}-{name}-{'-'.join(m.type for m in config.modifiers)}", config
            break


COMPOSED = dict(compositions(16))
ALL = MODELS | COMPOSED
every_model = pytest.mark.parametrize("name", ALL)


@cache
def built(name: str) -> LanguageModel:
    return fresh(name).double().eval()


def fresh(name: str) -> LanguageModel:
    model = ALL[name].build()
    initialise(model, 5)
    wake(model)
    return model


def wake(model: nn.Module) -> None:
    """Give what starts as zero (adapters) something to do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def ids(model: LanguageModel, seed: int = 0) -> Tensor:
    shape = BATCH, model.context_length
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def own_mean_segment(config: LanguageConfig) -> int:
    """Tokens of a first segment that may see itself whole; 0 when the model is strictly causal."""
    channels = [block.channel for _, block in config.written_blocks()]
    return max([c.segment_length for c in channels if getattr(c, "first_segment", "") == "own_mean"], default=0)


def test_contract_every_registered_part_is_in_a_model() -> None:
    blocks = [block for model in MODELS.values() for _, block in model.written_blocks()]
    inner = [getattr(block.channel, "expert", None) for block in blocks]
    channels = [channel for channel in [*(block.channel for block in blocks), *inner] if channel is not None]
    assert {block.token.type for block in blocks} == set(names("token_mixer"))
    assert {channel.type for channel in channels} == set(names("channel_mixer"))
    assert {m.type for model in MODELS.values() for m in model.modifiers} == set(names("modifier"))


@every_model
def test_contract_shapes_and_gradients(name: str) -> None:
    model = fresh(name).train()
    tokens = ids(model)
    noise = Noise(1, torch.arange(BATCH), model.context_length)
    losses = model(tokens, tokens.roll(-1, 1), None, noise)
    assert losses.shape == tokens.shape and losses.isfinite().all()
    losses.sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@every_model
def test_contract_the_future_changes_nothing(name: str) -> None:
    model = built(name)
    tokens, length = ids(model), model.context_length
    with torch.no_grad():
        whole = model(tokens)
        for start in {max(length // 3, own_mean_segment(model.config)), length - 3, length - 1}:
            changed = tokens.clone()
            changed[:, start:] = (changed[:, start:] + 7) % model.config.vocab_size
            found = model(changed)
            assert torch.allclose(found[:, :start], whole[:, :start], atol=1e-9), start
            assert not torch.allclose(found[:, start:], whole[:, start:], atol=1e-4)


@every_model
def test_contract_decode_is_forward(name: str) -> None:
    model = built(name)
    if own_mean_segment(model.config):
        pytest.skip("the first segment sees itself whole: its own test says what decoding does")
    tokens, length = ids(model), model.context_length
    with torch.no_grad():
        whole = model(tokens)
        for chunks in ([1] * length, [length // 2 + 1, 1, 1, length - length // 2 - 3]):
            state, parts = model.init_state(BATCH, length), []
            for chunk in tokens.split(chunks, dim=1):
                logits, state = model.decode(chunk, state)
                parts.append(logits)
            assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5), chunks


@every_model
def test_contract_documents_do_not_leak(name: str) -> None:
    model = built(name)
    tokens, length = ids(model), model.context_length
    cut = length // 2 - 1
    documents = (torch.arange(length) >= cut).long().expand(BATCH, -1)
    labels = ids(model, seed=1)
    with torch.no_grad():
        whole = model(tokens, labels, documents)
        for part in (slice(0, cut), slice(cut, length)):
            changed = tokens.clone()
            changed[:, part] = (changed[:, part] + 7) % model.config.vocab_size
            found = model(changed, labels, documents)
            same = torch.ones(length, dtype=torch.bool)
            same[part] = False
            assert torch.allclose(found[:, same], whole[:, same], atol=1e-9)
            assert not torch.allclose(found[:, ~same], whole[:, ~same], atol=1e-4)


@every_model
def test_contract_cost_is_what_is_built(name: str) -> None:
    with torch.device("meta"):
        model = ALL[name].build()
    cost = ALL[name].cost()
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < cost.active_params <= cost.params and cost.forward_flops > 0


@every_model
def test_contract_bfloat16_is_close(name: str) -> None:
    single, half = fresh(name).eval(), fresh(name).eval()
    for parameter in half.parameters():
        if not logical_of(parameter).keep_fp32:
            parameter.data = parameter.data.bfloat16()
    tokens = ids(single)
    with torch.no_grad():
        found, wanted = (model(tokens, tokens.roll(-1, 1)).mean() for model in (half, single))
    assert abs(found - wanted) < 0.03 * wanted


@every_model
def test_contract_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, other = fresh(name), ALL[name].build().eval()
    values = {key: values_of(parameter).detach().contiguous() for key, parameter in model.named_parameters()}
    buffers = {key: buffer for key, buffer in model.named_buffers() if key in model.state_dict()}
    save_file(values | buffers, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    for key, parameter in other.named_parameters():
        set_values(parameter, loaded[key])
    for key in buffers:
        other.get_buffer(key).copy_(loaded[key])
    tokens = ids(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), other(tokens))


def sizes(state: Any) -> int:
    return sum(map(sizes, state.values())) if isinstance(state, dict) else getattr(state, "numel", lambda: 0)()


@pytest.mark.parametrize("name", MODELS)
def test_contract_the_state_has_the_size_its_facts_promise(name: str) -> None:
    config = MODELS[name]
    for block in built(name).blocks.values():
        grows = sizes(block.init_state(1, 64, torch.device("cpu"), torch.float32)) > sizes(
            block.init_state(1, 32, torch.device("cpu"), torch.float32)
        )
        mixer = block.token.config
        assert grows == ("per token" in mixer.facts.state), mixer.type
    assert config.num_layers == len(built(name).blocks)


@pytest.mark.parametrize("name", [name for name in ALL if any(m.type == "bitlinear" for m in ALL[name].modifiers)])
def test_contract_packed_for_inference_it_is_the_same(name: str) -> None:
    model = fresh(name).double().eval().requires_grad_(False)
    tokens = ids(model)
    wanted, whole = model(tokens), sum(parameter.nbytes for parameter in model.parameters())
    packs = any(m.weights != "full" for m in model.config.modifiers if m.type == "bitlinear")
    assert bool(pack(model)) == packs
    assert torch.allclose(model(tokens), wanted, atol=1e-5)
    assert (sum(parameter.nbytes for parameter in model.parameters()) < whole) == packs
