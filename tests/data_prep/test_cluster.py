"""Balanced clusters: the bound holds, the matching is stable, subjects are found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbulb.data_prep.cluster import BLOCK, Clusters, describe, draw, room, within_capacity
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.embed import TfidfEmbedder, normalised


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around as many directions, and which direction each is of."""
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    directions = np.linalg.qr(generator.standard_normal((16, len(sizes))))[0].T
    return normalised(directions[truth] + 0.08 * generator.standard_normal((len(truth), 16))), truth


def purity(chosen: np.ndarray, truth: np.ndarray) -> float:
    return sum(np.bincount(truth[chosen == c]).max() for c in np.unique(chosen)) / len(truth)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.integers(0, 1 << 16))
def test_the_bound_holds_and_nobody_would_rather_swap(documents: int, clusters: int, spare: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 9, (documents, clusters)) / 8
    capacity = -(-documents // clusters) + spare
    chosen = within_capacity(scores, capacity)
    sizes = np.bincount(chosen, minlength=clusters)
    assert chosen.min() >= 0 and sizes.max() <= capacity
    for document in range(documents):
        for cluster in np.flatnonzero(scores[document] > scores[document, chosen[document]]):
            # the better cluster is full of documents that are at least as near to it
            members = chosen == cluster
            assert members.sum() == capacity and scores[members, cluster].min() >= scores[document, cluster]


def test_even_subjects_are_found_and_balanced() -> None:
    vectors, truth = blobs([50, 50, 50, 50])
    clusters = Clusters.fit(vectors, 4, 1.0, seed=0)
    chosen = clusters.assign([vectors])
    assert purity(chosen, truth) == 1 and np.bincount(chosen).tolist() == [50] * 4


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_uneven_subjects_stay_within_the_bound(factor: float) -> None:
    vectors, truth = blobs([170, 10, 10, 10])
    chosen = Clusters.fit(vectors, 4, factor, seed=0).assign([vectors])
    assert np.bincount(chosen, minlength=4).max() <= room(200, 4, factor)


def test_without_a_bound_sizes_are_those_of_the_subjects() -> None:
    vectors, truth = blobs([150, 30, 20])
    clusters = Clusters.fit(vectors, 3, None, seed=0)
    assert sorted(np.bincount(clusters.assign([vectors])).tolist()) == [20, 30, 150]
    np.testing.assert_array_equal(clusters.assign([vectors]), clusters.nearest(vectors))


def test_the_bound_holds_in_every_block() -> None:
    vectors = np.tile(blobs([3, 1])[0], (BLOCK // 2, 1))
    chosen = Clusters(vectors[[0, -1]], 1.0).assign(np.split(vectors, [BLOCK]))
    assert np.bincount(chosen[:BLOCK]).tolist() == [BLOCK // 2, BLOCK // 2]


def test_the_same_seed_gives_the_same_clusters_and_saving_keeps_them(tmp_path: Path) -> None:
    vectors, _ = blobs([40, 30, 20], seed=3)
    one, other = (Clusters.fit(vectors, 5, 1.2, seed=7) for _ in range(2))
    np.testing.assert_array_equal(one.centres, other.centres)
    one.save(tmp_path)
    loaded = Clusters.load(tmp_path)
    np.testing.assert_array_equal(loaded.assign([vectors]), one.assign([vectors]))


def test_more_clusters_than_documents_are_refused() -> None:
    with pytest.raises(CorpusError, match="cluster.num_clusters: 5 clusters of 3 documents; lower it"):
        Clusters.fit(blobs([3])[0], 5, 1.0, seed=0)


def test_the_report_and_the_picture(tmp_path: Path) -> None:
    texts = ["ship sea wind sail"] * 5 + ["sum number divide"] * 5
    embedder = TfidfEmbedder.fit(texts, 2, 100, seed=0)
    vectors = embedder.embed(texts)
    clusters = Clusters.fit(vectors, 2, 1.0, seed=0)
    chosen = clusters.assign([vectors])
    report = describe(clusters, embedder, vectors, chosen, [f"document {i}" for i in range(10)])
    assert [entry["documents"] for entry in report] == [5, 5]
    assert report[chosen[0]]["words"][0] in texts[0] and report[chosen[5]]["words"][0] in texts[5]
    assert report[chosen[0]]["nearest"][0] in {f"document {i}" for i in range(5)}
    draw(clusters, vectors, chosen, [" ".join(entry["words"][:2]) for entry in report], tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").read_bytes()[:4] == b"\x89PNG"
