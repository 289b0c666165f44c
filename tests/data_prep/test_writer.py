"""The writing process: what it says when it dies or cannot write."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from lightbulb.data_prep import writer as writer_module
from lightbulb.data_prep.tokenise import Row
from lightbulb.data_prep.write import write_rows
from lightbulb.data_prep.writer import Job, ShardWriter, WriterError
from lightbulb.folder import FolderError

JOB = Job("out", "tokens", "lengths", "uint16", 16, 4096, None, 0)


@pytest.mark.parametrize("module", ["lightbulb.no_such_module", "this"], ids=["fails", "prints_and_ends"])
def test_a_process_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(writer_module, "WRITER_MODULE", module)
    with (
        pytest.raises(WriterError, match=r"out: the process that writes shards ended with exit code"),
        ShardWriter() as w,
    ):
        w.write(JOB, lambda rows: None)


def test_process_is_not_started_without_work() -> None:
    with ShardWriter() as writer:
        assert writer._process is None


def test_rows_are_reported_and_hashed(tmp_path: Path) -> None:
    rows = (Row(np.full(9, i), np.ones(9, dtype=np.int64)) for i in range(600))
    seen: list[int] = []
    assert write_rows(tmp_path / "d", rows, 8, "uint16", 4096, seen.append) == sum(seen) == 600
    index = orjson.loads((tmp_path / "d" / "index.json").read_bytes())
    assert all(shard["raw_data"]["hashes"].keys() == {"xxh64"} for shard in index["shards"])
    assert all(shard["raw_data"]["bytes"] <= 4096 for shard in index["shards"])


def test_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="a file stands where a folder is needed"):
        write_rows(tmp_path / "file" / "d", iter([]), 8, "uint16", 4096, lambda rows: None)


def test_jobs_and_errors_cross_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answering.py").write_text(
        "import json, os, sys\n"
        "with os.fdopen(int(sys.argv[1]), 'w') as answers:\n"
        "    for line in sys.stdin:\n"
        "        job = json.loads(line)\n"
        "        print('noise')\n"
        "        answer = {'error': 'disk full'} if job['folder'] == 'full' else {'done': job['context_length']}\n"
        "        answers.write(json.dumps({'rows': 5}) + chr(10) + json.dumps(answer) + chr(10))\n"
        "        answers.flush()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(writer_module, "WRITER_MODULE", "answering")
    seen: list[int] = []
    with ShardWriter() as writer:
        assert writer.write(JOB, seen.append) == 16
        with pytest.raises(FolderError, match="disk full"):
            writer.write(replace(JOB, folder="full"), seen.append)
        assert writer.write(replace(JOB, context_length=7), seen.append) == 7
    assert seen == [5, 5, 5]
