"""The processes that launched this one, so that no rank outlives them.

deepspeed and torchrun end their ranks when they are asked to stop, but not when they are killed: the ranks would hold
devices and the run folder until somebody finds them. Only launchers are watched. A shell, a terminal or a batch
script may end while a run goes on in the background.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath

import psutil

POLL_SECONDS = 1.0
GRACE_SECONDS = 20.0
"""From the launcher's end to this process's, for a last checkpoint."""
EXIT_CODE = 128 + signal.SIGHUP
"""Exit code of a rank that could not stop within the grace."""

_PROGRAMS = {"deepspeed", "torchrun", "pdsh"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"}
_SHELLS = {"sh", "bash", "dash", "zsh"}


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line starts ranks: ``deepspeed``, ``torchrun``, or ``lightbulb pretrain --restart``."""
    head = list(command[:5])
    names = [PurePath(word).name for word in head]
    if _PROGRAMS & set(names[:2]) or _MODULES & set(head):
        return True
    return "--restart" in command and bool({"lightbulb", "pretrain.py"} & set(names))


def launchers(process: psutil.Process | None = None) -> list[psutil.Process]:
    """The unbroken chain of launchers above a process, nearest first.

    The last one's ssh session belongs to it when the launcher is what was run over ssh, with no interactive shell
    between: the session ends with the machine that started the job.
    """
    chain: list[psutil.Process] = []
    try:
        above = (process or psutil.Process()).parents()
        for ancestor in above:
            if not is_launcher(ancestor.cmdline()):
                break
            chain.append(ancestor)
        rest = above[len(chain) :]
        if chain and rest and rest[0].name() in _SHELLS and "-c" in rest[0].cmdline()[1:3]:
            rest = rest[1:]
        if chain and rest and rest[0].name().startswith("sshd"):
            chain.append(rest[0])
    except psutil.Error:  # an ancestor ended while it was looked at, or belongs to somebody else
        pass
    return chain


class LauncherWatch:
    """Stops this process as SIGTERM does when one of its launchers is gone, and after a grace in any case."""

    def __init__(self) -> None:
        self._is_needed = True
        self._chain = {process: _name(process) for process in launchers()}
        if self._chain:
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()

    def gone(self) -> psutil.Process | None:
        """A launcher that has ended."""
        return next((process for process in self._chain if not _lives(process)), None)

    def stand_down(self) -> None:
        """This process is ending by itself; a signal now would only spoil its exit code."""
        self._is_needed = False

    def _watch(self) -> None:
        while (gone := self.gone()) is None or not self._is_needed:
            time.sleep(POLL_SECONDS)
        rank = os.environ.get("RANK", "0")
        _say(f"rank {rank}: its launcher {self._chain[gone]} (pid {gone.pid}) is gone; saving and ending")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        _say(f"rank {rank}: no step boundary within {GRACE_SECONDS:g} s of that; ending without saving")
        os._exit(EXIT_CODE)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        words = [PurePath(word).name for word in process.cmdline()[:5]]
        return next((word for word in words if word in _PROGRAMS | _MODULES), process.name())
    except psutil.Error:
        return "process"


def _say(sentence: str) -> None:
    """To stderr, if anybody still reads it."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)
