"""The pool of ranks: results, failures, deaths and deadlocks."""

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightbulb.parallel.workers import JobError, JobTimeout, RankDied, RankPool


def add_ranks(rank: int, offset: float) -> tuple[float, int, int]:
    total = torch.tensor(offset + rank)
    dist.all_reduce(total)
    return float(total), dist.get_world_size(), torch.get_num_threads()


def threads_of_the_fork_server(rank: int) -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").iterdir()]


def raise_on_rank(rank: int, guilty: int) -> None:
    if rank == guilty:
        raise KeyError("the cause")
    dist.barrier()


def die_on_rank(rank: int, guilty: int) -> None:
    if rank == guilty:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_forever(rank: int) -> None:
    if rank == 0:
        dist.barrier()
    threading.Event().wait()


def return_a_lock(rank: int) -> object:
    return threading.Lock()


def assert_usable(ranks: RankPool) -> None:
    assert ranks.run(2, add_ranks, 0.0) == [(1.0, 2, 1)] * 2


def test_each_job_has_a_group_of_its_own_size(ranks: RankPool) -> None:
    for world_size, expected in ((4, 10.0), (2, 3.0), (1, 1.0), (3, 6.0)):
        assert ranks.run(world_size, add_ranks, 1.0) == [(expected, world_size, 1)] * world_size


def test_jobs_are_quick_and_fork_from_one_thread(ranks: RankPool) -> None:
    (threads,) = ranks.run(1, threads_of_the_fork_server)
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1  # pyarrow's, which knows about forks
    started = time.monotonic()
    for _ in range(5):
        ranks.run(2, add_ranks, 0.0)
    assert time.monotonic() - started < 10.0


def test_exception_names_rank_cause_and_line(ranks: RankPool) -> None:
    with pytest.raises(JobError, match="rank 1 of 4: raise_on_rank: KeyError: 'the cause'") as caught:
        ranks.run(4, raise_on_rank, 1)
    assert caught.value.rank == 1
    assert 'raise KeyError("the cause")' in str(caught.value)
    assert_usable(ranks)


def test_killed_rank_is_named_within_seconds(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(RankDied, match=r"rank 2 \(pid \d+\) died during die_on_rank: killed by SIGKILL") as caught:
        ranks.run(4, die_on_rank, 2)
    assert time.monotonic() - started < 10.0
    assert caught.value.rank == 2
    assert_usable(ranks)


def test_rank_killed_from_outside_while_idle(ranks: RankPool) -> None:
    assert_usable(ranks)
    os.kill(ranks.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(RankDied, match="rank 0"):
        ranks.run(2, add_ranks, 0.0)
    assert_usable(ranks)


def test_deadlock_ends_and_shows_where_each_rank_stood(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(JobTimeout, match="no answer from rank 0, 1 within 2 s") as caught:
        ranks.run(2, wait_forever, timeout_seconds=2.0)
    assert time.monotonic() - started < 15.0
    assert "in barrier" in str(caught.value)
    assert str(caught.value).count("in wait_forever") == 2
    assert_usable(ranks)


def test_failed_job_leaves_no_process(ranks: RankPool) -> None:
    assert_usable(ranks)
    before = ranks.pids
    with pytest.raises(JobError):
        ranks.run(4, raise_on_rank, 0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    assert_usable(ranks)


def test_what_cannot_be_sent_is_an_error_of_the_caller(ranks: RankPool) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="pickle"):
        ranks.run(1, lambda rank: rank)
    with pytest.raises(JobError, match="pickle"):
        ranks.run(1, return_a_lock)
    with pytest.raises(ValueError, match=r"world_size 5 is outside 1\.\.4"):
        ranks.run(5, add_ranks, 0.0)
    assert_usable(ranks)
