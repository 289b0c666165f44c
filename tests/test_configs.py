"""Every file in configs/ loads, and a run's cost is the built model's real parameter count."""

from pathlib import Path

import pytest
import torch

from lightbulb.config import load_config, read_yaml
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.evaluation.proof import ProofConfig
from lightbulb.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_costs_what_it_builds(path):
    if "model" not in read_yaml(path):
        load_config(CorpusConfig, path)
        return
    config = load_config(ProofConfig if "variants" in read_yaml(path) else RunConfig, path)
    with torch.device("meta"):
        model = config.model.build()
    assert config.model.cost().params == sum(p.numel() for p in model.parameters())
    assert 0 < config.model.cost().active_params <= config.model.cost().params
