"""Ensembles of branches: the equalities that define them, and that nothing sees the future."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import model_of
from torch import Tensor

from lightbulb.config import ConfigError, build_config
from lightbulb.data.loader import IGNORED_LABEL, Batch
from lightbulb.evaluation.ensemble import (
    Centres,
    Ensemble,
    EnsembleConfig,
    largest,
    mixture,
    score_ensemble,
    training_shares,
)
from lightbulb.evaluation.held_out import HeldOutText, batch_losses, score, token_losses
from lightbulb.evaluation.results import FILE
from lightbulb.launcher import evaluate
from lightbulb.train.manifest import complete_checkpoints
from lightbulb.train.origin import Origin, parent_of, write_origin

KINDS = ("tfidf", "likelihood", "uniform")


@pytest.fixture
def centres(clustered: Path, text: HeldOutText) -> Centres:
    return Centres.load(clustered, [0, 1], text.tokenizer)


@pytest.fixture
def make(centres: Centres) -> Callable[..., Ensemble]:
    """``make("tfidf", branches=2, temperature=0.5)``; branches beyond the clusters share their centres."""

    def build(weights: str, branches: int = 2, **settings) -> Ensemble:
        config = build_config(EnsembleConfig, {"weights": weights, **settings})
        places = Centres(centres.embedder, centres.centres[np.arange(branches) % 2], centres.tokenizer)
        return Ensemble(config, branches, places if weights == "tfidf" else None)

    return build


def first(text: HeldOutText) -> Batch:
    return next(iter(text))


def losses_of(models, batch: Batch) -> Tensor:
    return torch.stack([model(batch.tokens, batch.labels) for model in models])


def random_losses(branches: int, batch: Batch) -> Tensor:
    losses = 5 * torch.rand(branches, *batch.labels.shape, generator=torch.Generator().manual_seed(0))
    return losses.where(batch.labels != IGNORED_LABEL, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_equality_of_one_branch_with_its_run(kind: str, make: Callable[..., Ensemble], text: HeldOutText) -> None:
    model = model_of(1)
    found = score_ensemble(make(kind, branches=1), text, [token_losses(model, text)])
    alone = score(text, batch_losses(model, text))
    assert found.scores.bpb == pytest.approx(alone.bpb, rel=1e-12)
    assert found.scores.domain_bpb == pytest.approx(alone.domain_bpb, rel=1e-12)
    assert found.branches_in_use == pytest.approx(1.0) and found.weights["sums/cluster-01"] == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_equality_of_equal_branches_with_one(kind: str, make: Callable[..., Ensemble], text: HeldOutText) -> None:
    losses = token_losses(model_of(1), text)
    alone = score_ensemble(make("uniform", branches=1), text, [losses]).scores
    assert score_ensemble(make(kind, branches=3), text, [losses] * 3).scores.bpb == pytest.approx(alone.bpb, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_weights_sum_to_one_also_of_the_largest_only(
    kind: str, top_k: int | None, make: Callable[..., Ensemble], text: HeldOutText
) -> None:
    if kind == "uniform" and top_k is not None:
        with pytest.raises(ConfigError, match="top_k: has no effect"):
            make(kind, top_k=top_k)
        return
    batch = first(text)
    settings = {} if top_k is None else {"top_k": top_k}
    weights = make(kind, branches=3, **settings).log_weights(batch, random_losses(3, batch)).exp()
    assert torch.allclose(weights.sum(0), torch.ones(1, dtype=torch.float64), atol=1e-12)
    assert ((weights > 0).sum(0) <= (top_k or 3)).all()


def test_the_largest_keep_their_ratio_and_ties_go_to_the_first() -> None:
    weights = torch.tensor([0.1, 0.5, 0.4]).double()
    assert torch.allclose(largest(weights.log(), 2).exp(), torch.tensor([0.0, 5 / 9, 4 / 9]).double())
    assert torch.equal(largest(torch.zeros(3).double().log_softmax(0), 1).exp(), torch.tensor([1.0, 0, 0]).double())


def test_mixtures_of_probabilities_sum_to_one_over_the_vocabulary(
    make: Callable[..., Ensemble], text: HeldOutText
) -> None:
    batch, models = first(text), [model_of(seed) for seed in (1, 2, 3)]
    weights = make("likelihood", branches=3).log_weights(batch, losses_of(models, batch))
    everything = torch.stack([-model(batch.tokens).log_softmax(-1) for model in models])
    nats = mixture(everything, weights[..., None])
    # float32 log-softmax of 512 entries
    assert torch.allclose((-nats).exp().sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-5)
    gold = nats.gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0].where(batch.labels != IGNORED_LABEL, 0.0)
    assert torch.allclose(mixture(losses_of(models, batch), weights), gold, atol=1e-5)


def test_equality_of_cold_distances_with_the_nearest_centre(
    make: Callable[..., Ensemble], centres: Centres, text: HeldOutText
) -> None:
    batch = first(text)
    weights = make("tfidf", temperature=1e-12, update_every=8).log_weights(batch, random_losses(2, batch)).exp()
    for row in range(len(batch.tokens)):
        assert torch.equal(weights[:, row, :7], torch.full((2, 7), 0.5).double())  # nothing is known yet
        for known in (8, 16, 24):
            vector = centres.embedder.embed([text.tokenizer.decode(batch.tokens[row, :known].tolist())])
            distances = ((vector - centres.centres) ** 2).sum(1)
            here = weights[:, row, known - 1 : known + 7]
            wanted = [0.5, 0.5] if not vector.any() else np.eye(2)[distances.argmin()]
            assert torch.equal(here, torch.tensor(wanted).double()[:, None].expand(2, 8))


def test_equality_of_hot_weights_with_uniform_ones(make: Callable[..., Ensemble], text: HeldOutText) -> None:
    losses = [token_losses(model_of(seed), text) for seed in (1, 2)]
    uniform = score_ensemble(make("uniform"), text, losses).scores
    for kind in ("tfidf", "likelihood"):
        hot = score_ensemble(make(kind, temperature=1e12), text, losses).scores
        assert hot.bpb == pytest.approx(uniform.bpb, rel=1e-9)


def test_equality_of_the_posterior_with_bayes_rule_for_whole_contexts(
    make: Callable[..., Ensemble], text: HeldOutText
) -> None:
    batch = first(text)
    losses = random_losses(3, batch).double()
    ensemble = Ensemble(build_config(EnsembleConfig, {"weights": "likelihood"}), 3, prior=[1.0, 2.0, 5.0])
    found = mixture(losses, ensemble.log_weights(batch, losses)).sum(-1)
    prior = torch.tensor([1.0, 2.0, 5.0]).double() / 8
    assert torch.allclose(found, -(prior.log()[:, None] - losses.sum(-1)).logsumexp(0), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_never_changes_an_earlier_probability(
    kind: str, make: Callable[..., Ensemble], text: HeldOutText
) -> None:
    settings = {} if kind == "uniform" else {"temperature": 0.5}
    ensemble = make(kind, **settings | ({"update_every": 1} if kind == "tfidf" else {}))
    models, batch = [model_of(1), model_of(2)], first(text)
    for place in (1, 9, 30):
        tokens, labels = batch.tokens.clone(), batch.labels.clone()
        tokens[:, place] = (tokens[:, place] + 7) % 300
        labels[:, place - 1] = tokens[:, place]
        changed = batch._replace(tokens=tokens, labels=labels)
        losses = [losses_of(models, b) for b in (batch, changed)]
        weights = [ensemble.log_weights(b, x) for b, x in zip((batch, changed), losses, strict=True)]
        before, after = (mixture(x, w) for x, w in zip(losses, weights, strict=True))
        assert torch.equal(before[:, : place - 1], after[:, : place - 1])
        assert not torch.equal(before[:, place - 1 :], after[:, place - 1 :])
        # weights of the changed label, too, do not depend on it
        assert torch.equal(weights[0][..., :place], weights[1][..., :place])
        assert kind == "uniform" or not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("kind", ["tfidf", "likelihood"])
def test_a_document_may_begin_without_a_past(kind: str, make: Callable[..., Ensemble], text: HeldOutText) -> None:
    batch = next(
        batch
        for batch in text
        if batch.document_ids is not None and (batch.document_ids[:, 0] != batch.document_ids[:, 20]).any()
    )
    assert batch.document_ids is not None
    row = int((batch.document_ids[:, 0] != batch.document_ids[:, 20]).nonzero()[0])
    start = int((batch.document_ids[row] != batch.document_ids[row, 0]).nonzero()[0])
    losses = random_losses(2, batch)
    settings = {"update_every": 1} if kind == "tfidf" else {}
    split, whole = (
        make(kind, by_document=flag, **settings).log_weights(batch, losses)[:, row] for flag in (True, False)
    )
    assert torch.equal(split[:, :start], whole[:, :start]) and not torch.allclose(split[:, start:], whole[:, start:])
    # what is behind the start is as if nothing had been before it
    rest = batch._replace(
        tokens=batch.tokens[row : row + 1, start:], document_ids=torch.ones(1, 32 - start, dtype=torch.int64)
    )
    end = int((batch.document_ids[row] == batch.document_ids[row, start]).nonzero()[-1]) + 1
    alone = make(kind, **settings).log_weights(rest, losses[:, row : row + 1, start:])[:, 0]
    assert torch.allclose(split[:, start:end], alone[:, : end - start], atol=1e-12)


def test_a_prefix_fixes_the_weights(make: Callable[..., Ensemble], text: HeldOutText) -> None:
    batch = first(text)
    losses = random_losses(2, batch)
    fixed = make("tfidf", update_every=4, prefix=8).log_weights(batch, losses)
    growing = make("tfidf", update_every=4).log_weights(batch, losses)
    assert torch.equal(fixed[..., :11], growing[..., :11])
    assert torch.equal(fixed[..., 7:], fixed[..., 7:8].expand_as(fixed[..., 7:]))
    assert not torch.equal(fixed, growing)


def test_flops_count_the_branches_that_are_asked(make: Callable[..., Ensemble]) -> None:
    assert make("likelihood", branches=4, top_k=1).flops([10.0] * 4) == 40.0
    assert make("uniform", branches=4).flops([10.0] * 4) == 40.0
    assert make("tfidf", branches=4, top_k=1).flops([10.0] * 4) == 10.0


def test_a_prior_may_be_the_clusters_share_of_training(clustered: Path, text: HeldOutText) -> None:
    model = model_of(0).config
    tokens = training_shares(clustered, model, 32, [0, 1])
    manifest = json.loads((clustered / "manifest.json").read_text())
    assert sum(tokens) == sum(group["tokens"] for group in manifest["splits"]["train"].values())


def test_command_mixes_runs_that_know_their_clusters(
    trained: Path, clustered: Path, copy_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [copy_of(trained, name) for name in ("one", "two")]
    for cluster, run in enumerate(runs):
        parent = parent_of(complete_checkpoints(run)[0])
        write_origin(run, Origin(kind="branch", parents=[parent], detail={"cluster": cluster}))
    argv = [*map(str, runs), "--data", str(clustered), "--ensemble", "tfidf", "--temperature", "0.2"]
    assert evaluate.main(argv) == 0
    assert "ensemble: " in (shown := capsys.readouterr().out) and "FLOPs per token" in shown
    found = json.loads((tmp_path / "ensemble-tfidf" / FILE).read_text())
    assert found["bpb"] == pytest.approx(json.loads((trained / "summary.json").read_text())["held_out_bpb"], rel=1e-6)
    assert found["key"]["clusters"] == [0, 1] and len(found["members"]) == 2
    for run in runs:
        next((run / "checkpoints").glob("step-*/model-*.safetensors")).unlink()
    assert evaluate.main([*argv, "--json"]) == 0  # read, not computed
    assert json.loads(capsys.readouterr().out)["runs"]["ensemble"]["bpb"] == found["bpb"]
