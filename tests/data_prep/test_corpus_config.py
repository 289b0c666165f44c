"""The corpus config refuses what cannot be built and says why."""

from typing import Any

import pytest

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.data_prep.config import CorpusConfig

GOOD: dict[str, Any] = {"output": "data/x", "sources": [{"type": "pydoc"}]}


def test_debug_corpus_loads_with_overrides() -> None:
    config = load_config(CorpusConfig, "configs/debug/corpus.yaml", ["context_length=64", "sources.1.domain=docs"])
    assert config.context_length == 64
    assert [source.domain for source in config.sources] == ["python", "docs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"type": "pydocs"}]}, r"sources\.0: unknown source 'pydocs', did you mean 'pydoc'\?"),
        ({"sources": [{"type": "pydoc", "domain": "../x"}]}, r"sources\.0\.domain"),
        ({"sources": [{"type": "text"}]}, r"sources\.0\.path: Field required"),
        ({"sources": []}, "sources"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction: .*less than 1 \(got 1\.0\)"),
        ({"context_lenght": 5}, "did you mean 'context_length'"),
        ({"tokenizer": {"vocab_size": 10}}, r"tokenizer\.vocab_size: .*\(got 10\)"),
        ({"output": ".."}, "not a folder name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(CorpusConfig, GOOD | change)
