"""`train.kernels` and LIGHTBULB_KERNELS: which counts, and what is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Command
from training_runs import losses

from lightbulb import ops
from lightbulb.config import ConfigError
from lightbulb.launcher import prove
from lightbulb.train.agreement import facts_of, refusal
from lightbulb.train.config import TrainConfig
from lightbulb.train.kernels import use_kernels


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    yield
    ops.choose("auto")


def test_the_environment_counts_more_than_the_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_kernels("reference") == ops.chosen() == "reference"
    assert use_kernels("auto") == "auto"
    monkeypatch.setenv(ops.VARIABLE, "reference")
    assert use_kernels("auto") == "reference"
    monkeypatch.setenv(ops.VARIABLE, "auto")
    assert use_kernels("reference") == "auto"
    monkeypatch.setenv(ops.VARIABLE, "")
    assert use_kernels("reference") == "reference"


def test_what_is_no_choice_is_refused_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ops.VARIABLE, "fast")
    said = "LIGHTBULB_KERNELS is 'fast'; set it to one of auto, reference, or unset it"
    with pytest.raises(ConfigError, match=said):
        use_kernels("auto")
    assert prove.main(["configs/debug/proof.yaml", "--ranks", "1"]) == 1
    assert said in capsys.readouterr().err


def test_ranks_with_other_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1)
    facts = [facts_of(config, tmp_path)]
    monkeypatch.setenv(ops.VARIABLE, "reference")
    facts.append(facts_of(config, tmp_path))
    said = refusal(facts)
    assert "environment LIGHTBULB_KERNELS: not set on rank 0; reference on rank 1" in said
    assert said.count("\n") == 1
    assert facts[0]["C++ kernels"] == ("built" if ops.is_built() else "not built")


@pytest.mark.slow
def test_runs_honour_it(
    start: Callable[..., Command], run_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = start("pretrain", [str(run_file("refused"))], LIGHTBULB_KERNELS="fast")
    assert refused.wait() == 1
    assert "LIGHTBULB_KERNELS is 'fast'" in refused.text() and "Traceback" not in refused.text()
    assert not (tmp_path / "refused").exists()

    for kernels in ("auto", "reference"):
        command = start("pretrain", [str(run_file(kernels)), f"train.kernels={kernels}"])
        assert command.wait() == 0, command.text()
    ours, twins = losses(tmp_path / "auto"), losses(tmp_path / "reference")
    assert ours != twins, "both computed with the same"
    assert all(abs(ours[step] - twins[step]) < 1e-4 for step in twins)
