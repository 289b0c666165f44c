"""The sample ledger: what it proves, what it refuses to prove, and what a resume leaves of it."""

import orjson
import pytest
import torch

from lightbulb.data.loader import Batch
from lightbulb.train.ledger import Ledger, LedgerError, check_ledger, read_ledger, rewind_ledger, tokens_hash


def batch(*ids):
    tokens = torch.tensor(ids)[:, None] * 10 + torch.arange(4)
    return Batch(tokens, tokens, None, torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64))


def train(run, steps, ranks, size=8):
    """Steps of ``size`` samples on so many data ranks, two micro-batches each."""
    ledgers = [Ledger(run, rank, True) for rank in range(ranks)]
    part = size // ranks
    for step in steps:
        for rank, ledger in enumerate(ledgers):
            ids = range((step - 1) * size + rank * part, (step - 1) * size + (rank + 1) * part)
            ledger.add(step, [batch(*ids[: part // 2]), batch(*ids[part // 2 :])])
    for ledger in ledgers:
        ledger.write(ledger.take())


def test_a_run_on_several_numbers_of_ranks_is_proven(tmp_path):
    train(tmp_path, range(1, 4), 2)
    train(tmp_path, range(4, 7), 4)
    train(tmp_path, range(7, 10), 1)
    check = check_ledger(tmp_path, 9, 8)
    assert (check.steps, check.samples, check.problems) == (9, 72, [])
    line = orjson.loads((tmp_path / "ledger" / "data-0001.jsonl").read_bytes().splitlines()[0])
    assert line == {"step": 1, "places": [[4, 8]], "tokens": tokens_hash([batch(4, 5).tokens, batch(6, 7).tokens])}


def test_a_resume_drops_what_was_not_saved_from_all_ranks_files(tmp_path):
    train(tmp_path, range(1, 6), 4)
    with (tmp_path / "ledger" / "data-0003.jsonl").open("ab") as file:
        file.write(b'{"step":6,"pla')  # killed while writing
    assert check_ledger(tmp_path, 5, 8).problems == []
    rewind_ledger(tmp_path, 3)
    train(tmp_path, range(4, 9), 2)
    check = check_ledger(tmp_path, 8, 8)
    assert (check.samples, check.problems) == (64, [])
    assert {line.step for path, line in read_ledger(tmp_path, 8) if path.name == "data-0003.jsonl"} == {1, 2, 3}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: lines[:2] + lines[3:], "step 3: samples 16 to 19 were skipped"),
        (lambda lines: lines[:3] + lines[2:], "step 3: sample 16 was read twice"),
        (lambda lines: [lines[0].replace(b"[0,4]", b"[1,4]"), *lines[1:]], "step 1: samples 0 to 0 were skipped"),
        (lambda lines: [lines[0].replace(b"[0,4]", b"[0,5]"), *lines[1:]], "step 1: sample 4 was read twice"),
        (lambda lines: [lines[0].replace(b"[0,4]", b"[80,84]"), *lines[1:]], "step 1: samples 0 to 3 were skipped"),
        (lambda lines: [b"x\n", *lines], "line 1 is damaged"),
        (lambda lines: [lines[0].replace(b"[0,4]", b"[-1,4]"), *lines[1:]], "line 1 is damaged"),
        (lambda lines: [lines[0].replace(b'"step":1', b'"step":0'), *lines[1:]], "names step 0"),
    ],
)
def test_what_was_repeated_skipped_or_damaged_is_named(tmp_path, change, problem):
    train(tmp_path, range(1, 6), 2)
    path = tmp_path / "ledger" / "data-0000.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    problems = check_ledger(tmp_path, 5, 8).problems
    assert any(problem in text for text in problems), problems


def test_the_ledger_of_a_rank_that_is_gone_is_missed(tmp_path):
    train(tmp_path, range(1, 3), 2)
    (tmp_path / "ledger" / "data-0001.jsonl").unlink()
    assert "step 1: samples up to 3 instead of 7 were read" in check_ledger(tmp_path, 2, 8).problems[0]


def test_only_one_rank_of_each_share_writes(tmp_path):
    ledger = Ledger(tmp_path, 0, is_writer=False)
    ledger.add(1, [batch(0, 1)])
    ledger.write(ledger.take())
    assert not (tmp_path / "ledger").exists()


def test_skipped_steps_are_counted(tmp_path):
    ledger = Ledger(tmp_path, 0, True)
    ledger.add(1, [batch(0, 1)], skipped=True)
    ledger.write(ledger.take())
    assert check_ledger(tmp_path, 1, 2).skipped_steps == 1


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "data-0000.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(LedgerError, match="symbolic link"):
        rewind_ledger(tmp_path, 0)
