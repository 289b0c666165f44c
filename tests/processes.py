"""Real commands in real processes, without importing the stack anew for each.

A command's ranks are forked from one server that has everything imported; each is an ordinary process: it joins gloo
groups through the environment variables the launchers set, can be sent signals, and can be killed.
"""

import io
import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightbulb.launcher.pretrain", "lightbulb.launcher.preprocess"])


class Command:
    """One command running as ``world_size`` processes; their output goes to one file.

    ``own_arguments`` are further arguments of each rank.
    """

    def __init__(
        self,
        name: str,
        argv: list[str],
        world_size: int,
        environment: dict[str, str],
        output: Path,
        own_arguments: Sequence[list[str]] = (),
    ):
        port = _free_port()
        self.output = output
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            variables = dict(environment)
            if world_size > 1:
                variables |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            all_arguments = [*argv, *(own_arguments[rank] if own_arguments else [])]
            process = _CONTEXT.Process(target=_run_command, args=(name, all_arguments, variables, str(output)))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120.0) -> int:
        """Exit code of the first rank that failed (negative signal number), or 0. Ends the others when one fails."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                self.kill()
                pytest.fail(f"a rank still ran after {timeout} s; output:\n{self.text()}")
        return next((p.exitcode for p in self.processes if p.exitcode), 0) or 0

    def kill(self) -> None:
        """kill -9 every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def text(self) -> str:
        """Everything the ranks printed."""
        return self.output.read_text()


def _run_command(name: str, argv: list[str], environment: dict[str, str], output: str) -> None:
    """In the new process: run the command's main with its own environment and output file."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Python's own streams still point at what the server inherited, which a test runner may have closed.
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    sys.exit(import_module(f"lightbulb.launcher.{name}").main(argv))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
