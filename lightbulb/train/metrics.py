"""What a run tells about itself: ``metrics.jsonl``, TensorBoard scalars and the console, from one record per step.

A record is a mapping with ``kind`` and ``step``; every other key is written as it comes. The keys known here::

    train  tokens (so far), loss (nats/token), bits_per_byte, balance_loss, router_z_loss, lr, grad_norm,
           clip_coefficient, skipped_steps, tokens_per_second, data_wait (share of the step's time spent waiting for
           batches), flops_per_second, peak_flops, mfu, memory_gib, eta_seconds,
           expert_load {layer: [share of each expert]}, router_entropy {layer: value},
           domain_tokens {domain: tokens so far}, group_epochs {group: passes so far} (of at most 64 groups),
           divergence (nats/token, from soft targets, where there are some)
    outer  number (of the round), tokens (so far), sent and received (bytes over all ranks), waited, seconds
    eval   held_out_loss, held_out_bpb, domain_loss {domain: value}, domain_bpb {domain: value}

Numbers that are not finite are written as null, so that every line is JSON. A train record whose experts are dead
or overloaded gains ``alarms``, a list of sentences.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import FileWriter

from lightbulb.folder import explained, write_atomically

FILE_NAME = "metrics.jsonl"
DEAD_BELOW = 0.1
"""An expert with less than this part of the uniform share is dead."""
OVERLOADED_ABOVE = 4.0
"""An expert with more than this multiple of the uniform share is overloaded."""
QUIET_STEPS = 50
"""One expert is warned about at most once in this many steps."""
MAX_NAMED = 8
"""One warning names at most this many experts; the file has them all."""


class MetricsWriter:
    """Writes the records of one run; on every rank but the writer's it does nothing.

    Args:
        run: run folder; ``metrics.jsonl`` and ``tensorboard/`` are written in it.
        total_steps: length of the progress bar.
        is_writer: True on exactly one rank.
        log_every: steps between two lines where the console is no terminal (a terminal gets a progress bar).
    """

    def __init__(self, run: Path, total_steps: int, is_writer: bool = True, log_every: int = 10):
        self.run = run
        self.is_writer = is_writer
        self._log: TextIO | None = None
        self._board: FileWriter | None = None
        self._purge_step: int | None = None
        self._console = _Console(total_steps, log_every)
        self._warned: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Drop what was written after ``step``: call it when a run resumes from there.

        Raises:
            FolderError: the file cannot be replaced; it is untouched then.
        ValueError: a line of the file is no JSON.
        """
        if not self.is_writer:
            return
        self._close_files()
        _keep_lines(self.run / FILE_NAME, step)
        self._warned.clear()
        # TensorBoard's old files stay; an event of this step hides theirs from here on
        self._purge_step = step + 1

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; values may be Python, NumPy or torch numbers and lists or mappings of them.

        Raises:
            ValueError: ``kind`` or ``step`` is missing.
            FolderError: the run folder cannot be written.
        """
        if not self.is_writer:
            return
        if "kind" not in record or "step" not in record:
            raise ValueError(f"a metrics record needs 'kind' and 'step'; it has {sorted(record)}")
        plain = _plain(record)
        alarms = self._new_alarms(plain)
        if alarms:
            plain["alarms"] = alarms
        self._append(plain)
        self._add_scalars(plain)
        self._console.show(plain)

    def close(self) -> None:
        """Flush and close everything; the next record opens it again."""
        self._console.close()
        self._close_files()

    def _close_files(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _append(self, record: dict[str, Any]) -> None:
        path = self.run / FILE_NAME
        with explained(path):
            if self._log is None:
                self.run.mkdir(parents=True, exist_ok=True)
                # a run that was killed while writing leaves half a line, to which ours must not be glued
                _keep_lines(path)
                self._log = path.open("a", encoding="utf-8")
            self._log.write(orjson.dumps(record).decode() + "\n")
            self._log.flush()

    def _add_scalars(self, record: dict[str, Any]) -> None:
        if self._board is None:
            self._board = FileWriter(str(self.run / "tensorboard"))
            if self._purge_step is not None:
                self._board.add_event(Event(session_log=SessionLog(status=SessionLog.START)), self._purge_step)
        # one event with all values; SummaryWriter's add_scalar writes one each, and a record cost four times as much
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        self._board.add_summary(Summary(value=values), record["step"])

    def _new_alarms(self, record: dict[str, Any]) -> list[str]:
        fresh = []
        for layer, shares in (record.get("expert_load") or {}).items():
            for flag in _flags(layer, shares, len(shares)):
                warned = self._warned.get((layer, flag.expert))
                if warned is None or record["step"] >= warned + QUIET_STEPS:
                    self._warned[layer, flag.expert] = record["step"]
                    fresh.append(flag)
        return _sentences(fresh)


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run in the order written; half a line at the end (a run that was killed) is left out.

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: a line that is not the last is no JSON object.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no {FILE_NAME} there; name the folder of a run that has trained a step")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield _parse(line, path, number)


def router_alarms(expert_load: Mapping[str, Sequence[float]], num_experts: int) -> list[str]:
    """One sentence per layer for its dead experts and one for its overloaded ones.

    Args:
        expert_load: layer to the share of routed tokens of each expert.
        num_experts: experts among which the tokens are shared out; the uniform share is one over it.
    """
    return _sentences([flag for layer, shares in expert_load.items() for flag in _flags(layer, shares, num_experts)])


class _Flag(NamedTuple):
    layer: str
    expert: int
    is_dead: bool
    times_uniform: float


def _flags(layer: str, shares: Sequence[float | None], num_experts: int) -> list[_Flag]:
    """The dead and overloaded experts of a layer; a share of None (not finite) says nothing."""
    loads = [(expert, share * num_experts) for expert, share in enumerate(shares) if share is not None]
    return [
        _Flag(layer, expert, load < DEAD_BELOW, load)
        for expert, load in loads
        if load < DEAD_BELOW or load > OVERLOADED_ABOVE
    ]


def _sentences(flags: Sequence[_Flag]) -> list[str]:
    groups: dict[tuple[str, bool], list[_Flag]] = {}
    for flag in flags:
        groups.setdefault((flag.layer, flag.is_dead), []).append(flag)
    sentences = []
    for (layer, is_dead), group in groups.items():
        experts = ", ".join(f"{flag.expert} ({flag.times_uniform:.2g}x)" for flag in group[:MAX_NAMED])
        rest = f" and {len(group) - MAX_NAMED} more" if len(group) > MAX_NAMED else ""
        limit = f"under {DEAD_BELOW:g}x" if is_dead else f"over {OVERLOADED_ABOVE:g}x"
        name = "dead" if is_dead else "overloaded"
        sentences.append(f"layer {layer}: {name} experts, {limit} the uniform share: {experts}{rest}")
    return sentences


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record in JSON's own types: arrays as lists, numbers that are not finite as None."""
    return orjson.loads(orjson.dumps(record, default=_as_list, option=orjson.OPT_NON_STR_KEYS))


