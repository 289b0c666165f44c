"""Balanced spherical k-means: clusters of documents of which none is larger than it may be.

c-BTM (Gururangan et al. 2023, arXiv:2303.14177) trains one expert per cluster and wants clusters of one size. Room is
given out as in college admission (Gale and Shapley 1962): every document asks for the nearest centre that has not
turned it away, and a full cluster keeps the documents nearest to its centre.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import orjson
from matplotlib.figure import Figure

from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.embed import Embedder, TfidfEmbedder, normalised
from lightbulb.data_prep.neighbours import centres_of
from lightbulb.folder import explained, write_atomically

BLOCK = 50_000
"""Documents among which room is given out at a time."""
_ITERATIONS = 20
_RESTARTS = 5
_MAX_POINTS = 5_000
_CENTRES = "centres.npy"


class Clusters:
    """Centres, and which documents are theirs.

    Args:
        centres: ``[clusters, dimensions]`` float32 of length one.
        capacity_factor: room of a cluster as a multiple of an even share; None for any size.
    """

    def __init__(self, centres: np.ndarray, capacity_factor: float | None):
        self.centres, self.capacity_factor = centres, capacity_factor

    @classmethod
    def fit(cls, vectors: np.ndarray, count: int, capacity_factor: float | None, seed: int) -> "Clusters":
        """Centres of a sample of documents, ``vectors [n, dimensions]``.

        Raises:
            CorpusError: fewer documents than clusters.
        """
        if len(vectors) < count:
            raise CorpusError(f"cluster.num_clusters: {count} clusters of {len(vectors)} documents; lower it")
        result = cls(centres_of(vectors, count, seed, _RESTARTS), capacity_factor)
        for _ in range(_ITERATIONS if capacity_factor is not None else 0):
            chosen = result.assign(_blocks(vectors))
            sums = np.stack([vectors[chosen == c].sum(0) for c in range(count)])
            moved = normalised(np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 0, sums, result.centres))
            if np.allclose(moved, result.centres, atol=1e-6):
                break
            result.centres = moved
        return result

    def similarities(self, vectors: np.ndarray) -> np.ndarray:
        """``[n, clusters]``; the squared distance to a centre is 2 minus twice that."""
        return vectors @ self.centres.T

    def assign(self, blocks: Iterable[np.ndarray]) -> np.ndarray:
        """The cluster of each document of a corpus, ``[n]`` int64, none larger than it may be in any block.

        Args:
            blocks: vectors ``[documents, dimensions]``, about :data:`BLOCK` at a time.
        """
        return np.concatenate([np.empty(0, dtype=np.int64), *map(self._assign_block, blocks)])

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """The cluster of new texts, ``[n]`` int64: the nearest, however many choose it."""
        return self.similarities(vectors).argmax(1)

    def _assign_block(self, vectors: np.ndarray) -> np.ndarray:
        scores = self.similarities(vectors)
        if self.capacity_factor is None:
            return scores.argmax(1)
        return within_capacity(scores, room(len(vectors), len(self.centres), self.capacity_factor))

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` reads."""
        with explained(folder / _CENTRES):
            np.save(folder / _CENTRES, self.centres)
        write_atomically(folder / "clusters.json", orjson.dumps({"capacity_factor": self.capacity_factor}))

    @classmethod
    def load(cls, folder: Path) -> "Clusters":
        """What :meth:`save` wrote; nothing is unpickled."""
        settings = orjson.loads((folder / "clusters.json").read_bytes())
        return cls(np.load(folder / _CENTRES, allow_pickle=False), settings["capacity_factor"])


def _blocks(vectors: np.ndarray) -> list[np.ndarray]:
    return [vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK)]


def room(documents: int, clusters: int, capacity_factor: float) -> int:
    """Documents that one cluster may have: never fewer than an even share, so that all find a place."""
    return max(int(np.ceil(capacity_factor * documents / clusters)), -(-documents // clusters))


def within_capacity(scores: np.ndarray, capacity: int) -> np.ndarray:
    """A cluster for each document such that no document and cluster would both rather have each other.

    Args:
        scores: ``[documents, clusters]``.
        capacity: documents of a cluster; times clusters at least the documents.

    Returns:
        ``[documents]`` int64.
    """
    open_scores = scores.astype(np.float64)
    chosen = np.full(len(scores), -1)
    asking = np.arange(len(scores))
    while len(asking):
        chosen[asking] = open_scores[asking].argmax(1)
        turned_away = []
        for cluster in np.unique(chosen[asking]):
            members = np.flatnonzero(chosen == cluster)
            if len(members) > capacity:
                ranked = members[np.argsort(-scores[members, cluster], kind="stable")]
                turned_away.append(ranked[capacity:])
                open_scores[ranked[capacity:], cluster] = -np.inf
        asking = np.concatenate(turned_away) if turned_away else asking[:0]
    return chosen


def describe(
    clusters: Clusters, embedder: Embedder, vectors: np.ndarray, chosen: np.ndarray, names: list[str]
) -> list[dict[str, Any]]:
    """Size, words, and the nearest and farthest documents of each cluster.

    Args:
        clusters: the centres.
        embedder: names the words of a centre, if it is TF-IDF.
        vectors: ``[n, dimensions]`` of the documents (a sample will do).
        chosen: ``[n]`` their clusters.
        names: ``[n]`` what to call them.
    """
    found = []
    for number, centre in enumerate(clusters.centres):
        members = np.flatnonzero(chosen == number)
        ranked = members[np.argsort(-(vectors[members] @ centre), kind="stable")]
        words = embedder.words_of(centre, 12) if isinstance(embedder, TfidfEmbedder) else []
        near, far = ([names[i] for i in part] for part in (ranked[:3], ranked[::-1][:3]))
        similarity = float((vectors[members] @ centre).mean()) if len(members) else 0.0
        found.append(
            {"documents": len(members), "similarity": round(similarity, 4), "words": words, "nearest": near}
            | {"farthest": far}
        )
    return found


def draw(clusters: Clusters, vectors: np.ndarray, chosen: np.ndarray, labels: list[str], path: Path) -> None:
    """A picture of the clusters on the two directions in which documents differ most."""
    step = max(1, len(vectors) // _MAX_POINTS)
    points, colours = vectors[::step], chosen[::step]
    middle = points.mean(0)
    _, _, axes = np.linalg.svd(points - middle, full_matrices=False)
    flat, centres = ((x - middle) @ axes[:2].T for x in (points, clusters.centres))
    figure = Figure(figsize=(9, 6), layout="constrained")
    plot = figure.add_subplot()
    palette = matplotlib.colormaps["tab10" if len(labels) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for number, label in enumerate(labels):
        mine, colour = flat[colours == number], palette[number % len(palette)]
        plot.scatter(mine[:, 0], mine[:, -1], s=6, color=colour, alpha=0.6, linewidths=0, label=f"{number}: {label}")
        plot.scatter(centres[number, 0], centres[number, -1], s=90, color=colour, marker="X", edgecolors="black")
    plot.set(xlabel="first direction", ylabel="second direction", title="Clusters of documents (crosses: centres)")
    if len(labels) <= 20:
        figure.legend(loc="outside right upper", fontsize="small", markerscale=3)
    with explained(path):
        figure.savefig(path, dpi=120)
