"""How the ranks of a job find each other: the launchers' environment variables, checked, then a meeting at one port.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Where RANK is absent, those of
``srun`` and ``mpirun`` are translated. What cannot work is refused by name before anything waits.
"""

import errno
import os
import re
import socket
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch.distributed as dist

START_SECONDS = "LIGHTBULB_START_SECONDS"
"""Variable: how long a rank waits for the others to arrive; nodes may be started by hand, minutes apart."""
_START_DEFAULT = 300.0
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000  # for batch systems, which name no port; below Linux's ephemeral ones


class LaunchError(RuntimeError):
    """Ranks that cannot meet; the message names the variables, their values and the fix."""


class Place(NamedTuple):
    """This process among the ranks, and where they meet."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


def adopt_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_* from what srun or mpirun set.

    Nothing happens where RANK is set, or for a job of one task.

    Raises:
        LaunchError: the ranks of several machines are known but not where they meet.
    """
    if "RANK" in environment:
        return
    for translate in (_from_slurm, _from_openmpi):
        if found := translate(environment):
            for name, value in found.items():
                environment.setdefault(name, value)
            return


def _from_slurm(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    if "SLURM_PROCID" not in environment or tasks == "1":
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    if not nodes and "MASTER_ADDR" not in environment:
        raise LaunchError(
            f"SLURM_PROCID is {environment['SLURM_PROCID']} of {tasks} tasks, but neither SLURM_STEP_NODELIST nor "
            "SLURM_NODELIST says where they are; set MASTER_ADDR to the first node"
        )
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or tasks
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", per_node)[0],  # "2(x3),1": the largest share comes first
        "MASTER_ADDR": first_host(nodes) if nodes else "",
        "MASTER_PORT": str(_FIRST_PORT + job % _NUM_PORTS),
    }


def _from_openmpi(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    size = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if "OMPI_COMM_WORLD_RANK" not in environment or size == "1":
        return None
    local_size = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if "MASTER_ADDR" not in environment and local_size != size:
        raise LaunchError(
            "mpirun started ranks on several machines without saying where they meet; pass the first machine's "
            "address: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..."
        )
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        "LOCAL_WORLD_SIZE": local_size or size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: ``"gpu[03-07,12],login"`` begins with ``gpu03``."""
    match = re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def read_place(environment: MutableMapping[str, str] = os.environ) -> Place | None:
    """Where this process stands by its environment; None when it is alone.

    Raises:
        LaunchError: a variable is missing, is no number or contradicts another.
    """
    if "RANK" not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise LaunchError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']} but RANK is not set; start ranks with deepspeed, torchrun "
                "or srun, or unset WORLD_SIZE to train with one process"
            )
        return None
    rank, world_size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if rank >= world_size:
        raise LaunchError(f"RANK {rank} is outside WORLD_SIZE {world_size}; are the variables left from another start?")
    if world_size == 1:
        return None
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise LaunchError(f"RANK is {rank} of {world_size} but MASTER_ADDR is not set; set it to the address of rank 0")
    return Place(rank, world_size, address, _number(environment, "MASTER_PORT", 1, 65_535))


def _number(environment: MutableMapping[str, str], name: str, lowest: int, highest: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        raise LaunchError(f"RANK is set but {name} is not; start with deepspeed, torchrun or srun, or set {name}")
    try:
        value = int(text)
    except ValueError:
        raise LaunchError(f"{name} is {text!r}, which is no whole number") from None
    if value < lowest or (highest is not None and value > highest):
        limits = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise LaunchError(f"{name} is {value}; it must be {limits}")
    return value


def meet(place: Place, say: Callable[[str], None]) -> dist.Store:
    """The ranks' common store, once all of them have arrived.

    Args:
        place: see :func:`read_place`.
        say: told what the rank waits for, once it has waited a while.

    Raises:
        LaunchError: the port is taken, the address unknown or unreachable, or ranks did not arrive in time.
    """
    seconds = float(os.environ.get(START_SECONDS, _START_DEFAULT))
    end = time.monotonic() + seconds
    where = f"{place.master_addr}:{place.master_port} (MASTER_ADDR, MASTER_PORT)"
    if place.rank > 0:
        _reach(place, end, f"rank 0 at {where}", say)
    try:
        timeout = timedelta(seconds=max(end - time.monotonic(), 1.0))
        has_store = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun holds one
        port = dist.TCPStore(*place[2:], place.world_size, has_store, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise LaunchError(
                f"rank {place.rank}: port {place.master_port} (MASTER_PORT) is in use, perhaps by another job; choose "
                "another one (deepspeed --master_port, torchrun --master-port)"
            ) from None
        raise LaunchError(f"rank {place.rank}: cannot meet the other ranks at {where}: {_first_line(error)}") from None
    # a restart under one torchrun meets at the same port again, with what the last attempt left there
    store = dist.PrefixStore(f"lightbulb/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", port)
    _await_all(store, place, end, seconds, where)
    if interface := interface_towards(place.master_addr):
        # by itself gloo takes the address of the host's name, which many systems resolve to the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store


def interface_towards(host: str) -> str | None:
    """Name of the network interface whose address this machine uses to reach a host; nothing is sent."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            ours = probe.getsockname()[0]
    except OSError:
        return None
    names = psutil.net_if_addrs().items()
    return next((name for name, listed in names if any(entry.address == ours for entry in listed)), None)


def _reach(place: Place, end: float, what: str, say: Callable[[str], None]) -> None:
    """Wait until something listens at the meeting place."""
    said, begin = False, time.monotonic()
    while True:
        try:
            with socket.create_connection((place.master_addr, place.master_port), timeout=5.0):
                return
        except socket.gaierror as error:
            raise LaunchError(
                f"rank {place.rank}: MASTER_ADDR {place.master_addr!r} is no known host ({error.strerror}); "
                "give the first machine's address"
            ) from None
        except OSError as error:
            cause = os.strerror(error.errno) if error.errno else str(error)
            if error.errno == errno.EADDRNOTAVAIL or time.monotonic() > end:
                raise LaunchError(
                    f"rank {place.rank}: {what} did not answer within {time.monotonic() - begin:.0f} s ({cause}); "
                    f"start rank 0 there, open the port, or wait longer with {START_SECONDS}"
                ) from None
            if not said and time.monotonic() > begin + 15.0:
                say(f"rank {place.rank} waits for {what}: {cause}")
                said = True
        time.sleep(0.2)


def _await_all(store: dist.Store, place: Place, end: float, seconds: float, where: str) -> None:
    """Return when every rank has arrived at the store."""
    names = [f"arrived/{rank}" for rank in range(place.world_size)]
    store.set(names[place.rank], "1")
    try:
        store.wait(names, timedelta(seconds=max(end - time.monotonic(), 1.0)))
    except (dist.DistError, RuntimeError):
        missing = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
        raise LaunchError(
            f"rank {place.rank}: rank {missing} of {place.world_size} did not arrive at {where} within {seconds:g} s; "
            f"start all ranks, with the same WORLD_SIZE, or wait longer with {START_SECONDS}"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
