"""Rows to MDS shards: the one place that writes through mosaicml-streaming.

A domain's folder holds ``index.json`` and ``shard.*.mds``; the index carries a hash of every shard, without which
the reader refuses the folder.

Importing streaming takes about ten seconds, so this file runs as a process of its own beside reading and tokenising
(:mod:`lightbulb.data_prep.writer` starts it): one JSON :class:`Job` per line comes in; how many rows are written
goes out, a line of JSON at a time.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson
from streaming import MDSWriter

from lightbulb.data_prep.tokenise import Row, pack, read_documents
from lightbulb.data_prep.writer import SHARD_HASH, Job
from lightbulb.folder import FolderError, explained

REPORT_ROWS = 256


def write_rows(
    folder: Path,
    rows: Iterator[Row],
    context_length: int,
    token_dtype: str,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> int:
    """Write rows as MDS shards of at most about ``shard_bytes``; gives the number of rows.

    Raises:
        FolderError: the disk is full or not writable.
    """
    length = context_length + 1
    number_dtype = "uint16" if length < 1 << 16 else "uint32"
    columns = {"tokens": f"ndarray:{token_dtype}:{length}", "document_ids": f"ndarray:{number_dtype}:{length}"}
    count = 0
    with (
        explained(folder, shard_bytes),
        MDSWriter(out=str(folder), columns=columns, hashes=[SHARD_HASH], size_limit=shard_bytes) as writer,
    ):
        for row in rows:
            writer.write(
                {"tokens": row.tokens.astype(token_dtype), "document_ids": row.document_ids.astype(number_dtype)}
            )
            count += 1
            if count % REPORT_ROWS == 0:
                progress(REPORT_ROWS)
    progress(count % REPORT_ROWS)
    return count


def run(job: Job, progress: Callable[[int], None]) -> int:
    """Pack and write one domain of one split; gives the number of rows."""
    documents = read_documents(Path(job.tokens), Path(job.lengths), job.dtype, job.shuffle_seed)
    rows = pack(documents, job.context_length, job.pad_with)
    return write_rows(Path(job.folder), rows, job.context_length, job.dtype, job.shard_bytes, progress)


def main(answers: BinaryIO) -> None:
    """Do the jobs that come in, until the other side closes the pipe or is gone."""

    def say(message: dict[str, int | str]) -> None:
        try:
            answers.write(orjson.dumps(message) + b"\n")
            answers.flush()
        except BrokenPipeError:
            # The other side is gone and its claim with it: leave without touching the folder again.
            os._exit(1)

    for line in sys.stdin.buffer:
        try:
            say({"done": run(Job(**orjson.loads(line)), lambda rows: say({"rows": rows}))})
        except FolderError as error:
            say({"error": str(error)})


if __name__ == "__main__":
    main(os.fdopen(int(sys.argv[1]), "wb"))
