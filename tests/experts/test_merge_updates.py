"""Low-rank updates added to the weights of a run."""

from pathlib import Path

import torch
from dense_runs import MODEL, make_run, tensor

from lightbulb.config import build_config, load_config, read_yaml, save_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.merge_updates import merge_updates
from lightbulb.train.config import RunConfig

TOKENIZER = Tokenizer.train(["some words of which none stands in the text"], 270)


def test_a_run_that_began_warm_and_had_sisters_is_merged_into_one_by_itself(tmp_path: Path) -> None:
    updates = {"type": "lora", "rank": 2, "alpha": 4.0}
    model = MODEL | {"vocab_size": TOKENIZER.vocab_size, "modifiers": [updates]}
    run = make_run(tmp_path / "run", model, seed=1, drift=0.1)
    TOKENIZER.save(run / "tokenizer.json")
    outer = {"every": 2, "folder": str(tmp_path / "exchange"), "branch": 0, "branches": 2}
    values = read_yaml(run / "config.yaml") | {"outer": outer, "start_from": "seed", "start_from_moments": True}
    save_config(build_config(RunConfig, values), run / "config.yaml")

    receipt = merge_updates(run, tmp_path / "merged")
    assert receipt.comparison is not None and receipt.comparison.greatest_difference < 1e-4
    config = load_config(RunConfig, tmp_path / "merged" / "config.yaml")
    assert (config.outer, config.start_from, config.model.modifiers) == (None, None, [])
    name = "blocks.0.token.query"
    weight, a, b = (tensor(run, f"{name}.{part}") for part in ("weight", "adapter.a", "adapter.b"))
    torch.testing.assert_close(tensor(tmp_path / "merged", f"{name}.weight"), weight + 2 * b @ a)
