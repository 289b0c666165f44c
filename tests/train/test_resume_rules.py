"""Which settings may change between a checkpoint and the run that goes on from it."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from lightbulb.config import build_config
from lightbulb.train.checkpoint import CheckpointError
from lightbulb.train.config import RunConfig
from lightbulb.train.resume import RULES, Rule, check_resumable, rule_of

CONFIG: dict[str, Any] = {
    "run": "runs/a",
    "model": {
        "vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32,
        "block_pattern": [{
            "token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 32},
        }],
    },
    "data": {"path": "data/a"},
    "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
}  # fmt: skip


STEP = 3


def said(stored: dict[str, Any], **changes: Any) -> list[str]:
    loader = {"samples_consumed": build_config(RunConfig, stored).batch_sizes().samples(STEP)}
    state = SimpleNamespace(config=stored, step=STEP, is_untrained=False, loader=loader)
    checkpoint: Any = SimpleNamespace(folder="step-3", state=state)
    return check_resumable(checkpoint, build_config(RunConfig, CONFIG | changes))


def stored(**changes: Any) -> dict[str, Any]:
    return build_config(RunConfig, CONFIG | changes).model_dump(mode="json")


def test_every_rule_names_a_setting_and_every_section_has_one() -> None:
    fields: Any = RunConfig.model_fields
    for key in RULES:
        section, _, rest = key.partition(".")
        assert section in fields
        annotation = fields[section].annotation
        sections = [kind for kind in get_args(annotation) or (annotation,) if hasattr(kind, "model_fields")]
        assert not rest or any(rest in kind.model_fields for kind in sections)
    assert {key.partition(".")[0] for key in RULES} == fields.keys()


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("model.block_pattern.0.channel.num_experts", Rule.FIXED),
        ("train.global_batch_size", Rule.FIXED),
        ("train.micro_batch_size", Rule.FREE),
        ("train.steps", Rule.SAID),
        ("optimizer.beta2", Rule.SAID),
        ("parallel.tensor", Rule.FREE),
        ("outer.every", Rule.FIXED),
        ("outer.wait_seconds", Rule.FREE),
        ("not.known.yet", Rule.SAID),
    ],
)
def test_the_longest_name_counts(key: str, rule: Rule) -> None:
    assert rule_of(key) is rule


def test_what_does_not_matter_is_not_said() -> None:
    train = CONFIG["train"] | {"micro_batch_size": 4, "save_every": 7, "async_save": False, "precision": "auto"}
    assert said(stored(), train=train, parallel={"tensor": 2}, run="elsewhere", prompts=["a"]) == []


def test_what_matters_is_said_with_both_values() -> None:
    changes = said(stored(), optimizer={"lr": 0.5}, data={"path": "data/b"})
    assert changes == ["data.path was data/a, is now data/b", "optimizer.lr was 0.0003, is now 0.5"]


def test_all_forbidden_changes_are_named_at_once() -> None:
    model = CONFIG["model"] | {"dim": 64, "vocab_size": 1024}
    with pytest.raises(
        CheckpointError, match=r"trained with model\.dim = 32, .* 64; .*vocab_size = 512.* 1024; seed = "
    ):
        said(stored(), model=model, seed=7)


def test_a_setting_that_came_later_counts_as_its_default() -> None:
    old = stored()
    del old["train"]["async_save"], old["model"]["norm_eps"], old["optimizer"]
    assert said(old) == []
    assert said({"model": {"unknown": 1}} | {k: v for k, v in old.items() if k == "train"} | stored()) == []


def test_batches_that_were_read_cannot_be_changed() -> None:
    late = {"train": CONFIG["train"] | {"batch_stages": [{"start": 5, "global_batch_size": 16}]}}
    assert said(stored(), **late) == [
        "train.batch_stages.0.global_batch_size was None, is now 16",
        "train.batch_stages.0.start was None, is now 5",
    ]
    early = {"train": CONFIG["train"] | {"batch_stages": [{"start": 2, "global_batch_size": 16}]}}
    with pytest.raises(CheckpointError, match=r"24 contexts were read up to step 3, .*batch_stages it would be 32"):
        said(stored(), **early)
    with pytest.raises(CheckpointError, match=r"32 contexts were read up to step 3, .* it would be 24"):
        said(stored(**early))
