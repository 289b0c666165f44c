"""How a rank ends: what it says about an error, and what it leaves for the process that may start it again."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Literal

from lightbulb.folder import write_atomically
from lightbulb.parallel.collective import is_lost_peer

Outcome = Literal["finished", "stopped", "refused"]
"""Of a whole job: complete; stopped by a signal after saving; ended by an error that a restart would only repeat."""


class Announced(Exception):
    """An error that :func:`announce` has already shown."""


def announce(
    error: Exception, expected: tuple[type[Exception], ...], agreed: tuple[type[Exception], ...] = ()
) -> Announced:
    """Say on stderr what ended this rank.

    It must be called before the process group is left: the other ranks fail when this one leaves, and their lines
    belong below the cause.

    Args:
        error: what was raised.
        agreed: errors every rank raises alike; one rank of each machine says them.
        expected: errors whose message is all there is to say; others come with their traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, agreed) and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return Announced()
    if isinstance(error, expected):
        text = f"error: {error}"
    elif is_lost_peer(error):
        text = f"error: rank {rank} lost its peers; the rank that ended first has the cause"
    else:
        trace = "".join(traceback.format_exception(error))
        text = f"{trace}error: rank {rank}: {type(error).__name__}: {error}"
    print(text, file=sys.stderr, flush=True)
    return Announced()


def write_outcome(path: Path | None, outcome: Outcome) -> None:
    """Tell the process that supervises this job (``--restart``) how it ended; rank 0 does it for all."""
    if path is not None and os.environ.get("RANK", "0") == "0":
        write_atomically(path, json.dumps(outcome))


def read_outcome(path: Path) -> Outcome | None:
    """How the job ended; None when it could not say."""
    return json.loads(path.read_text()) if path.is_file() else None
