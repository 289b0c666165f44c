"""The split depends on each document's path alone, and leaves no domain without either side."""

from pathlib import Path

import numpy as np
import pytest

from lightbulb.data_prep.read import CorpusError, Document
from lightbulb.data_prep.split import Spool, path_hash


def spooled(path: Path, documents: list[tuple[int, str]]) -> Spool:
    with Spool(path / "texts") as spool:
        for domain, name in documents:
            spool.add(domain, Document(name, f"text of {name} é"))
    return spool


def test_texts_come_back_in_order_and_by_mask(tmp_path: Path) -> None:
    spool = spooled(tmp_path, [(0, "a"), (1, "b"), (0, "c")])
    assert list(spool.texts()) == ["text of a é", "text of b é", "text of c é"]
    assert list(spool.texts(np.array([True, False, True]))) == ["text of a é", "text of c é"]
    assert spool.sizes().tolist() == [12, 12, 12] and spool.domains().tolist() == [0, 1, 0]


def test_more_documents_move_none_to_the_other_side(tmp_path: Path) -> None:
    names = [(0, f"file{i}") for i in range(1000)]
    few = spooled(tmp_path, names[:500]).held_out(0.05, ["d"])
    many = spooled(tmp_path, names).held_out(0.05, ["d"])
    assert (few == many[:500]).all()
    assert 30 <= many.sum() <= 70


def test_hash_is_the_same_on_every_machine() -> None:
    assert path_hash("json/decoder.py") == 0x3B2E3CB3D29D57A5


def test_each_domain_keeps_a_document_on_both_sides(tmp_path: Path) -> None:
    documents = [(domain, f"{domain}/{i}") for domain in (0, 1) for i in range(3)]
    for fraction in (1e-9, 0.999999):
        chosen = spooled(tmp_path, documents).held_out(fraction, ["a", "b"])
        for side in (chosen, ~chosen):
            assert side[:3].any() and side[3:].any()


def test_a_domain_of_one_document_is_refused_unless_nothing_is_held_out(tmp_path: Path) -> None:
    spool = spooled(tmp_path, [(0, "a"), (0, "b"), (1, "c")])
    with pytest.raises(CorpusError, match="held_out_fraction: domain 'tales' has one document"):
        spool.held_out(0.5, ["code", "tales"])
    assert not spool.held_out(0.0, ["code", "tales"]).any()
