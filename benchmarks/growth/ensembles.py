"""Branches evaluated together (c-BTM), by LightBulb's own evaluation."""

from pathlib import Path

from growth.corpora import CLUSTERS
from growth.plan import TEMPERATURES, Settings
from lightbulb.config import build_config
from lightbulb.evaluation.ensemble import Centres, Ensemble, EnsembleConfig, score_ensemble
from lightbulb.evaluation.held_out import HeldOutText, token_losses
from lightbulb.train.checkpoint import load_model_for_inference


def evaluate_together(runs: list[Path], corpus: Path, by_cluster: bool) -> Settings:
    """Bits per byte of the branches under every way to weigh them.

    Args:
        runs: of the branches, in the order of their clusters.
        corpus: its held-out text is read, its clusters give the TF-IDF weights.
        by_cluster: whether the branches have clusters.
    """
    losses = []
    for run in runs:
        model, tokenizer, config = load_model_for_inference(run)
        text = HeldOutText(corpus, config.model, tokenizer)
        losses.append(token_losses(model, text))
    found: Settings = {}
    weights = {"likelihood": {"weights": "likelihood"}, "uniform": {"weights": "uniform"}}
    if by_cluster:
        weights |= {f"tfidf {t}": {"weights": "tfidf", "temperature": t} for t in TEMPERATURES}
        centres = Centres.load(corpus, range(CLUSTERS), tokenizer)
    for name, values in weights.items():
        settings = build_config(EnsembleConfig, values, name)
        ensemble = Ensemble(settings, len(runs), centres if settings.weights == "tfidf" else None)
        scores = score_ensemble(ensemble, text, losses)
        found[name] = scores.scores.bpb
        found[f"{name}, branches in use"] = scores.branches_in_use
        if name == "likelihood":
            found["domain_bpb"] = scores.scores.domain_bpb
    return found
