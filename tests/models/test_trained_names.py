"""What is trained, and the FLOPs that the rest does not cost."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.models.trainable import Trainable, freeze, train_flops, trained_names
from lightbulb.nn.parameter import initialise
from lightbulb.train.kernels import use_kernels

MODEL: dict[str, Any] = {
    "vocab_size": 64, "dim": 16, "num_layers": 3, "context_length": 8, "modifiers": [],
    "block_pattern": [
        {"token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 24}},
        {
            "token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 16, "shared_hidden_dim": 8},
        },
        {
            "token": {"type": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": 8},
            "channel": {"type": "mlp", "hidden_dim": 24},
        },
    ],
}  # fmt: skip
LORA = {"type": "lora", "rank": 2}


def model_with(**changes: Any) -> LanguageConfig:
    return build_config(LanguageConfig, MODEL | changes)


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Products that torch's counter sees."""
    use_kernels("reference")
    yield
    use_kernels("auto")


def test_groups_of_parameters() -> None:
    config = model_with()
    routers = trained_names(config, "routers")
    assert routers == {"blocks.1.channel.router.weight", "blocks.2.token.router.weight"}
    both = trained_names(config, "routers+experts")
    assert routers < both and "blocks.2.token.key.weight" not in both
    experts = {name for name in both if name.startswith("blocks.1.channel.experts.")}
    assert experts and {name.split(".")[1:3] == ["2", "token"] for name in both - routers - experts} == {True}
    assert trained_names(config, ["norm.*", "head"]) == {"norm.weight", "head"}
    everything = {name for name, _ in config.build().named_parameters()}
    assert trained_names(config, "all") == everything


def test_updates_are_all_that_is_trained_unless_patterns_say_more() -> None:
    config = model_with(modifiers=[LORA])
    assert all(".adapter." in name for name in trained_names(config, "all"))
    more = trained_names(config, ["*.adapter.*", "*.router.*"])
    assert more == trained_names(config, "all") | trained_names(config, "routers")


@pytest.mark.parametrize(
    ("changes", "trainable", "message"),
    [
        ({}, ["blocks.*.chanel.*"], "'blocks.*.chanel.*' names no parameter"),
        ({}, ["haed"], "did you mean 'head'"),
        ({"block_pattern": MODEL["block_pattern"][:1]}, "routers", "the model has no router"),
        (
            {"dim": 64, "modifiers": [LORA | {"quantize": "nf4", "match": "blocks.0.token.query"}]},
            ["blocks.0.token.query.weight"],
            "kept in four bits",
        ),
    ],
)
def test_what_cannot_be_trained(changes: dict[str, Any], trainable: Trainable, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        trained_names(model_with(**changes), trainable)
    assert message in str(caught.value)


def counted(config: LanguageConfig, trainable: Trainable) -> float:
    """FLOPs per token of one forward and backward, as torch counts products."""
    model = config.build()
    initialise(model, 3)
    freeze(model, trained_names(config, trainable))
    tokens = torch.randint(0, config.vocab_size, (2, config.context_length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    return counter.get_total_flops() / tokens.numel()


CHOICES: list[Trainable] = ["routers", "routers+experts", ["blocks.2.*"], ["norm.*", "head"], ["embedding.*"]]
LEARNED: dict[str, Any] = {"learned_positions": True, "norm": "layer"}
VARIANTS: dict[str, Any] = {
    "plain": {}, "tied": {"tie_embeddings": True}, "lora": {"modifiers": [LORA]}, "learned": LEARNED
}  # fmt: skip


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("trainable", CHOICES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_that_are_left_out_are_not_computed(variant: str, trainable: Trainable) -> None:
    config = model_with(**VARIANTS[variant])
    if trainable == ["embedding.*"] and config.learned_positions:
        trainable = ["positions.*"]
    if trainable == ["norm.*", "head"] and config.tie_embeddings:
        trainable = ["norm.*"]
    everything = [name for name, _ in config.build().named_parameters()]
    assert train_flops(config, trained_names(config, everything)) == pytest.approx(config.cost().train_flops)
    saved = train_flops(config, frozenset(everything)) - train_flops(config, trained_names(config, trainable))
    spared = counted(config, everything) - counted(config, trainable)
    if isinstance(trainable, list):
        assert saved == pytest.approx(spared, rel=0.01)
    else:  # the first router is behind its layer's attention, which counts all the same
        assert 0 < spared - saved < 2 * config.layer_costs()[1].forward_flops
