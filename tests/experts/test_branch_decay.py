"""`lightbulb branch-decay`: a fork is the run it was forked from, until its learning rate falls."""

import json
from pathlib import Path

import pytest
import yaml
from training_runs import final_hashes, losses, write_run_file

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts.decays import Decays, decay_config
from lightbulb.experts.jobs import is_complete
from lightbulb.launcher import branch_decay, pretrain, verify
from lightbulb.train.config import RunConfig
from lightbulb.train.fork import ForkPoint
from lightbulb.train.manifest import read_state, step_folder
from lightbulb.train.origin import parent_of, read_origin
from lightbulb.train.schedule import decay_start, warmup_end

STABLE, DECAY = 8, 4
STEPS = STABLE + DECAY
TRAIN = {
    "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32", "save_every": 4,
    "keep_checkpoints": 9, "eval_every": 4, "eval_contexts": 8,
}  # fmt: skip
MIXED = {"weights": {"sums": 3, "words": 1}}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two domains."""
    root = tmp_path_factory.mktemp("domains")
    for domain, sign in (("sums", "plus"), ("words", "beside")):
        (root / domain).mkdir()
        for number in range(12):
            lines = [f"{number} {sign} {i} is {number * (i if sign == 'plus' else 3)}." for i in range(40)]
            (root / domain / f"{domain}-{number:02d}.txt").write_text("\n".join(lines))
    preprocess(build_config(CorpusConfig, {
        "output": str(root / "data"),
        "context_length": 32,
        "held_out_fraction": 0.1,
        "sources": [{"type": "text", "domain": name, "path": str(root / name)} for name in ("sums", "words")],
        "tokenizer": {"vocab_size": 400},
        "executor": {"workers": 1},
    }))  # fmt: skip
    return root / "data"


def write(folder: Path, corpus: Path, name: str, **changes) -> Path:
    settings = {
        "data": {"path": str(corpus), "mixture": MIXED}, "train": TRAIN,
        "schedule": {"warmup": 2 / STEPS, "decay": DECAY / STEPS, "shape": "one_minus_sqrt"},
    }  # fmt: skip
    return write_run_file(folder, corpus, name, **(settings | changes))


@pytest.fixture(scope="module")
def trunk(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole warmup-stable-decay run with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trunk")
    train(write(folder, domains, "trunk"))
    return folder / "trunk"


def train(path: Path) -> None:
    """As the command does, on one process."""
    assert pretrain.pretrain(load_config(RunConfig, path)) == 0


def prepare(trunk: Path, *arguments: str) -> int:
    return branch_decay.main([str(trunk), *arguments, "--prepare-only"])


def test_equality_of_a_fork_and_the_uninterrupted_run(trunk: Path, tmp_path: Path, capsys) -> None:
    """The same mixture and schedule: the same losses, weights, moments, tokens and ledger, bit for bit."""
    out = tmp_path / "decays"
    assert prepare(trunk, "--at", str(STABLE), "--steps", str(DECAY), "--out", str(out)) == 0
    fork = out / "same"
    assert f"lightbulb pretrain {fork / 'config.yaml'}" in capsys.readouterr().out
    before = losses(fork)
    assert before == {step: loss for step, loss in losses(trunk).items() if step <= STABLE}
    train(fork / "config.yaml")
    assert losses(fork) == losses(trunk)
    assert final_hashes(fork, STEPS) == final_hashes(trunk, STEPS)
    of_fork, of_trunk = (read_state(step_folder(run, STEPS)) for run in (fork, trunk))
    assert of_fork.tokens == of_trunk.tokens and of_fork.loader == of_trunk.loader
    assert verify.main([str(fork), "--data"]) == 0, capsys.readouterr()
    assert final_hashes(trunk, STABLE) == final_hashes(fork, STABLE)


def test_forks_share_the_step_and_differ_after_it(trunk: Path, tmp_path: Path, domains: Path, capsys) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("weights: {words: 1}")
    asked = [
        "--at", str(STABLE), "--steps", str(DECAY), "--shape", "linear", "--out", str(tmp_path / "decays"),
        "--mix", "same", str(words), "schedule.final=0.1",
    ]  # fmt: skip
    assert prepare(trunk, *asked) == 0
    forks = [tmp_path / "decays" / name for name in ("same", "words")]
    point = step_folder(trunk, STABLE)
    for fork in forks:
        for file in point.iterdir():
            assert (step_folder(fork, STABLE) / file.name).samefile(file), "no space is taken"
        origin, config = read_origin(fork), load_config(RunConfig, fork / "config.yaml")
        assert origin is not None and origin.kind == "decay" and origin.parents == [parent_of(point)]
        assert config.schedule.shape == "linear" and config.schedule.final == 0.1
        assert warmup_end(config.schedule, config.train.steps) == 2
        assert decay_start(config.schedule, config.train.steps) == STABLE
        train(fork / "config.yaml")
        assert is_complete(fork / "config.yaml")
    found = [losses(fork) for fork in forks]
    assert all(found[0][step] == found[1][step] for step in range(1, STABLE + 1))
    assert all(found[0][step] != found[1][step] for step in range(STABLE + 1, STEPS + 1))
    drawn = [read_state(step_folder(fork, STEPS)).domain_tokens for fork in forks]
    at_fork = read_state(point).domain_tokens
    assert drawn[1]["sums"] == at_fork["sums"] and drawn[0]["sums"] > at_fork["sums"]
    assert verify.main([str(forks[1]), "--data"]) == 0, capsys.readouterr()

    capsys.readouterr()
    assert branch_decay.main([str(trunk), *asked]) == 0, capsys.readouterr()  # all complete: it compares only
    shown = capsys.readouterr()
    assert "complete already" in shown.err and "words" in shown.out and "trunk at step 8" in shown.out
    compared = json.loads((tmp_path / "decays" / "comparison.json").read_text())
    bits = {row["name"]: row["bpb"] for row in compared["decays"]}
    for fork in forks:
        assert bits[fork.name] == json.loads((fork / "summary.json").read_text())["held_out_bpb"]
    assert [row["bpb"] for row in compared["decays"]] == sorted(bits.values())
    assert compared["trunk"]["step"] == STABLE and compared["trunk"]["bpb"] > 0
    assert (tmp_path / "decays" / "decays.png").stat().st_size > 10_000

    assert prepare(trunk, *asked, "schedule.final=0.2") == 1
    assert "holds a decay with another schedule; say another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "12"], "step 12 is in the decay, which begins after step 8 of 12; stable checkpoints here: 4, 8"),
        (["--at", "6"], "has no checkpoint of step 6; stable checkpoints here: 4, 8"),
        (["--mix", "same", "same"], "same is there twice"),
        (["--mix", "missing.yaml"], "missing.yaml: no such config file"),
        (["--shape", "exponential"], "exponential never reaches final 0"),
        (["--at", "4", "--fraction", "0.01"], "--fraction: 0.01 of a run of 4 stable steps is no step"),
    ],
)
def test_what_cannot_be_forked_is_said(trunk: Path, tmp_path: Path, capsys, arguments: list[str], words: str) -> None:
    assert prepare(trunk, "--out", str(tmp_path / "out"), *arguments) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_of_the_warmup_is_refused(trunk: Path, tmp_path: Path, capsys) -> None:
    """As of a run with a longer warmup."""
    state = json.loads((step_folder(trunk, 4) / "state.json").read_text())
    state["config"]["schedule"] |= {"warmup": 0.5}
    config = build_config(RunConfig, state["config"])
    point = ForkPoint(step_folder(trunk, 4), read_state(step_folder(trunk, 4)), config)
    assert point.unstable == "step 4 is in the warmup, which lasts to step 6"


def test_a_decay_begins_by_itself_and_meets_nobody(trunk: Path, tmp_path: Path) -> None:
    """Of a run that took weights and moments from another one; of one that has sister branches."""
    state = read_state(step_folder(trunk, STABLE))
    began = build_config(RunConfig, state.config | {"start_from": "runs/seed", "start_from_moments": True})
    config = decay_config(ForkPoint(step_folder(trunk, STABLE), state, began), Decays(trunk), "same", tmp_path)
    assert config.start_from is None and not config.start_from_moments
    outer = {"every": 2, "folder": str(tmp_path / "exchange"), "branch": 0, "branches": 2}
    branch = ForkPoint(step_folder(trunk, STABLE), state, build_config(RunConfig, state.config | {"outer": outer}))
    with pytest.raises(ConfigError, match="meets other branches"):
        decay_config(branch, Decays(trunk), "same", tmp_path)


def test_the_newest_stable_step_and_a_tenth_are_the_defaults(trunk: Path, tmp_path: Path) -> None:
    assert prepare(trunk, "--out", str(tmp_path / "out")) == 0
    config = load_config(RunConfig, tmp_path / "out" / "same" / "config.yaml")
    assert config.train.steps == STABLE + 1  # a tenth of the whole
    assert config.schedule.shape == "one_minus_sqrt"


def test_stages_before_the_fork_stay_and_later_ones_go(domains: Path, tmp_path: Path) -> None:
    late = {"weights": {"words": 1}}
    stages = [{"start": 0.25, "mixture": {"temperature": 2}}, {"start": "decay", "mixture": late}]
    path = write(tmp_path, domains, "staged", data={"path": str(domains), "stages": stages})
    train(path)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(late))
    mixes = ["--mix", "same", str(tmp_path / "mix.yaml")]
    assert prepare(tmp_path / "staged", "--at", "8", "--steps", "4", "--out", str(tmp_path / "out"), *mixes) == 0
    same, mix = (load_config(RunConfig, tmp_path / "out" / name / "config.yaml") for name in ("same", "mix"))
    assert [stage.start for stage in same.data.stages] == [3]
    assert [stage.start for stage in mix.data.stages] == [3, 8]
    train(tmp_path / "out" / "mix" / "config.yaml")
    assert losses(tmp_path / "out" / "mix") == losses(tmp_path / "staged")
