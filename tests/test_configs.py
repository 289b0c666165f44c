"""Every file in configs/ loads, and a run's cost is the built model's real parameter count."""

from pathlib import Path

import pytest
import torch

from lightbulb.config import load_config, read_values, read_yaml, save_config
from lightbulb.data.config import MixtureConfig
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.evaluation.proof import ProofConfig
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.fuse_config import FuseConfig, is_fuse
from lightbulb.experts.mixture_model import mixture_config
from lightbulb.experts.upcycle_config import load_upcycle_config
from lightbulb.recipes.config import load_recipe
from lightbulb.train.config import RunConfig
from lightbulb.train.finetune import load_finetune_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
EXPERTS = Path(__file__).parent.parent / "configs" / "experts"
FINETUNING = sorted(EXPERTS.glob("finetune-*.yaml"))
FUSING = [path for path in sorted(EXPERTS.glob("*.yaml")) if is_fuse(path)]
UPCYCLING = [p for p in sorted(EXPERTS.glob("*.yaml")) if {"method", "sources"} & set(read_yaml(p)) and p not in FUSING]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_costs_what_it_builds(path):
    if "tasks" in path.parts:  # of lm-eval-harness; tests/evaluation/test_harness.py runs them
        assert read_yaml(path)["task"] == path.stem
        return
    if path in UPCYCLING:
        load_upcycle_config(path)
        return
    if path in FINETUNING:
        return  # below: the model is that of another run
    if path in FUSING:
        load_config(FuseConfig, path)
        return
    if path.parent.name == "mixes":
        load_config(MixtureConfig, path)
        return
    if "seed_run" in read_yaml(path):
        load_config(BranchConfig, path)
        return
    if "budget" in read_yaml(path):
        load_recipe(path)  # its plan: tests/recipes
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


@pytest.mark.parametrize("path", UPCYCLING, ids=lambda path: path.name)
def test_a_mixture_costs_what_it_builds(path):
    dense = (
        EXPERTS.parent / "pretrain/voltron-13b.yaml" if path.stem.startswith("voltron-13b") else EXPERTS / "seed.yaml"
    )
    seed = load_config(RunConfig, dense).model
    mixture = mixture_config(seed, load_upcycle_config(path))
    with torch.device("meta"):
        model = mixture.build()
    assert mixture.cost().params == sum(p.numel() for p in model.parameters()) > seed.cost().params
    assert mixture.cost().active_params < mixture.cost().params


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.name)
def test_fine_tuning_files_load_beside_the_runs_they_start_from(path, tmp_path, monkeypatch):
    quickstart = load_config(RunConfig, EXPERTS.parent / "debug/quickstart.yaml")
    seed = load_config(RunConfig, EXPERTS / "seed.yaml").model
    mixture = mixture_config(seed, load_upcycle_config(EXPERTS / "btx.yaml"))
    runs = {"quickstart": quickstart.model, "seed-btx": mixture, "seed-btx-routers": mixture}
    monkeypatch.chdir(tmp_path)
    for name, model in runs.items():
        Path("runs", name).mkdir(parents=True)
        save_config(quickstart.model_copy(update={"model": model}), Path("runs", name, "config.yaml"))
    run, merge = load_finetune_config(path)
    start = load_config(RunConfig, Path(run.start_from, "config.yaml"))
    assert run.model.model_copy(update={"modifiers": []}).cost().params == start.model.cost().params
    assert merge == any(modifier.type == "lora" for modifier in run.model.modifiers)
    assert run.optimizer.lr <= start.optimizer.lr and run.schedule.warmup <= 0.03


def test_small_examples_go_on_from_each_others_runs_on_one_corpus():
    """From the branches of branch.yaml on. (What starts from the quickstart's run has a corpus of its own.)"""
    branch = load_config(BranchConfig, EXPERTS / "branch.yaml")
    files = {p: read_values(p) for p in [*UPCYCLING, *FUSING, *FINETUNING] if not p.stem.startswith("voltron")}
    runs = {values["run"] for values in files.values()} | {str(branch.folder(number)) for number in range(4)}
    for path, values in files.items():
        if values.get("start_from") == "runs/quickstart":
            continue
        read = {values[key] for key in ("start_from", "student", "seed_model") if key in values}
        read |= {source["path"] for source in values.get("sources", [])}
        assert read and read <= runs | {str(branch.seed_run)}, path
        assert values.get("data", {}).get("path") in (None, str(branch.corpus)), path


def test_the_large_mixture_is_made_of_what_its_recipe_leaves():
    mixture = load_upcycle_config(EXPERTS / "voltron-13b-cbtx.yaml")
    recipe = load_recipe(EXPERTS / "voltron-13b-recipe.yaml")
    folders = [recipe.run / "branches" / f"branch-{number}" for number in range(recipe.corpus.cluster.num_clusters)]
    assert [source.path for source in mixture.sources] == folders
    assert (mixture.seed_model, mixture.data.path) == (recipe.run / "seed", recipe.run / "corpus")
    written = read_values(EXPERTS / "voltron-13b-cbtx.yaml")
    assert {key: written[key] for key in recipe.mix} == recipe.mix


def test_the_cost_of_the_large_mixture_is_the_one_in_its_file():
    path = EXPERTS / "voltron-13b-cbtx.yaml"
    seed = load_config(RunConfig, EXPERTS.parent / "pretrain/voltron-13b.yaml").model
    mixture = mixture_config(seed, load_upcycle_config(path))
    for config in (seed, mixture):
        cost = config.cost()
        numbers = [
            f"{cost.params / 1e9:.2f} B",
            f"{cost.active_params / 1e9:.2f} B",
            f"{cost.forward_flops / 1e9:.1f} G",
        ]
        lines = [line for line in path.read_text().splitlines() if all(number in line for number in numbers)]
        assert len(lines) == 1, numbers
