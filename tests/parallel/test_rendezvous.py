"""Launchers' variables: translated, checked, and the meeting refused by name (fault catalogue 32)."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Command

from lightbulb.parallel.rendezvous import (
    LaunchError,
    Place,
    adopt_environment,
    first_host,
    interface_towards,
    meet,
    read_place,
)

SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def test_srun_is_translated() -> None:
    environment = dict(SLURM)
    adopt_environment(environment)
    assert read_place(environment) == Place(5, 8, "gpu07", 20_000 + 123_456 % 10_000)
    assert (environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("1", "4")


def test_what_is_set_is_kept() -> None:
    environment = SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    adopt_environment(environment)
    assert read_place(environment) == Place(5, 8, "10.0.0.1", 1234)
    torchrun = SLURM | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    adopt_environment(torchrun)
    assert read_place(torchrun) == Place(0, 2, "here", 1)


def test_a_step_of_a_larger_job_counts_its_own_tasks() -> None:
    environment = SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_ID": "2"}
    adopt_environment(environment)
    assert read_place(environment) == Place(5, 6, "gpu08", 20_000 + 123_458 % 10_000)


def test_one_task_and_no_launcher_are_one_process() -> None:
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"WORLD_SIZE": "1"}):
        adopt_environment(environment)
        assert read_place(environment) is None


def test_mpirun_is_translated_and_asks_for_an_address_over_machines() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    adopt_environment(mpi)
    assert read_place(mpi) == Place(1, 2, "127.0.0.1", 29_500)
    spread = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(LaunchError, match="-x MASTER_ADDR"):
        adopt_environment(spread)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[03-07,12],login", "gpu03"),
        ("gpu7", "gpu7"),
        ("a1,a2", "a1"),
        ("rack[2]-node[1-4]", "rack2-node"),
        ("n[5]", "n5"),
    ],
)
def test_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_gloo_uses_the_interface_that_reaches_the_first_rank() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "2"}, "RANK 2 is outside WORLD_SIZE 2"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; it must be 1 to 65535"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(changes: dict[str, str | None], words: str) -> None:
    whole: dict[str, str | None] = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment = {name: value for name, value in (whole | changes).items() if value is not None}
    with pytest.raises(LaunchError, match=words):
        read_place(environment)


def test_a_taken_port_an_unknown_host_and_a_silent_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBULB_START_SECONDS", "1.5")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        _set(monkeypatch, 1, port)
        begin = time.monotonic()
        with pytest.raises(LaunchError, match=rf"127.0.0.1:{port} \(MASTER_ADDR, MASTER_PORT\) did not answer"):
            meet(Place(1, 2, "127.0.0.1", port), print)
        assert time.monotonic() - begin < 10.0
        taken.listen()
        _set(monkeypatch, 0, port)
        with pytest.raises(LaunchError, match=rf"port {port} \(MASTER_PORT\) is in use"):
            meet(Place(0, 2, "127.0.0.1", port), print)
    with pytest.raises(LaunchError, match="MASTER_ADDR 'no-such-host.invalid' is no known host"):
        meet(Place(1, 2, "no-such-host.invalid", 29_500), print)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBULB_START_SECONDS", "1.5")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _set(monkeypatch, 0, port)
    with pytest.raises(LaunchError, match="rank 1, 2 of 3 did not arrive"):
        meet(Place(0, 3, "127.0.0.1", port), print)


def _set(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


def test_two_tasks_of_srun_train_together(
    start: Callable[..., Command], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, job = run_file(), str(time.monotonic_ns() % 10_000)
    tasks = [
        start("pretrain", [str(path)], SLURM_PROCID=str(task), SLURM_NTASKS="2", SLURM_LOCALID=str(task),
              SLURM_NODELIST="localhost", SLURM_JOB_ID=job)
        for task in range(2)
    ]  # fmt: skip
    for task in tasks:
        assert task.wait() == 0, task.text()
    assert "TP1xPP1xEP1xDP2" in (tmp_path / "run" / "summary.json").read_text()
