"""A session whose tests leave processes, threads and hooks behind ends all the same, with its own status."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CONFTEST = """
import session_end
session_end.GRACE_SECONDS, session_end.STACK_SECONDS, session_end.END_SECONDS = 0.1, 0.5, 1.5
"""
ORPHAN = """
import subprocess
def test_it():
    subprocess.run(["bash", "-c", "setsid sleep 77 & echo $! > pid.txt"], check=True)
"""
PASSES = "def test_it():\n    pass\n"
ENDS = {  # exit codes of sessions, and what gives them: tests, hooks of the conftest
    0: (PASSES, ""),
    1: ("def test_it():\n    assert False\n", ""),
    2: ("raise ValueError('while tests are collected')\n", ""),
    3: (PASSES, "def pytest_runtest_protocol():\n    raise ValueError('in a plugin')\n"),
    4: (PASSES, "import pytest\ndef pytest_collection():\n    raise pytest.UsageError('no such test')\n"),
    5: ("", ""),
    7: ("import pytest\ndef test_it():\n    pytest.exit('enough', returncode=7)\n", ""),
}
HANG = 77
HANGS = {
    "thread": f"threading.Thread(target=time.sleep, args=({HANG},)).start()",
    "hook": f"atexit.register(time.sleep, {HANG})",
}


def run(folder: Path, test: str, conftest: str = CONFTEST) -> subprocess.CompletedProcess[str]:
    """A session of its own; its output goes to a file, as a process left behind would keep a pipe open."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text(test)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with (folder / "output.txt").open("w+") as output:
        command = [sys.executable, "-m", "pytest", "-p", "session_end", "-p", "no:cacheprovider", "-q"]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True, timeout=70)
        done.stdout = (folder / "output.txt").read_text()
    return done


@pytest.mark.parametrize(("hang", "passes"), [("thread", False), ("hook", True)])
def test_a_hang_at_the_end_is_ended_and_explained(tmp_path: Path, hang: str, passes: bool) -> None:
    done = run(tmp_path, f"import atexit, threading, time\ndef test_it():\n    {HANGS[hang]}\n    assert {passes}\n")
    assert done.returncode == (0 if passes else 1), done.stdout
    assert "did not end within 1.5 s" in done.stdout and "most recent call first" in done.stdout


@pytest.mark.parametrize("code", ENDS)
def test_no_exit_code_is_lost_with_the_interpreter(tmp_path: Path, code: int) -> None:
    """The interpreter never ends by itself here: the code is the one that the session's end gives."""
    test, hooks = ENDS[code]
    hangs = f"import atexit, time\natexit.register(time.sleep, {HANG})\n"
    done = run(tmp_path, test, CONFTEST.replace("1.5", "0.3") + hangs + hooks)
    assert done.returncode == code, done.stdout
    assert "did not end within 0.3 s" in done.stdout


@pytest.mark.timeout(60)
def test_a_process_without_a_parent_is_named_and_killed(tmp_path: Path) -> None:
    done = run(tmp_path, ORPHAN)
    pid = int((tmp_path / "pid.txt").read_text())
    assert done.returncode == 0 and f"\n{pid} (parent" in done.stdout, done.stdout
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
