"""The run file of a run that goes on from another one's weights.

It is a run file in which more may be left out: the model, the optimizer and the prompts are those of ``start_from``
unless it says otherwise, key by key. Two keys are its own: ``lora``, which adds low-rank updates to the model
(:mod:`lightbulb.modifiers.lora`), and ``merge``, which has them added to the weights in the end. What comes out is an
ordinary run.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from lightbulb.config import ConfigError, build_config, load_config, over, read_values
from lightbulb.data.corpus import holds_conversations
from lightbulb.train.config import RunConfig

LORA = "lora"
QUANTIZED = "bitlinear"
WARMUP = 0.03


class Finetuning(NamedTuple):
    """A run, and whether its low-rank updates are added to the weights in the end."""

    run: RunConfig
    merge: bool


def load_finetune_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Finetuning:
    """Read a fine-tuning file.

    Raises:
        ConfigError: naming field, value and fix.
    """
    values = read_values(Path(path), overrides)
    updates, merge = values.pop(LORA, None), values.pop("merge", False)
    if not isinstance(merge, bool):
        raise ConfigError(f"{path}: merge: {merge!r} is neither true nor false")
    start = _start(values.get("start_from"), path)
    train, schedule = values.get("train"), values.get("schedule")
    trainable = train.get("trainable", "all") if isinstance(train, dict) else "all"
    warmup = schedule.get("warmup", WARMUP) if isinstance(schedule, dict) else WARMUP
    defaults = _defaults(start, updates is None and trainable == "all", warmup)
    data = values.get("data")
    if isinstance(data, dict) and holds_conversations(Path(str(data.get("path"))).expanduser()):
        defaults["data"] = {"document_mask": True}  # else a pair would see the pairs before it in its row
    run = build_config(RunConfig, over(defaults, values), str(path))
    if updates is not None:
        run = _with_updates(run, updates, str(path))
    types = {modifier.type for modifier in run.model.modifiers}
    if merge and LORA not in types:
        raise ConfigError(f"{path}: merge: there are no updates to merge; add lora: {{rank: 8}}, or leave merge out")
    if merge and QUANTIZED in types:
        raise ConfigError(
            f"{path}: merge: the model's weights are quantised in every product, which would round updates away; "
            "leave merge out: the updates stay beside the weights"
        )
    _check_tokenizer(run, path)
    return Finetuning(run, merge)


def _start(folder: Any, path: str | Path) -> RunConfig:
    """The config of the run that gives the weights."""
    if not isinstance(folder, str):
        raise ConfigError(f"{path}: start_from: missing; name the folder of the run whose weights are fine-tuned")
    file = Path(folder).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{path}: start_from: {folder} is not a run folder (it has no config.yaml); name one")
    return load_config(RunConfig, file)


def _defaults(start: RunConfig, is_whole: bool, warmup: Any) -> dict[str, Any]:
    """What the file need not say. A whole model goes on with a tenth of its peak learning rate, parts of it and updates
    with all of it; both after a short warmup, for fresh moments are zero, and from its end down to zero."""
    inherited = start.model_dump(mode="json", include={"model", "optimizer", "prompts"})
    lr = start.optimizer.lr * (0.1 if is_whole else 1.0)
    decay = 1 - warmup if isinstance(warmup, int | float) and 0 <= warmup <= 1 else 0.0  # else warmup is the error
    return over(inherited, {"optimizer": {"lr": lr}, "schedule": {"warmup": WARMUP, "decay": decay}})


def _with_updates(run: RunConfig, updates: Any, path: str) -> RunConfig:
    if not isinstance(updates, dict):
        raise ConfigError(f"{path}: lora: {updates!r} is no mapping; write for example lora: {{rank: 8}}")
    if any(modifier.type == LORA for modifier in run.model.modifiers):
        raise ConfigError(
            f"{path}: lora: the model has low-rank updates already; leave lora out to go on with them, or start from a "
            "run in which they are merged"
        )
    values = run.model_dump(mode="json")
    values["model"]["modifiers"].append({"type": LORA} | updates)
    return build_config(RunConfig, values, path)


def _check_tokenizer(run: RunConfig, path: str | Path) -> None:
    """The corpus speaks the model's tokens. What is missing is found, and named, when it is read."""
    theirs = Path(str(run.start_from)).expanduser() / "tokenizer.json"
    ours = run.data.path.expanduser() / "tokenizer.json"
    if theirs.is_file() and ours.is_file() and _digest(theirs) != _digest(ours):
        raise ConfigError(
            f"{path}: data.path: {run.data.path} was written with another tokenizer than {run.start_from}; run "
            f"preprocess with tokenizer.path={theirs}"
        )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
