"""The work folder of one corpus: ``<output>.work/<step>/<key>/``, a folder per finished task.

The run that holds the folder's lock is the only one that writes in it. What a run did not use (tasks of older
settings or inputs) is removed when the corpus is complete.
"""

import shutil
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightbulb.data_prep.config import ExecutorConfig
from lightbulb.data_prep.executor import Batch, execute
from lightbulb.data_prep.step import Output, Step
from lightbulb.folder import LOCK_NAME, explained


class Work:
    """Runs steps; the caller holds the folder's lock (:func:`lightbulb.folder.claim`)."""

    def __init__(self, folder: Path, executor: ExecutorConfig, progress: Progress):
        self.folder = folder
        self._executor = executor
        self._progress = progress
        self._used: set[Path] = set()
        with explained(folder):
            for path in folder.glob("*/.*.tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def run(self, step: Step) -> Output:
        """Do what is not done yet of a step.

        Raises:
            ExecutorError: a task failed in another process.
            Exception: whatever a task in this process raised.
        """
        folder = self.folder / step.name
        folders = [folder / key for key in step.task_keys()]
        self._used |= {folder, *folders}
        places = [rank for rank, path in enumerate(folders) if not path.exists()]
        if places:
            sizes = step.sizes() or [1] * len(folders)
            line = self._progress.add_task(step.title, total=sum(sizes), completed=sum(sizes))
            left = [sizes[rank] for rank in places]
            self._progress.update(line, completed=sum(sizes) - sum(left))

            def advance(place: int, amount: int) -> None:
                amount = left[place] if amount < 0 else min(amount, left[place])
                left[place] -= amount
                self._progress.advance(line, amount)

            with explained(folder):
                folder.mkdir(exist_ok=True)
            execute(
                Batch(step, places, [folders[rank] for rank in places]),
                self._executor,
                self.folder / "logs" / step.name,
                advance,
            )
            self._progress.update(line, completed=sum(sizes))
        return Output(tuple(folders))

    def remove_unused(self) -> None:
        """Remove the folders of tasks that this run did not need."""
        with explained(self.folder):
            for path in [*self.folder.glob("*/*"), *self.folder.iterdir()]:
                if path not in self._used and path.name != LOCK_NAME and path.parent.name != "logs":
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def display() -> Progress:
    """A line per step."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
