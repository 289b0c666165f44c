"""The corpora of benchmarks/upcycling.py, each written by LightBulb's own preprocessing."""

from pathlib import Path
from typing import Any

from growth.texts import write_texts
from lightbulb.config import build_config
from lightbulb.data.corpus import Corpus
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess

VOCABULARY = 2048
CONTEXT = 128
CLUSTERS = 5
HELD_OUT = 0.05


def corpus_config(texts: Path, output: Path, changes: dict[str, Any]) -> CorpusConfig:
    """Cleaned, deduplicated and clustered text of all domains."""
    sources = [
        {"type": "jsonl", "domain": path.stem, "path": str(path), "id_field": "id"} for path in texts.glob("*.jsonl")
    ]
    values = {
        "output": str(output),
        "context_length": CONTEXT,
        "held_out_fraction": HELD_OUT,
        "sources": sorted(sources, key=lambda source: source["domain"]),
        "deduplicate": {"near": {}},
        "tokenizer": {"vocab_size": VOCABULARY},
        "embed": {},
        "cluster": {"num_clusters": CLUSTERS},
        "executor": {"workers": 1},
    }
    return build_config(CorpusConfig, values | changes, "the benchmark's corpus")


def write_corpora(corpora: Path | None, work: Path, domain_bytes: int) -> dict[str, Any]:
    """Write, or find finished, the corpus of random order and the one of in-context order, in a work folder.

    Returns:
        facts of the first: a ``digest`` of its text, and training and held-out tokens of its ``domains``.
    """
    texts = work / "texts"
    write_texts(corpora, texts, domain_bytes)
    manifest, _ = preprocess(corpus_config(texts, work / "corpus", {}))
    ordered = {
        "order": {"method": "in_context"},
        "pack": {"method": "ordered"},
        "tokenizer": {"path": str(work / "corpus" / "tokenizer.json")},
    }
    preprocess(corpus_config(texts, work / "corpus-in-context", ordered))
    domains: dict[str, dict[str, int]] = {}
    for split, groups in manifest["splits"].items():
        for group, entry in groups.items():
            tokens = domains.setdefault(group.partition("/")[0], {})
            tokens[split] = tokens.get(split, 0) + entry["tokens"]
    rows = Corpus(work / "corpus", "train", CONTEXT, VOCABULARY)
    return {"digest": rows.digest, "domains": domains}


def domain_shares(corpus: dict[str, Any]) -> dict[str, float]:
    """Share of the training tokens by domain, from what :func:`write_corpora` gives."""
    tokens = {domain: counts["train"] for domain, counts in corpus["domains"].items()}
    return {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