def _as_list(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a metrics record cannot hold a {type(value).__name__}")


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number} is no JSON ({error}); remove the line") from None


def _keep_lines(path: Path, last_step: int | None = None) -> None:
    """Drop half a line at the end and, given a step, the records after it."""
    if not path.exists():
        return
    old = path.read_bytes()
    lines = [line for line in old.splitlines(keepends=True) if line.endswith(b"\n")]
    if last_step is not None:
        lines = [line for number, line in enumerate(lines, 1) if _parse(line, path, number)["step"] <= last_step]
    new = b"".join(lines)
    if new != old:
        write_atomically(path, new)


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """TensorBoard tags and values; of an expert load the two extremes, as multiples of the uniform share."""
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        if key == "expert_load":
            for layer, shares in value.items():
                known = [share * len(shares) for share in shares if share is not None]
                if known:
                    yield f"expert_load_max/{layer}", max(known)
                    yield f"expert_load_min/{layer}", min(known)
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", float(inner)) for name, inner in value.items() if _is_number(inner))
        elif _is_number(value):
            yield f"{record['kind']}/{key}", float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Console:
    """A progress bar with a line of numbers on a terminal, else a plain line every ``log_every`` steps."""

    def __init__(self, total_steps: int, log_every: int):
        self.total_steps = total_steps
        self.log_every = log_every
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._has_bar = sys.stdout.isatty() and self._console.is_interactive
        self._live: Live | None = None
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TaskProgressColumn())
        self._progress = Progress(*columns, console=self._console, expand=True)
        self._task = self._progress.add_task("", total=total_steps)

    def show(self, record: Mapping[str, Any]) -> None:
        for alarm in record.get("alarms", []):
            self._console.print(f"warning: {alarm}", style="yellow")
        if record["kind"] == "eval":
            self._console.print(_eval_line(record))
        if record["kind"] == "train" and self._has_bar:
            self._move_bar(record)
        elif record["kind"] == "train" and self._is_due(record["step"]):
            self._console.print(f"step {record['step']}/{self.total_steps}  {_train_line(record)}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_due(self, step: int) -> bool:
        return step <= 1 or step % self.log_every == 0 or step == self.total_steps

    def _move_bar(self, record: Mapping[str, Any]) -> None:
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._progress.update(self._task, completed=record["step"])
        self._live.update(Group(self._progress, Text(_train_line(record))))


def _train_line(record: Mapping[str, Any]) -> str:
    return _join(
        ("loss", _format(record, "loss", ".4f")),
        ("bpb", _format(record, "bits_per_byte", ".3f")),
        ("lr", _format(record, "lr", ".2e")),
        ("grad norm", _format(record, "grad_norm", ".3f")),
        ("", _format(record, "tokens_per_second", ",.0f", " tok/s")),
        ("", _format_flops(record.get("flops_per_second"))),
        ("MFU", _format(record, "mfu", ".1%")),
        ("", _format(record, "memory_gib", ".2f", " GiB")),
        ("ETA", _format_duration(record.get("eta_seconds"))),
        ("skipped", str(record.get("skipped_steps") or "")),
    )


def _eval_line(record: Mapping[str, Any]) -> str:
    return _join(
        ("step", str(record["step"])),
        ("held-out loss", _format(record, "held_out_loss", ".4f")),
        ("bits per byte", _format(record, "held_out_bpb", ".4f")),
    )


def _join(*parts: tuple[str, str]) -> str:
    return "  ".join(f"{name} {text}".strip() for name, text in parts if text)


def _format(record: Mapping[str, Any], key: str, spec: str, unit: str = "") -> str:
    """The number, "not finite" for null, and nothing for a key the record does not have."""
    if key not in record:
        return ""
    return "not finite" if record[key] is None else f"{record[key]:{spec}}{unit}"


def _format_flops(rate: float | None) -> str:
    if rate is None:
        return ""
    factor, prefix = next(((f, p) for f, p in ((1e15, "P"), (1e12, "T")) if rate >= f), (1e9, "G"))
    return f"{rate / factor:.3g} {prefix}FLOP/s"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
