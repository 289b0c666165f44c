"""The split depends on each document's path alone, and leaves no domain without either side."""

import numpy as np
import pytest

from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.documents import path_hash
from lightbulb.data_prep.split import held_out


def hashes(names: list[str]) -> np.ndarray:
    return np.array([path_hash(name) for name in names], dtype=np.uint64)


def test_more_documents_move_none_to_the_other_side() -> None:
    names = hashes([f"file{i}" for i in range(1000)])
    domains = np.zeros(1000, dtype=int)
    few, many = held_out(names[:500], domains[:500], 0.05, ["d"]), held_out(names, domains, 0.05, ["d"])
    assert (few == many[:500]).all()
    assert 30 <= many.sum() <= 70


def test_hash_is_the_same_on_every_machine() -> None:
    assert path_hash("json/decoder.py") == 0x3B2E3CB3D29D57A5


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_each_domain_keeps_a_document_on_both_sides(fraction: float) -> None:
    names = hashes([f"{domain}/{i}" for domain in (0, 1) for i in range(3)])
    chosen = held_out(names, np.repeat([0, 1], 3), fraction, ["a", "b"])
    for side in (chosen, ~chosen):
        assert side[:3].any() and side[3:].any()


def test_dropped_documents_are_on_neither_side() -> None:
    names = hashes([f"file{i}" for i in range(100)])
    domains = np.where(np.arange(100) % 2, 0, -1)
    assert not held_out(names, domains, 0.9, ["d"])[::2].any()


def test_a_domain_of_one_document_is_refused_unless_nothing_is_held_out() -> None:
    names, domains = hashes(["a", "b", "c"]), np.array([0, 0, 1])
    with pytest.raises(CorpusError, match="held_out_fraction: domain 'tales' has one document"):
        held_out(names, domains, 0.5, ["code", "tales"])
    assert not held_out(names, domains, 0.0, ["code", "tales"]).any()
