"""The end of a test session: what tests left running is named and killed, and the process ends whatever happens.

When the last summary line is printed every result is known, but the interpreter still joins threads and processes and
runs exit hooks of a dozen libraries. A hang there must not eat the time of whoever waits for the exit status.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

MARK = "LIGHTBULB_TEST_SESSION"
GRACE_SECONDS = 5.0  # for processes that are ending
STACK_SECONDS = 60.0
END_SECONDS = 90.0
ALARM_SECONDS = 120  # for a hang in which Python's threads no longer run

os.environ[MARK] = str(os.getpid())  # inherited also by those whose parents end and whom nobody would find otherwise


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kill what is left when all fixtures have been taken down."""
    left = [process for process in started() if not _is_server(process)]
    _, left = psutil.wait_procs(left, timeout=GRACE_SECONDS)
    session.config.stash[_LEFT] = [named(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("processes that tests left running (killed)")
        terminalreporter.write("\n".join(left) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """From here on the process has ``END_SECONDS`` to end."""
    if _SESSION not in config.stash:  # only the usage was shown
        return
    faulthandler.dump_traceback_later(STACK_SECONDS, exit=False, file=sys.__stderr__)
    threading.Thread(target=_end, args=(config.stash[_SESSION],), name="session end", daemon=True).start()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(ALARM_SECONDS)


def started() -> Iterator[psutil.Process]:
    """Every process that this session or something it started has started, as far as it can be looked into."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid != os.getpid() and process.environ().get(MARK) == str(os.getpid())
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def named(process: psutil.Process) -> str:
    """One line about a process."""
    try:
        return f"{process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:300]}"
    except psutil.Error:
        return f"{process.pid}: has ended"


def _is_server(process: psutil.Process) -> bool:
    """Whether it is a helper of multiprocessing; what a fork server forked has its command but another parent."""
    command = " ".join(process.cmdline())
    return process.ppid() == os.getpid() and ("forkserver import main" in command or "tracker import main" in command)


def _end(session: pytest.Session) -> None:
    """End the process with pytest's own status: all results are known, only the interpreter's end is lost."""
    time.sleep(END_SECONDS)
    print(f"\nthe interpreter did not end within {END_SECONDS:g} s of the last test; still alive:", file=sys.__stderr__)
    for thread in threading.enumerate():
        print(f"  {thread}", file=sys.__stderr__)
    for process in started():
        print(f"  {named(process)}", file=sys.__stderr__)
        with contextlib.suppress(psutil.Error):
            process.kill()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(session.exitstatus)


_SESSION = pytest.StashKey[pytest.Session]()
_LEFT = pytest.StashKey[list[str]]()
