"""Nearest neighbours and centres of vectors of length one: the one place that imports faiss.

One thread, so that sums are added in one order and the results are the same on every machine and for any number of
workers, which run cells side by side instead.
"""

import faiss
import numpy as np

_SAMPLES_PER_CENTRE = 256  # more do not move a centre noticeably (faiss's own rule)
_ITERATIONS = 20


def nearest(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` nearest others of each vector, nearest first; equal ones by number.

    Args:
        vectors: ``[n, dimensions]`` float32 of length one.
        count: below n.

    Returns:
        numbers ``[n, count]`` int64 and similarities ``[n, count]`` float32.
    """
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    similarity, number = index.search(np.ascontiguousarray(vectors), count + 1)
    # Itself comes first, or behind others that are equal to it; where too many are, the last gives way.
    itself = number == np.arange(len(vectors))[:, None]
    itself[~itself.any(1), -1] = True
    number, similarity = (found[~itself].reshape(len(vectors), count) for found in (number, similarity))
    order = np.lexsort((number, -similarity), axis=1)
    return np.take_along_axis(number, order, 1), np.take_along_axis(similarity, order, 1)


def centres_of(vectors: np.ndarray, count: int, seed: int, restarts: int = 1) -> np.ndarray:
    """Centres ``[count, dimensions]`` of length one by spherical k-means on a sample of the vectors.

    The best of some attempts: one alone often splits a large cluster and joins two small ones.
    """
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=_ITERATIONS,
        nredo=restarts,
        spherical=True,
        seed=seed,
        max_points_per_centroid=_SAMPLES_PER_CENTRE,
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids)
