"""Every file in configs/ loads, and a run's cost is the built model's real parameter count."""

from pathlib import Path

import pytest
import torch

from lightbulb.config import load_config, read_yaml
from lightbulb.data.config import MixtureConfig
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.evaluation.proof import ProofConfig
from lightbulb.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_costs_what_it_builds(path):
    if path.parent.name == "mixes":
        load_config(MixtureConfig, path)
        return
    if "model" not in read_yaml(path):
        load_config(CorpusConfig, path)
        return
    config = load_config(ProofConfig if "variants" in read_yaml(path) else RunConfig, path)
    with torch.device("meta"):
        model = config.model.build()
    assert config.model.cost().params == sum(p.numel() for p in model.parameters())
    assert 0 < config.model.cost().active_params <= config.model.cost().params


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("voltron-13b", 13.0, None),
        ("deepseek-moe-16b", 16.4, 2.8),
        ("jetmoe-8b", 8.5, 2.3),
        ("lory-0.3b-8e", 1.8, None),
        ("mamba2-1.3b", 1.34, 1.34),
    ],
)
def test_published_sizes(name, billions, active):
    cost = load_config(RunConfig, CONFIGS[0].parents[1] / f"pretrain/{name}.yaml").model.cost()
    assert cost.params == pytest.approx(billions * 1e9, rel=0.02)
    if active is not None:
        assert cost.active_params == pytest.approx(active * 1e9, rel=0.08)  # papers count embeddings or do not
