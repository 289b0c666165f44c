"""`lightbulb branch`: run files, warnings and errors, branches that train, and what is mixed of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Command
from training_runs import TRAIN, losses, write_run_file

from lightbulb.config import ConfigError, build_config, load_config, read_yaml, save_config
from lightbulb.data.loader import TrainLoader
from lightbulb.experts.branch import Branches
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.receipt import read_receipt
from lightbulb.experts.upcycle_config import load_upcycle_config
from lightbulb.launcher.branch import main
from lightbulb.launcher.pretrain import pretrain
from lightbulb.launcher.upcycle import main as upcycle
from lightbulb.train.checkpoint import CheckpointError
from lightbulb.train.config import RunConfig
from lightbulb.train.origin import read_origin

BLOCK = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "mlp", "hidden_dim": 32}}
DENSE = {"vocab_size": 512, "dim": 16, "num_layers": 2, "context_length": 32, "block_pattern": [BLOCK]}
WORDS = {"sums": "{0} plus {1} is {2} .", "birds": "the {0} wrens saw {1} owls in tree {2} ."}

Make = Callable[..., Branches]


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two unlike kinds of text in one domain, in two clusters."""
    root = tmp_path_factory.mktemp("clustered")
    text = root / "text"
    text.mkdir()
    for kind, words in WORDS.items():
        for number in range(30):
            lines = [words.format(number, i, number + i) for i in range(60)]
            (text / f"{kind}-{number}.txt").write_text("\n".join(lines))
    config = root / "corpus.yaml"
    config.write_text(
        f"output: {root / 'data'}\ncontext_length: 32\nheld_out_fraction: 0.1\nexecutor: {{workers: 1}}\n"
        f"sources:\n  - {{type: text, domain: text, path: {text}}}\ntokenizer: {{vocab_size: 512}}\n"
        "embed: {}\ncluster: {num_clusters: 2}\n"
    )
    command = Command("preprocess", [str(config)], 1, {}, root / "output.log")
    assert command.wait() == 0, command.text()
    return root / "data"


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory, clustered: Path) -> Path:
    """A dense run of six steps whose learning rate is constant to step 4."""
    root = tmp_path_factory.mktemp("seed")
    train = TRAIN | {"steps": 6, "save_every": 2, "eval_every": 0, "keep_checkpoints": 9}
    schedule = {"warmup": 0.0, "decay": 0.34}
    path = write_run_file(root, clustered, "seed", model=DENSE, train=train, schedule=schedule)
    command = Command("pretrain", [str(path)], 1, {}, root / "output.log")
    assert command.wait() == 0, command.text()
    return root / "seed"


@pytest.fixture
def make(tmp_path: Path, seed: Path) -> Make:
    """``make(at_step=2, clusters=[1])``: branches in ``tmp_path/branches``."""

    def branches(**changes: Any) -> Branches:
        values = {"run": str(tmp_path / "branches"), "seed_run": str(seed), "at_step": 4, "train": {"steps": 5}}
        return Branches(build_config(BranchConfig, values | changes))

    return branches


def test_run_files_say_cluster_start_and_schedule(make: Make, seed: Path) -> None:
    branches = make(train={"steps": 5, "save_every": 5}, optimizer={"lr": 0.001})
    branches.prepare()
    for number in (0, 1):
        config = load_config(RunConfig, branches.config.run / f"branch-{number}.yaml")
        assert config.data.mixture is not None and config.data.mixture.weights == {f"*/cluster-0{number}": 1.0}
        assert config.start_from == str(seed / "checkpoints" / "step-00000004") and config.start_from_moments
        assert (config.schedule.warmup, config.schedule.decay) == (0.02, 0.0)
        assert (config.train.steps, config.train.global_batch_size, config.optimizer.lr) == (5, 8, 0.001)
        origin = read_origin(branches.config.run / f"branch-{number}")
        assert origin is not None and origin.kind == "branch" and origin.parents[0].step == 4
        assert origin.detail["groups"] == [f"text/cluster-0{number}"]
    assert sorted(branch.words[0] == "plus" for branch in branches.branches) == [False, True]
    upcycle = load_upcycle_config(branches.config.run / "upcycle.yaml")
    assert [source.tokens for source in upcycle.sources] == [5 * 8 * 32] * 2
    assert upcycle.router_start.kind == "centroid" and upcycle.seed_model == seed


def test_warnings_tell_a_decayed_seed_and_small_clusters(make: Make) -> None:
    assert make(train={"steps": 5}).warnings() == []
    found = make(at_step=6, train={"steps": 5000}, sync={"every": 10}).warnings()
    assert "step 6 is in the decay, which begins after step 4 of 6; branch from its stable phase" in found[0]
    assert "branch 0: 1,280,000 tokens to train on, its text has" in found[1] and "epochs" in found[1]
    assert "save_every" not in "".join(found)  # the seed saves every 2 steps


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"modifiers": [{"type": "lora"}]}, "merge lora into the weights first"),
        ({"block_pattern": [BLOCK | {"channel": {"type": "switch", "num_experts": 2, "hidden_dim": 8}}]}, "layers: no"),
    ],
)
def test_a_seed_whose_branches_cannot_be_mixed_is_told_before(make: Make, seed: Path, tmp_path, model, words) -> None:
    shutil.copytree(seed, tmp_path / "seed")
    values = read_yaml(seed / "config.yaml") | {"model": DENSE | model}
    save_config(build_config(RunConfig, values), tmp_path / "seed" / "config.yaml")
    (found,) = make(seed_run=str(tmp_path / "seed")).warnings()
    assert found.startswith("the branches cannot become a mixture") and words in found


