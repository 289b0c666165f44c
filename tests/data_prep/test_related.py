"""Corpora with near-duplicates, contamination, clusters and an in-context order, from planted documents to shards."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from lightbulb.config import ConfigError, build_config
from lightbulb.data.corpus import Corpus
from lightbulb.data_prep.cluster import Clusters
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.embed import load_embedder
from lightbulb.data_prep.pipeline import preprocess

WORDS = {
    "sea": "ship wave harbour sail anchor tide captain storm island gull rope deck",
    "kitchen": "flour butter oven sugar salt recipe bake dough pan spoon egg milk",
    "sums": "number divide multiply equation total fraction double percent half plus minus equal",
}
SUBJECTS = {name: words.split() for name, words in WORDS.items()}
FILLER = ["the", "a", "of", "and", "to", "in", "is", "was", "for", "with", "on", "at", "by", "from", "that", "it", "as"]


def document(rng: random.Random, subject: str, words: int = 120) -> str:
    return " ".join(rng.choice(SUBJECTS[subject] if rng.random() < 0.4 else FILLER) for _ in range(words))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def corpus_config(folder: Path, texts: list[str], **changes: Any) -> CorpusConfig:
    path = write_jsonl(folder / "texts.jsonl", texts)
    values = {
        "output": str(folder / "corpus"),
        "context_length": 64,
        "held_out_fraction": 0.1,
        "tokenizer": {"vocab_size": 300},
        "executor": {"workers": 1},
        "sources": [{"type": "jsonl", "domain": "mixed", "path": str(path)}],
    }
    return build_config(CorpusConfig, values | changes)


def source_of(config: CorpusConfig) -> dict[str, Any]:
    return preprocess(config).manifest["sources"][0]


def test_planted_duplicates_are_counted_exactly(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [document(rng, rng.choice(list(SUBJECTS))) for _ in range(60)]
    near = [text.replace(" ", "  ", 5).upper() for text in originals[:7]]  # other bytes, the same words
    edited = [text + " zebra" for text in originals[10:14]]
    found = source_of(corpus_config(tmp_path, originals + originals[:9] + near + edited, deduplicate={"near": {}}))
    assert found["dropped"] == {"duplicate": 9, "near_duplicate": 11}
    for reason, first in (("duplicate", 61), ("near_duplicate", 70)):  # lines count from 1
        pairs = [{"path": f"texts.jsonl:{first + i}", "kept": f"texts.jsonl:{1 + i}"} for i in range(5)]
        assert found["examples"][reason] == pairs


def test_evaluation_texts_are_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    questions = [document(rng, "sums", 20) for _ in range(5)]
    texts = [document(rng, "sums") for _ in range(40)]
    texts[3] += " " + questions[2].upper()
    texts[8] = "Well: " + questions[4]
    against = [{"type": "jsonl", "domain": "eval", "path": str(write_jsonl(tmp_path / "eval.jsonl", questions))}]
    manifest = preprocess(corpus_config(tmp_path, texts, decontaminate={"sources": against})).manifest
    assert manifest["sources"][0]["dropped"] == {"contaminated": 2}
    assert manifest["sources"][0]["first_dropped"]["contaminated"] == "texts.jsonl:4"
    most, least = manifest["sources"][0]["examples"]["contaminated"]
    assert (most["path"], least["path"]) == ("texts.jsonl:9", "texts.jsonl:4")
    assert most["share"] > 0.8 > least["share"] > 0


def test_other_evaluation_texts_make_another_corpus(tmp_path: Path) -> None:
    rng = random.Random(7)
    texts = [document(rng, "sea") for _ in range(20)]
    path = write_jsonl(tmp_path / "eval.jsonl", ["nothing of that"])
    against = {"sources": [{"type": "jsonl", "domain": "eval", "path": str(path)}]}
    config = corpus_config(tmp_path, texts, decontaminate=against)
    assert not preprocess(config).is_up_to_date and preprocess(config).is_up_to_date
    write_jsonl(path, [texts[4]])
    result = preprocess(config)
    assert not result.is_up_to_date and result.manifest["sources"][0]["dropped"] == {"contaminated": 1}


def test_clusters_are_the_subjects_and_each_has_its_folder(tmp_path: Path) -> None:
    rng = random.Random(2)
    kinds = [kind for kind in SUBJECTS for _ in range(30)]
    rng.shuffle(kinds)
    texts = [document(rng, kind) for kind in kinds]
    config = corpus_config(tmp_path, texts, embed={"dimensions": 8}, cluster={"num_clusters": 3})
    manifest = preprocess(config).manifest
    for entry in manifest["clusters"]:
        (subject,) = {kind for kind, words in SUBJECTS.items() if set(entry["words"][:5]) <= set(words)}
        assert 20 <= entry["documents"] <= 30 * 1.1
        numbers = [int(name.partition(":")[2]) - 1 for name in entry["nearest"]]
        assert {kinds[number] for number in numbers} == {subject}
    assert sorted(manifest["splits"]["train"]) == [f"mixed/cluster-0{i}" for i in range(3)]
    corpus = Corpus(config.output, "train", 64, 300)
    assert len(corpus) == sum(group["rows"] for group in manifest["splits"]["train"].values())
    # what is saved gives new text its cluster
    folder = config.output / "clusters"
    new = load_embedder(folder).embed([document(rng, kind) for kind in SUBJECTS])
    assert sorted(Clusters.load(folder).nearest(new)) == [0, 1, 2]
    assert (folder / "clusters.png").read_bytes()[:4] == b"\x89PNG"


def test_neighbours_in_the_order_are_related(tmp_path: Path) -> None:
    rng = random.Random(3)
    kinds = [kind for kind in SUBJECTS for _ in range(30)]
    rng.shuffle(kinds)
    texts = [document(rng, kind) for kind in kinds]
    wanted = {"embed": {"dimensions": 8}, "order": {"method": "in_context"}, "pack": {"method": "ordered"}}
    manifest = preprocess(corpus_config(tmp_path, texts, **wanted)).manifest
    assert manifest["order"]["adjacent_similarity"] > manifest["order"]["random_similarity"] + 0.3


def test_every_document_is_in_the_shards_once_whatever_the_order(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = [f"marker{i} " + document(rng, rng.choice(list(SUBJECTS))) for i in range(40)]
    wanted = {"embed": {"dimensions": 8}, "order": {"method": "in_context"}, "pack": {"method": "ordered"}}
    counts = []
    for name, changes in {"plain": {}, "ordered": wanted | {"cluster": {"num_clusters": 2}}}.items():
        folder = tmp_path / name
        folder.mkdir()
        splits = preprocess(corpus_config(folder, texts, **changes)).manifest["splits"]
        counts.append(
            {
                split: np.sum([(g["documents"], g["tokens"]) for g in found.values()], 0)
                for split, found in splits.items()
            }
        )
    for split, total in counts[0].items():
        np.testing.assert_array_equal(total, counts[1][split])


def test_changing_the_clusters_redoes_only_what_depends_on_them(tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [document(rng, rng.choice(list(SUBJECTS))) for _ in range(40)]
    options = {"embed": {"dimensions": 8}, "keep_work": True, "deduplicate": {"near": {}}}
    config = corpus_config(tmp_path, texts, **options, cluster={"num_clusters": 2})
    preprocess(config)
    work = config.output.with_name("corpus.work")
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/*/report.json")}
    preprocess(corpus_config(tmp_path, texts, **options, cluster={"num_clusters": 3}))
    after = {path: path.stat().st_mtime_ns for path in work.glob("*/*/report.json")}
    redone = {path.parent.parent.name for path in after.keys() - before.keys()}
    assert redone == {"clusters", "pack", "lineage", "shards"}
    assert all(after[path] == before[path] for path in before.keys() & after.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": {"num_clusters": 2}}, "add embed"),
        ({"order": {"method": "in_context"}}, "add embed"),
        ({"embed": {}, "order": {"method": "in_context"}}, "needs pack.method=ordered"),
        ({"embed": {"method": "sentence_transformer"}}, "needs the path"),
        ({"deduplicate": {"near": {"threshold": 1.5}}}, "deduplicate.near.threshold"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corpus_config(tmp_path, ["a"], **changes)


def test_more_clusters_than_documents(tmp_path: Path) -> None:
    rng = random.Random(6)
    texts = [document(rng, "sea") for _ in range(6)]
    with pytest.raises(CorpusError, match="cluster.num_clusters: 9 clusters of"):
        preprocess(corpus_config(tmp_path, texts, embed={}, cluster={"num_clusters": 9}))
