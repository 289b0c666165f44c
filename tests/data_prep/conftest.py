"""A shard writer without its process: this one has imported streaming already."""

from collections.abc import Callable

import pytest

from lightbulb.data_prep.write import run
from lightbulb.data_prep.writer import Job, ShardWriter


class InProcessWriter(ShardWriter):
    def start(self) -> None:
        pass

    def write(self, job: Job, progress: Callable[[int], None]) -> int:
        return run(job, progress)


@pytest.fixture(scope="session")
def writer() -> ShardWriter:
    return InProcessWriter()