def test_random_branches_read_disjoint_halves_of_the_corpus(make: Make) -> None:
    branches = make(clusters="random", moments="reset").branches
    rows = []
    for branch in branches:
        model, train = branch.config.model, branch.config.train
        loader = TrainLoader(branch.config.data, model.context_length, model.vocab_size, 1, train.global_batch_size, 2)
        half = int(loader.sequence.sizes.sum())
        rows.append(set(loader.row_numbers(0, half).tolist()))
        assert len(rows[-1]) == half and sum(loader.group_epochs.values()) == 0
        loader.close()
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == len(loader.corpus)
    assert not branches[0].config.start_from_moments


def test_a_seed_that_read_a_part_gives_branches_of_whole_clusters(make: Make, seed: Path, tmp_path: Path) -> None:
    shutil.copytree(seed, tmp_path / "seed")
    values = read_yaml(seed / "config.yaml")
    values["data"]["part"] = {"number": 0, "of": 2}
    save_config(build_config(RunConfig, values), tmp_path / "seed" / "config.yaml")
    branches = make(seed_run=str(tmp_path / "seed"))
    assert all(branch.config.data.part is None for branch in branches.branches)
    branches.prepare()
    assert read_yaml(branches.config.run / "upcycle.yaml")["data"]["part"] is None


def test_folders_may_be_those_of_a_home(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    branches = make(run="~/branches")
    assert branches.config.run == tmp_path / "branches" == branches.branches[0].folder.parent


@pytest.mark.parametrize(("clusters", "kind"), [("all", "centroid"), ("random", "random")])
def test_the_next_steps_config_is_run_as_it_is(make: Make, capsys, clusters: str, kind: str) -> None:
    branches = make(clusters=clusters, train={"steps": 2})
    branches.prepare()
    for branch in branches.branches:
        assert pretrain(branch.config) == 0
    config, mixture = branches.config.run / "upcycle.yaml", branches.config.run / "mixture"
    assert upcycle([str(config)]) == 0, capsys.readouterr()
    receipt = read_receipt(mixture / "receipt.json")
    assert receipt is not None and len(receipt.routers) == 2 and read_yaml(config)["router_start"]["kind"] == kind
    assert load_config(RunConfig, mixture / "config.yaml").data.mixture is None
    # The control of learned routers: they are asked to tell parts that do not differ.
    assert upcycle([str(config), "router_start.kind=centroid", f"run={mixture}-2"]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"seed_run": "nowhere"}, ConfigError, "nowhere is not a run folder"),
        ({"at_step": 3}, CheckpointError, r"no checkpoint of step 3; it has steps \[2, 4, 6\]"),
        ({"clusters": [0, 7]}, ConfigError, "7 is none of the corpus's, which are 0, 1"),
        ({"clusters": [1, 1]}, ConfigError, "names one twice"),
        ({"sync": {"every": 2, "local": ["*.chanel.*"]}}, ConfigError, "matches no parameter"),
        ({"sync": {"every": 2}, "jobs": {"hostfiles": ["a"]}}, ConfigError, "1 node groups for 2 branches"),
        ({"train": {"stepz": 3}}, ConfigError, "unknown key 'stepz'"),
    ],
)
def test_bad_settings_are_named(make: Make, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        branches = make(**changes)
        assert branches.branches and branches.jobs


def test_a_corpus_without_clusters_or_of_another_tokenizer_is_refused(make: Make, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="another tokenizer"):
        make(corpus=str(corpus))


def test_branches_train_once_and_are_compared_on_their_clusters(
    make: Make, seed: Path, start: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "branch.yaml"
    values = {"run": str(tmp_path / "branches"), "seed_run": str(seed), "at_step": 4, "train": {"steps": 20}}
    config.write_text(yaml.safe_dump(values | {"sync": {"every": 10}}))
    assert main([str(config), "--prepare-only"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("lightbulb pretrain") == 2
    commands = [start("pretrain", [str(tmp_path / "branches" / f"branch-{number}.yaml")]) for number in (0, 1)]
    for command in commands:
        assert command.wait() == 0, command.text()
    assert main([str(config)]) == 0  # complete: nothing is started
    said = capsys.readouterr()
    assert said.err.count("complete already") == 2 and "lightbulb upcycle" in said.out
    rows = json.loads((tmp_path / "branches" / "summary.json").read_text())["branches"]
    assert all(row["after_bpb"] < row["before_bpb"] for row in rows)
    # moments were kept: the first step is no larger than a warm one
    assert max(losses(tmp_path / "branches" / "branch-0").values()) < losses(seed)[1]

    assert main([str(config), "at_step=2"]) == 1
    assert "was begun from step 4, now 2" in capsys.readouterr().err
    assert main([str(config), "at_step=null"]) == 0  # the seed's newest checkpoint is another one by now
    shutil.rmtree(tmp_path / "branches" / "branch-0" / "checkpoints")


@pytest.mark.slow
def test_the_command_trains_synchronised_branches_and_goes_on(seed: Path, tmp_path: Path) -> None:
    config = tmp_path / "branch.yaml"
    values = {"run": str(tmp_path / "branches"), "seed_run": str(seed), "at_step": 4, "train": {"steps": 12}}
    config.write_text(yaml.safe_dump(values | {"sync": {"every": 4}}))
    assert main([str(config)]) == 0
    summary = (tmp_path / "branches" / "summary.json").read_text()
    shutil.rmtree(tmp_path / "branches" / "branch-1")  # the other branch has the rounds it needs
    assert main([str(config)]) == 0
    assert (tmp_path / "branches" / "summary.json").read_text() == summary
