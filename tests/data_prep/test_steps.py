"""The frame: a task's folder is whole or absent, keys follow what they depend on, workers that die are noticed."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from rich.progress import Progress

from lightbulb.data_prep.config import ExecutorConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.executor import ExecutorError
from lightbulb.data_prep.step import Output, Step, Task, perform
from lightbulb.data_prep.work import Work
from lightbulb.folder import FolderError


@dataclass(frozen=True)
class Squares(Step):
    """One task per number; ``fault`` names what goes wrong at the number 2, and 4 then takes long."""

    numbers: tuple[int, ...]
    factor: int = 1
    fault: str = ""
    name = "squares"
    title = "Squares"

    def settings(self) -> Any:
        return self.factor

    def parts(self) -> Sequence[Any]:
        return self.numbers

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        number = self.numbers[rank]
        (task.out / "deep").mkdir()
        (task.out / "deep" / "square.txt").write_text(str(self.factor * number * number))
        if number == 2 and self.fault == "raise":
            raise ValueError("two is one too many")
        if number == 2 and self.fault == "refuse":
            raise CorpusError("two is no number; take three")
        if number == 2 and self.fault in ("die", "crash"):
            os.kill(os.getpid(), {"die": signal.SIGKILL, "crash": signal.SIGSEGV}[self.fault])
        if number == 4 and self.fault:
            time.sleep(120)
        heavy = sorted({"torch", "streaming", "transformers"} & sys.modules.keys())
        return {"pid": os.getpid(), "threads": task.threads, "heavy": heavy}


def work_in(folder: Path, workers: int = 1) -> Work:
    folder.mkdir(exist_ok=True)
    return Work(folder, ExecutorConfig(workers=workers), Progress(disable=True))


def squares(output: Output) -> list[int]:
    return [int((folder / "deep" / "square.txt").read_text()) for folder in output.folders]


def test_finished_tasks_are_not_done_again(tmp_path: Path) -> None:
    first = work_in(tmp_path / "w").run(Squares((1, 2, 3)))
    times = [(folder / "report.json").stat().st_mtime_ns for folder in first.folders]
    again = work_in(tmp_path / "w").run(Squares((3, 1, 2)))
    assert squares(first) == [1, 4, 9] and squares(again) == [9, 1, 4]
    assert {(folder / "report.json").stat().st_mtime_ns for folder in again.folders} == set(times)


def test_other_settings_give_other_tasks_and_the_old_ones_are_removed(tmp_path: Path) -> None:
    work_in(tmp_path / "w").run(Squares((1, 2)))
    work = work_in(tmp_path / "w")
    output = work.run(Squares((2, 3), factor=10))
    assert squares(output) == [40, 90]
    work.remove_unused()
    assert sorted((tmp_path / "w" / "squares").iterdir()) == sorted(output.folders)


def test_a_task_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two is one too many"):
        work_in(tmp_path / "w").run(Squares((1, 2, 3), fault="raise"))
    assert len(list((tmp_path / "w" / "squares").iterdir())) == 1
    assert squares(work_in(tmp_path / "w").run(Squares((1, 2, 3)))) == [1, 4, 9]


def test_tasks_in_other_processes(tmp_path: Path) -> None:
    output = work_in(tmp_path / "w", workers=2).run(Squares((1, 2, 3, 4)))
    assert squares(output) == [1, 4, 9, 16]
    assert os.getpid() not in {report["pid"] for report in output.reports}
    assert {report["threads"] for report in output.reports} == {1}
    assert not any(report["heavy"] for report in output.reports)
    [alone] = work_in(tmp_path / "w", workers=2).run(Squares((5,))).reports
    assert (alone["pid"], alone["threads"]) == (os.getpid(), 2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"^squares: ValueError: two is one too many\nTraceback [\s\S]*in run_task"),
        ("refuse", "^squares: CorpusError: two is no number; take three$"),
        (
            "die",
            r"^squares: task 3 of 4 was killed \(SIGKILL\), .* lower executor.workers \(now 2\) .* goes on from here$",
        ),
        ("crash", "^squares: task 3 of 4 was ended by signal SIGSEGV; run the command again"),
    ],
)
def test_failures_in_other_processes_are_told(tmp_path: Path, fault: str, message: str) -> None:
    begin, threads = time.monotonic(), threading.enumerate()
    with pytest.raises(ExecutorError, match=message):
        work_in(tmp_path / "w", workers=2).run(Squares((1, 4, 2, 3), fault=fault))
    assert time.monotonic() - begin < 60
    assert threading.enumerate() == threads and not multiprocess.active_children()  # or the command might never end
    assert squares(work_in(tmp_path / "w", workers=2).run(Squares((1, 2, 3, 4)))) == [1, 4, 9, 16]
    assert not list((tmp_path / "w" / "squares").glob(".*"))


def test_the_same_task_finished_by_another_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "key"
    for _ in range(2):
        perform(Squares((7,)), 0, final, 1, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "squares").write_text("in the way")
    with pytest.raises(FolderError, match="squares: a file stands where a folder is needed"):
        work_in(tmp_path).run(Squares((1,)))
