"""`lightbulb doctor`: everything it shows, as text and as JSON, and what its exit code tells."""

import json
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from training_runs import write_run_file

from lightbulb import ops
from lightbulb.kernels.native import ABSENT
from lightbulb.launcher import doctor
from lightbulb.planning import survey


def test_it_shows_every_package_and_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for part in survey.PARTS:
        assert part.package in text
    assert torch.__version__ in text
    assert "C compiler" in text
    assert "required packages that need attention: none" in text


def test_a_missing_requirement_is_a_problem_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "PARTS", (survey.Part("no-such-package", "no_such_package", "nothing runs"),))
    monkeypatch.setattr(survey, "requirements", lambda: {"no-such-package": Requirement("no-such-package")})
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == ["no-such-package: missing nothing runs"]


def test_a_layout_is_chosen_for_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_run_file(tmp_path, tmp_path))
    assert doctor.main(["--config", path, "--ranks", "4", "--memory", "4", "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert layout["parallel"]["data"] == 4 and layout["fits"]
    assert doctor.main(["--config", path, "--ranks", "4", "--memory", "0.5"]) == 1
    assert "error: layout: even TP" in capsys.readouterr().out
    assert doctor.main(["--config", str(tmp_path / "none.yaml")]) == 1
    assert "no such config file" in capsys.readouterr().out


def test_the_kernels_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv(ops.VARIABLE, "auto")
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    folders = {path.parent.name for path in Path(ops.describe.__file__).parent.glob("*/reference.py")}
    assert found["operations"].keys() == folders, "an operation has no line in kernels/describe.py"
    assert found["machine"]["C++ library"] == ("built" if ops.is_built() else ABSENT)
    assert ("instructions" in found["machine"]) == ops.is_built()
    assert found["machine"]["choice"] == "auto" and found["problem"] is None
    cpu = "C++" if ops.is_built() else "torch"
    assert f"{cpu} on the CPU" in found["operations"]["rms_norm"]

    monkeypatch.setenv(ops.VARIABLE, "reference")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "naive twins, forced" in text and "RMSNorm, also of a residual sum: naive twin" in text


def test_kernels_that_do_not_exist_are_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.VARIABLE, "fast")
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "LIGHTBULB_KERNELS is 'fast'; set it to one of auto, reference, or unset it"
    ]


def test_without_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "auto")
    monkeypatch.setattr(ops.describe, "is_built", lambda: False)
    found = doctor.kernels()
    assert found["machine"]["C++ library"] == ABSENT and "g++" in ABSENT
    assert found["operations"]["swiglu"].endswith("torch on the CPU")


@pytest.mark.slow
def test_the_self_test_trains_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--self-test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["self_test"]
    assert result["passed"] and "one and two ranks differ by" in result["detail"]
