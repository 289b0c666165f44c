"""Held-out scores: those of the trainer, whatever the batch; what does not fit is refused; results are kept."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import MODEL, model_of, text_of

from lightbulb.config import ConfigError, build_config
from lightbulb.data.config import DataError
from lightbulb.data.loader import IGNORED_LABEL
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.held_out import HeldOutText, batch_losses, score, stored_losses, token_losses
from lightbulb.evaluation.results import FILE
from lightbulb.evaluation.runs import EvaluationConfig, Subject, evaluate_run
from lightbulb.launcher import evaluate
from lightbulb.models.language import LanguageConfig
from lightbulb.train.manifest import CheckpointError


def test_equality_with_the_final_evaluation_of_the_run(trained: Path, clustered: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    found = evaluate_run(Subject(trained, EvaluationConfig(batch_size=3)), clustered)
    # the trainer sums a micro-batch of 4 contexts in float32
    assert found["bpb"] == pytest.approx(summary["held_out_bpb"], rel=1e-6)
    assert found["loss"] == pytest.approx(summary["held_out_loss"], rel=1e-6)
    assert found["domain_bpb"] == pytest.approx(summary["domain_bpb"], rel=1e-6)
    assert set(found["domain_bpb"]) == {"sums", "tales"} and set(found["cluster_bpb"]) == {"cluster-00", "cluster-01"}
    assert found["key"]["step"] == 6 and found["key"]["precision"] == "fp32"
    assert set(found["experts"]["layers"]) == {"blocks.0.channel", "blocks.1.token", "blocks.1.channel"}
    assert (trained / "experts-by-domain.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((trained / FILE).read_text())["bpb"] == found["bpb"]


def test_scores_are_sums_over_tokens_whatever_the_batch(clustered: Path) -> None:
    model = model_of(1)
    single = text_of(clustered, batch_size=1)
    nats = tokens = size = 0.0
    for batch in single:
        logits = model(batch.tokens)
        counted = batch.labels != IGNORED_LABEL
        log_p = logits.double().log_softmax(-1).gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0]
        nats -= float(log_p[counted].sum())
        tokens += int(counted.sum())
        size += len(single.tokenizer.decode_bytes(batch.labels[counted].tolist()))
    for batch_size in (1, 7):
        found = score(text := text_of(clustered, batch_size=batch_size), batch_losses(model, text))
        assert found.bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert (found.tokens, found.bytes) == (tokens, size)
        assert found.loss == pytest.approx(nats / tokens, rel=1e-6)


def test_kept_losses_are_those_of_the_batches(text: HeldOutText) -> None:
    model = model_of(1)
    kept = token_losses(model, text)
    assert kept.shape == (len(text), 32)
    again = score(text, ((batch, part[0]) for batch, part in stored_losses(text, [kept])))
    assert again == score(text, batch_losses(model, text))


def test_fewer_contexts_are_spread_evenly(clustered: Path) -> None:
    few = text_of(clustered, max_contexts=6)
    assert len(few) == 6 and score(few, batch_losses(model_of(1), few)).domain_bpb.keys() == {"sums", "tales"}


def test_a_corpus_may_have_shorter_contexts_than_the_model(clustered: Path, text: HeldOutText) -> None:
    longer = build_config(LanguageConfig, MODEL | {"context_length": 64})
    found = HeldOutText(clustered, longer, text.tokenizer)
    assert torch.equal(token_losses(model_of(1, context_length=64), found), token_losses(model_of(1), text))


def test_longer_contexts_and_other_tokenizers_are_refused(clustered: Path, text: HeldOutText) -> None:
    shorter = build_config(LanguageConfig, MODEL | {"context_length": 16})
    with pytest.raises(DataError, match="written for context_length=32, the model has 16"):
        HeldOutText(clustered, shorter, text.tokenizer)
    other = Tokenizer.train(["a few other words " * 20], 270)
    for entries in (512, other.vocab_size):  # also where the corpus has more entries than the model
        with pytest.raises(DataError, match=f"{text.tokenizer.digest[:16]}, the model reads {other.digest[:16]}"):
            HeldOutText(clustered, build_config(LanguageConfig, MODEL | {"vocab_size": entries}), other)


def test_known_results_are_kept_by_checkpoint_corpus_and_precision(
    trained: Path, clustered: Path, copy_of: Callable[..., Path]
) -> None:
    run = copy_of(trained)
    (run / FILE).unlink(missing_ok=True)
    first = evaluate_run(Subject(run, EvaluationConfig()), clustered)
    low = evaluate_run(Subject(run, EvaluationConfig(precision="bf16")), clustered)
    assert low["bpb"] != first["bpb"] and low["bpb"] == pytest.approx(first["bpb"], rel=0.02)
    content = json.loads((run / FILE).read_text())
    assert content["bpb"] == low["bpb"] and [other["bpb"] for other in content["earlier"]] == [first["bpb"]]
    next((run / "checkpoints").glob("step-*/model-*.safetensors")).unlink()
    assert evaluate_run(Subject(run, EvaluationConfig(batch_size=2)), clustered) == first  # read, not computed
    assert json.loads((run / FILE).read_text())["bpb"] == first["bpb"]
    with pytest.raises(CheckpointError, match="missing"):
        evaluate_run(Subject(run, EvaluationConfig()), clustered, again=True)


def test_command_shows_runs_side_by_side(
    trained: Path, clustered: Path, copy_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(trained), str(copy_of(trained, "other")), "--data", str(clustered), "--max-contexts", "4"]
    assert evaluate.main(argv) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("trained", "other", "everything", "tales", "cluster-01", "blocks.1.token"))
    assert evaluate.main([*argv, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs["trained"]["bpb"] == runs["other"]["bpb"] and runs["trained"]["key"]["contexts"] == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data: missing"),
        (["--data", "none"], "none/manifest.json: missing"),
        (["--data", "DATA", "--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--data", "DATA", "--batch-size", "0"], "batch_size"),
        (["--data", "DATA", "--top-k", "2"], "no effect without --ensemble"),
        (["--data", "DATA", "--ensemble", "uniform", "--top-k", "2"], "top_k: has no effect with weights 'uniform'"),
        (["--data", "DATA", "--ensemble", "tfidf"], "does not say which cluster"),
        (["--data", "DATA", "--ensemble", "tfidf", "--clusters", "0,1"], "2 for 1 runs"),
        (["--data", "DATA", "--ensemble", "tfidf", "--clusters", "7"], "has no cluster 7"),
        (["--data", "DATA", "--ensemble", "tfidf", "--clusters", "one"], "not a list of numbers"),
    ],
)
def test_bad_input_is_one_sentence(
    argv: list[str], message: str, trained: Path, clustered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(trained), *[str(clustered) if word == "DATA" else word for word in argv]]) == 1
    assert message in capsys.readouterr().err


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        Subject(tmp_path, EvaluationConfig())


def test_a_damaged_file_of_results_is_named(trained: Path, clustered: Path, copy_of: Callable[..., Path]) -> None:
    run = copy_of(trained)
    (run / FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"evaluation.json: cannot be read .* remove the file"):
        evaluate_run(Subject(run, EvaluationConfig()), clustered)


def test_tasks_without_the_harness_name_the_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lightbulb.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python marks what cannot be imported
    assert evaluate.main([str(trained), "--tasks", "tasks.yaml"]) == 1
    assert "--tasks: needs lm_eval; install it with pip install 'lightbulb[eval]'" in capsys.readouterr().err
