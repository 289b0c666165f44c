"""In-context pretraining: documents in an order in which neighbours are related (Shi et al. 2024, arXiv:2310.10638).

Documents are joined to their nearest neighbours; a path goes from document to the most similar one not yet visited, and
where there is none begins again at the unvisited document with the fewest unvisited neighbours. (The paper's printed
pseudo-code takes the least similar neighbour; its text and figure say the most similar.) Contexts are cut from the path
and shuffled afterwards, elsewhere.

Large corpora are cut into cells of similar documents first, so that time grows with the number of documents.
"""

import numpy as np

from lightbulb.data_prep.neighbours import centres_of, nearest

CELL = 10_000
"""Documents among which neighbours are looked for: exact search is as fast as an index there."""


def in_context_order(vectors: np.ndarray, neighbours: int, seed: int, cell: int = CELL) -> np.ndarray:
    """The numbers 0 to n - 1 in an order in which neighbours are similar.

    Args:
        vectors: ``[n, dimensions]`` float32 of length one.
        neighbours: of each document in the graph; with n - 1 or more the path is the greedy one over all pairs, with 0
            the order is that of the numbers.
        seed: of the cells' centres.
        cell: documents of a cell on average.

    Returns:
        ``[n]`` int64, a permutation.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for members in cells(vectors, cell, seed):
        numbers, similarities = nearest(vectors[members], min(neighbours, len(members) - 1))
        parts.append(members[path(numbers, similarities)])
    return np.concatenate(parts)


def cells(vectors: np.ndarray, size: int, seed: int) -> list[np.ndarray]:
    """The documents of each cell, in their order."""
    count = -(-len(vectors) // size)
    if count <= 1:
        return [np.arange(len(vectors))]
    centres = centres_of(vectors, count, seed)
    blocks = np.split(vectors, range(1 << 16, len(vectors), 1 << 16))
    chosen = np.concatenate([(block @ centres.T).argmax(1) for block in blocks])
    order = np.argsort(chosen, kind="stable")
    found = np.split(order, np.cumsum(np.bincount(chosen, minlength=count))[:-1])
    # A cell that came out many times too large is halved as it stands: searching it would take its square.
    return [part for cell in found if len(cell) for part in np.array_split(cell, -(-len(cell) // (4 * size)))]


def path(numbers: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """The greedy path through the graph of nearest neighbours, ``[n]`` int64.

    Args:
        numbers: ``[n, k]`` neighbours of each document; an edge joins two if either is the other's neighbour.
        similarities: ``[n, k]``.
    """
    starts, targets = _edges(numbers, similarities)
    degrees = np.diff(starts).tolist()
    adjacent, starts = targets.tolist(), starts.tolist()
    buckets = _Buckets(degrees)
    visited = bytearray(len(degrees))
    result: list[int] = []
    while (start := buckets.pop(visited)) is not None:
        here: int | None = start
        while here is not None:
            visited[here] = 1
            result.append(here)
            following: int | None = None
            for other in adjacent[starts[here] : starts[here + 1]]:
                if not visited[other]:
                    buckets.lower(other)
                    if following is None:
                        following = other
            here = following
    return np.array(result, dtype=np.int64)


def _edges(numbers: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The graph in both directions: where each document's edges begin ``[n + 1]``, and the other ends, the most similar
    first, equal ones by number."""
    count, width = numbers.shape
    source = np.repeat(np.arange(count), width)
    ends = np.concatenate([source, numbers.ravel()]), np.concatenate([numbers.ravel(), source])
    weight = np.tile(similarities.ravel(), 2)
    order = np.lexsort((ends[1], -weight, ends[0]))
    source, target = ends[0][order], ends[1][order]
    _, first = np.unique(source * count + target, return_index=True)
    kept = np.zeros(len(source), dtype=bool)
    kept[first] = True
    return np.concatenate([[0], np.cumsum(np.bincount(source[kept], minlength=count))]), target[kept]


class _Buckets:
    """Unvisited documents by the number of their unvisited neighbours; all steps together cost O(edges).

    A document whose number falls is put into the lower bucket and left behind in the higher one.
    """

    def __init__(self, degrees: list[int]):
        self._degrees = degrees
        self._buckets: list[list[int]] = [[] for _ in range(max(degrees, default=0) + 1)]
        for number in reversed(range(len(degrees))):  # so that the smallest number is taken first
            self._buckets[degrees[number]].append(number)
        self._lowest = 0

    def lower(self, number: int) -> None:
        """One neighbour fewer."""
        self._degrees[number] -= 1
        degree = self._degrees[number]
        self._buckets[degree].append(number)
        self._lowest = min(self._lowest, degree)

    def pop(self, visited: bytearray) -> int | None:
        """An unvisited document with the fewest unvisited neighbours."""
        while self._lowest < len(self._buckets):
            bucket = self._buckets[self._lowest]
            while bucket:
                number = bucket.pop()
                if not visited[number] and self._degrees[number] == self._lowest:
                    return number
            self._lowest += 1
        return None
