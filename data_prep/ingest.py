"""The first step: sources to documents. Each file is read once, cleaned, and written down with its hashes.

Whole files are laid end to end and cut into tasks of about ``task_bytes``, so that the number of tasks depends on the
input alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightbulb.data_prep.clean import cleaned
from lightbulb.data_prep.config import CleanConfig, SourceConfig, TextConfig
from lightbulb.data_prep.counts import CorpusError, Counts
from lightbulb.data_prep.documents import DocumentWriter
from lightbulb.data_prep.files import InputFile, check_unchanged, describe_source, file_digest, list_files
from lightbulb.data_prep.read import read_file
from lightbulb.data_prep.step import Output, Step, Task, digest


@dataclass(frozen=True)
class Input:
    """One file to read: the number of its source, the file and the hash of its content."""

    source: int
    file: InputFile
    digest: str


@dataclass(frozen=True)
class Read(Step):
    """Read and clean every file; reports documents, bytes, what was repaired and dropped, per source."""

    sources: tuple[SourceConfig, ...]
    clean: CleanConfig
    inputs: tuple[Input, ...]
    task_bytes: int

    name = "read"
    title = "Reading kB"
    version = 2

    def settings(self) -> Any:
        return self.clean.model_dump(mode="json")

    def parts(self) -> Sequence[Any]:
        return [
            {
                # Not the path: a corpus that is moved is the same corpus.
                "sources": [[i, self.sources[i].model_dump(mode="json", exclude={"path"})] for i in _sources(task)],
                "files": [[item.source, item.file.name, item.digest] for item in task],
            }
            for task in self.tasks
        ]

    def sizes(self) -> Sequence[int]:
        return [sum(item.file.bytes for item in task) // 1000 for task in self.tasks]

    @cached_property
    def tasks(self) -> list[list[Input]]:
        """The files of each task."""
        tasks: list[list[Input]] = []
        size = self.task_bytes
        for item in self.inputs:
            if size >= self.task_bytes:
                tasks.append([])
                size = 0
            tasks[-1].append(item)
            size += item.file.bytes
        return tasks

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        counts: dict[int, Counts] = defaultdict(Counts)
        done = 0
        with DocumentWriter(task.out) as writer:
            for item in self.tasks[rank]:
                found = counts[item.source]
                for document in read_file(self.sources[item.source], item.file, self.clean, found):
                    if (kept := cleaned(document, self.clean, found)) is not None:
                        found.documents += 1
                        found.bytes += writer.add(item.source, kept)
                check_unchanged(item.file)
                done += item.file.bytes
                if done >= 100_000:
                    task.advance(done // 1000)
                    done %= 1000
            domains = writer.domains
        return {
            "documents": sum(found.documents for found in counts.values()),
            "domains": domains,
            "sources": {str(number): found.to_json() for number, found in counts.items()},
        }


def inputs_of(sources: Sequence[SourceConfig]) -> tuple[Input, ...]:
    """Every file of every source, hashed.

    Raises:
        CorpusError: a source has nothing to read.
    """
    return tuple(
        Input(number, file, file_digest(file)) for number, source in enumerate(sources) for file in list_files(source)
    )


def inputs_digest(inputs: Sequence[Input]) -> str:
    """Hash of everything that is read, names and contents."""
    return digest([[item.source, item.file.name, item.digest] for item in inputs])


def source_counts(read: Output, sources: Sequence[SourceConfig]) -> list[Counts]:
    """What each source gave over all tasks.

    Raises:
        CorpusError: a source gave no document.
    """
    counts = [Counts() for _ in sources]
    for report in read.reports:
        for number, values in report["sources"].items():
            counts[int(number)].add(values)
    for source, found in zip(sources, counts, strict=True):
        if found.documents == 0:
            fix = "set sources.delimiter for long files" if isinstance(source, TextConfig) else "check what it holds"
            dropped = found.describe_dropped() or "nothing"
            raise CorpusError(f"source {describe_source(source)}: no usable document; dropped {dropped}; {fix}")
    return counts


def _sources(task: Sequence[Input]) -> list[int]:
    return sorted({item.source for item in task})
