"""The in-context order against a naive form of its definition, and its promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbulb.data_prep.embed import normalised
from lightbulb.data_prep.neighbours import nearest
from lightbulb.data_prep.order import cells, in_context_order, path


def vectors_of(count: int, seed: int = 0, dimensions: int = 8) -> np.ndarray:
    return normalised(np.random.default_rng(seed).standard_normal((count, dimensions)))


def check_path(numbers: np.ndarray, similarities: np.ndarray, order: list[int]) -> None:
    """Every step of the order is one that the definition allows."""
    edges: dict[int, dict[int, float]] = {i: {} for i in range(len(numbers))}
    for i, (row, weights) in enumerate(zip(numbers.tolist(), similarities.tolist(), strict=True)):
        for j, weight in zip(row, weights, strict=True):
            edges[i][j] = edges[j][i] = max(weight, edges[i].get(j, -9))
    left = set(order)
    assert left == set(edges)
    previous = -1
    for here in order:
        onward = {j: weight for j, weight in edges.get(previous, {}).items() if j in left}
        if onward:
            assert onward.get(here) == max(onward.values())
        else:
            degrees = {i: sum(j in left for j in edges[i]) for i in left}
            assert degrees[here] == min(degrees.values())
        left.discard(here)
        previous = here


@pytest.mark.parametrize("neighbours", [1, 2, 5])
@pytest.mark.parametrize("count", [2, 7, 40])
def test_equality_with_the_definition(count: int, neighbours: int) -> None:
    graph = nearest(vectors_of(count, seed=count), min(neighbours, count - 1))
    check_path(*graph, path(*graph).tolist())


def test_over_the_complete_graph_it_is_the_greedy_tour() -> None:
    vectors = vectors_of(30)
    order = in_context_order(vectors, 29, seed=0)
    left = set(range(30)) - {order[0]}
    for here, following in zip(order, order[1:], strict=False):
        assert following == max(left, key=lambda j: vectors[here] @ vectors[j])
        left.discard(following)


def test_without_neighbours_it_is_the_order_of_the_numbers() -> None:
    assert in_context_order(vectors_of(9), 0, seed=0).tolist() == list(range(9))


@given(st.integers(1, 60), st.integers(0, 8), st.integers(2, 30), st.integers(0, 99))
def test_it_is_a_permutation_and_the_same_every_time(count: int, neighbours: int, cell: int, seed: int) -> None:
    vectors = vectors_of(count, seed)
    order = in_context_order(vectors, neighbours, seed, cell)
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(order, in_context_order(vectors, neighbours, seed, cell))


def test_equal_documents_stand_together() -> None:
    vectors = np.repeat(vectors_of(6, dimensions=32), 5, axis=0)[np.random.default_rng(0).permutation(30)]
    order = in_context_order(vectors, 4, seed=0)
    adjacent = (vectors[order[1:]] * vectors[order[:-1]]).sum(1)
    assert (adjacent > 0.999).sum() == 24


def test_related_documents_stand_together_also_over_cells() -> None:
    generator = np.random.default_rng(1)
    subjects = vectors_of(40, dimensions=32)
    vectors = normalised(subjects[generator.integers(0, 40, 2000)] + 0.05 * generator.standard_normal((2000, 32)))
    order = in_context_order(vectors, 10, seed=0, cell=300)
    adjacent = (vectors[order[1:]] * vectors[order[:-1]]).sum(1).mean()
    random = (vectors[1:] * vectors[:-1]).sum(1).mean()
    assert adjacent > 0.85 and abs(random) < 0.1


def test_cells_hold_every_document_once() -> None:
    found = cells(vectors_of(500), 100, seed=0)
    assert len(found) == 5 and sorted(np.concatenate(found).tolist()) == list(range(500))


def test_nearest_is_exact_and_never_itself() -> None:
    vectors = np.concatenate([vectors_of(20), vectors_of(20)])  # each document twice
    numbers, similarities = nearest(vectors, 3)
    exact = vectors @ vectors.T
    np.fill_diagonal(exact, -9)
    assert not (numbers == np.arange(40)[:, None]).any()
    np.testing.assert_allclose(similarities, -np.sort(-exact, axis=1)[:, :3], atol=1e-6)
    assert (numbers[:, 0] == (np.arange(40) + 20) % 40).all()
