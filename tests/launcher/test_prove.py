"""`lightbulb prove` from the command line, with two ranks."""

import json
from pathlib import Path

import pytest

from lightbulb.evaluation import proof
from lightbulb.launcher import prove

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/debug/moe.yaml")
SMALL = ["model.num_layers=2", "train.global_batch_size=4"]


def run(output: Path, *argv: str) -> int:
    return prove.main([CONFIG, *SMALL, "--ranks", "2", "--steps", "2", "--output", str(output), *argv])


def test_two_ranks_agree_and_the_certificate_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "proof") == 0
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert line["ok"] is True and line["layouts"] == 7 and line["skipped"] == 0
    assert (
        0 < line["worst_grad_rel_diff"] < 1e-4 and line["worst_loss_diff"] < 1e-5 and line["worst_weight_diff"] < 1e-5
    )
    assert line["seconds"] > 0
    certificate = json.loads(Path(line["certificates"][CONFIG]).read_text())
    assert [entry["layout"] for entry in certificate["compared"]][-1] == "TP2xPP1xEP1xDP1 sequence"
    assert certificate["variants"][""]["reference"][0]["clip_coefficient"] < 1.0
    assert "| TP1xPP2xEP1xDP1 " in (tmp_path / "proof" / "certificate.md").read_text()
    assert "TP1xPP1xEP2xDP2 plain-optimizer micro-batch" in printed.err  # progress


def test_a_broken_bound_names_layout_place_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(proof.BOUNDS, "gradient", 1e-12)
    assert run(tmp_path, "--steps", "1", "--ranks", "1") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["failed"] == [f"{CONFIG}: TP1xPP1xEP1xDP1 micro-batch 1"]
    assert "error: TP1xPP1xEP1xDP1 micro-batch 1: gradient: " in printed.err
    assert " at step 1 is " in printed.err and "where 1e-12 is allowed" in printed.err


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "model.dimm=3") == 1
    assert "unknown key 'dimm'" in capsys.readouterr().err
    assert prove.main([str(tmp_path / "none.yaml")]) == 1
    assert "no such config file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "proof") == 1
    assert "a file stands where a folder is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--ranks", "0")


def test_several_run_files_give_one_closing_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(CONFIG).read_text().replace("num_experts: 8", "num_experts: 4"))
    assert prove.main([CONFIG, str(other), *SMALL, "--ranks", "1", "--output", str(tmp_path / "proofs")]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["ok"] is True and line["layouts"] == 2 and line["configs"] == {CONFIG: 1, str(other): 1}
    worst = []
    for path in (CONFIG, str(other)):
        certificate = json.loads(Path(line["certificates"][path]).read_text())
        assert certificate["layouts"] == 1
        worst.append(certificate["worst_grad_rel_diff"])
    assert line["worst_grad_rel_diff"] == max(worst)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_ranks_prove_every_choice_of_degrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/debug/proof.yaml")
    assert prove.main([config, "--ranks", "8", "--output", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["layouts"] == 77 and line["skipped"] == 0
    assert line["worst_loss_diff"] <= 1e-5
    assert line["worst_grad_rel_diff"] <= 1e-4 and line["worst_moment_rel_diff"] <= 1e-4
