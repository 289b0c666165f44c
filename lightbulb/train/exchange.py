"""Branches that run as jobs of their own meet through files in a folder they share.

::

    round-00003/branch-1-rank-0000.safetensors   trunk of a branch; goes when the round is complete
                momentum-rank-0000.safetensors   of the outer optimizer; the newest round's is kept
                trunk-rank-0000.safetensors      what all have after the round
    branch-1.json                                how far a branch is

Round 0 is the start: the trunk of branch 0 becomes everyone's. Then, at each multiple of ``every`` steps, every branch
writes its trunk, branch 0 makes the outer step, and all take the result: so they are equal to the last bit whatever
computes them, and traffic grows with the number of branches, not with its square. Ranks keep to themselves: rank i of
a branch meets rank i of the others, which must have the same layout.

A branch that resumes from an older checkpoint finds the results of the rounds it goes through again, and is again
where it was; results are kept until no branch could resume before them. Each file has its final name when it is whole,
and a record with its size and hash beside it.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightbulb.folder import explained, write_atomically
from lightbulb.parallel.collective import agree
from lightbulb.parallel.engine import Engine
from lightbulb.train.faults import StopSignal, fault_point
from lightbulb.train.manifest import complete_checkpoints, step_of
from lightbulb.train.outer import OuterConfig, average, outer_step, trunk_names
from lightbulb.train.tensor_file import TensorFile, TensorFileError, stream_tensors, sync_file
from lightbulb.train.watchdog import Watchdog

log = logging.getLogger(__name__)

POLL_SECONDS = (0.002, 0.5)
"""Between two looks at the folder: at first, and at most."""
BEAT_SECONDS = 1.0
SAY_SECONDS = 60.0
_SHOWN = 4


class ExchangeError(RuntimeError):
    """Branches that cannot meet; the message names them and the fix."""


class Meeting(NamedTuple):
    """What a round cost this branch, over all its ranks.

    Attributes:
        number: the round.
        sent: bytes written for the others.
        received: bytes read.
        waited: seconds until the others were there.
        seconds: all it took.
    """

    number: int
    sent: int
    received: int
    waited: float
    seconds: float


class Exchange:
    """The folder, as one rank of one branch uses it. No communication but through files.

    Args:
        config: of this branch.
        rank: this process.
        layout: degrees and number of ranks, the same in every branch.
    """

    def __init__(self, config: OuterConfig, rank: int, layout: str):
        self.config, self.rank = config, rank
        self.folder = config.folder.expanduser()
        self._layout = layout
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, number: int, kind: str, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
        """Write a file of this rank, whole or not at all; gives its bytes."""
        path = self._path(number, kind, self.rank)
        with explained(path):
            path.parent.mkdir(exist_ok=True)
        values = dict(tensors)
        partial = path.with_suffix(".partial")
        found = stream_tensors(partial, {name: value.shape for name, value in values.items()}, values.values())
        if kind in ("trunk", "momentum"):
            sync_file(partial)
        with explained(path):
            partial.replace(path)
        shapes = {name: list(value.shape) for name, value in values.items()}
        record = {"size": found.size, "hash": found.xxh3_128, "shapes": shapes, "layout": self._layout}
        write_atomically(path.with_suffix(".json"), orjson.dumps(record))
        return found.size

    def has(self, number: int, kind: str, rank: int | None = None) -> bool:
        """Whether a rank's file of a round is there (this rank's, if none is named)."""
        return self._path(number, kind, self.rank if rank is None else rank).with_suffix(".json").is_file()

    def open(self, number: int, kind: str, rank: int | None = None) -> TensorFile:
        """A file that is there, compared with its hash.

        Raises:
            ExchangeError: it is damaged, or of a branch with another layout or model.
        """
        path = self._path(number, kind, self.rank if rank is None else rank)
        try:
            record = orjson.loads(path.with_suffix(".json").read_bytes())
            file = TensorFile(path)
            if file.hash(record["size"]) != record["hash"]:
                raise TensorFileError(f"{path}: damaged: its hash is not the one in {path.stem}.json")
        except (OSError, ValueError, KeyError) as error:
            raise ExchangeError(f"{error}; remove {path.parent} if every branch has a checkpoint before it") from None
        if record["layout"] != self._layout:
            raise ExchangeError(
                f"{path}: written by {record['layout']}, this branch is {self._layout}; give all branches one layout"
            )
        return file

    def present(self, number: int, rank: int | None = None) -> list[int]:
        """Branches that have written their trunk of a round."""
        return [branch for branch in range(self.config.branches) if self.has(number, f"branch-{branch}", rank)]

    def bring_together(self, number: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """Branch 0: the outer step from all trunks of a round."""
        values = [self.open(number, f"branch-{branch}") for branch in range(self.config.branches)]
        trunk = self.open(number - 1, "trunk")
        has_momentum = self.config.momentum > 0 and number > 1
        momentum = self.open(number - 1, "momentum") if has_momentum else None

        def steps() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name, shape in shapes.items():
                shared = trunk.read(name, shape).clone()
                velocity = torch.zeros_like(shared) if momentum is None else momentum.read(name, shape).clone()
                outer_step([shared], [average([file.read(name, shape) for file in values])], [velocity], self.config)
                yield name, shared, velocity

        results = list(steps())
        if self.config.momentum:
            self.put(number, "momentum", [(name, velocity) for name, _, velocity in results])
        fault_point("outer.step", number)
        self.put(number, "trunk", [(name, shared) for name, shared, _ in results])

    def beat(self, content: Mapping[str, int]) -> None:
        """Say how far this branch is."""
        write_atomically(self.folder / f"branch-{self.config.branch}.json", orjson.dumps(content))

    def last_beat(self, branch: int) -> dict[str, int]:
        """What another branch said last; empty before it did."""
        try:
            return orjson.loads((self.folder / f"branch-{branch}.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}

    def clean(self, number: int) -> None:
        """Remove what nobody needs when a round is complete: its branches, older momenta, results from before the
        oldest checkpoint that any branch has."""
        oldest = min(self.last_beat(branch).get("oldest", 0) for branch in range(self.config.branches))
        for folder in sorted(self.folder.glob("round-*")):
            round_of = int(folder.name.removeprefix("round-"))
            if round_of < min(oldest, number):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            unwanted = [*folder.glob("branch-*")] if round_of <= number else []
            unwanted += [*folder.glob("momentum-*")] if round_of < number else []
            for path in unwanted:
                path.unlink(missing_ok=True)

    def _path(self, number: int, kind: str, rank: int) -> Path:
        return self.folder / f"round-{number:05d}" / f"{kind}-rank-{rank:04d}.safetensors"


class Outer:
    """One rank's part in keeping a branch's trunk together with the others'. Methods are collectives over the run.

    Attributes:
        meetings: rounds this branch's weights hold, round 0 counted.

    Args:
        config: of this branch.
        engine: whose trunk it is.
        run: the run folder.
        stop: ends waiting.
        watchdog: told that waiting is no hang.

    Raises:
        ConfigError: no trunk, or a pattern without a parameter.
    """

    def __init__(self, config: OuterConfig, engine: Engine, run: Path, stop: StopSignal, watchdog: Watchdog):
        self.config, self.engine, self.run = config, engine, run
        self.meetings = 0
        self._stop, self._watchdog = stop, watchdog
        layout = f"{engine.parallel.label()} on {dist.get_world_size()} ranks"
        self._exchange = Exchange(config, dist.get_rank(), layout)
        with torch.device("meta"):
            whole = [name for name, _ in engine.model_config.build().named_parameters()]
        shared = set(trunk_names(whole, config.local))
        trunk = [(name, p) for name, p in engine.all_parameters() if name in shared and p.requires_grad]
        self._trunk: list[tuple[str, nn.Parameter]] = trunk
        self._shapes = {name: tuple(p.shape) for name, p in trunk if self._owner(p) == dist.get_rank()}
        self._beaten = -BEAT_SECONDS
        self._beat(0)

    def is_due(self, step: int) -> bool:
        """Whether a round belongs before the next step."""
        return step // self.config.every >= self.meetings

    def meet(self, step: int) -> Meeting | None:
        """Hold the round that is due; None when a stop was asked for while waiting, with nothing changed.

        Raises:
            ExchangeError: the others show no progress, or a file cannot be used.
            RankError: another rank has that error.
        """
        started = time.perf_counter()
        number = self.meetings
        sent, self._waited = 0, 0.0
        if not self._on_all(self._is_complete(number)):
            sent = self._contribute(number)
            if not self._gather(number, step):
                return None
        if not self._await(step, lambda: self._is_complete(number), lambda: self._missing(number)):
            return None
        received = self._take(number)
        self.meetings += 1
        self._beat(step)
        if self.config.branch == 0 and dist.get_rank() == 0:
            self._exchange.clean(number)
        total = torch.tensor([sent, received], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        sent, received = map(int, total.tolist())
        return Meeting(number, sent, received, self._waited, time.perf_counter() - started)

    def tell(self, step: int) -> None:
        """Let the others see that this branch gets on; at most once a second, by rank 0."""
        if dist.get_rank() == 0 and time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beat(step)

    def _owner(self, parameter: nn.Parameter) -> int:
        """The rank whose file holds what this rank's replicas share."""
        return dist.get_global_rank(self.engine.replicas(parameter), 0)

    def _contribute(self, number: int) -> int:
        """Write this branch's trunk (round 0: branch 0 alone, as the result)."""
        values, error, sent = {}, None, 0
        for name, parameter in self._trunk:
            master = self.engine.read_parameter(parameter)["master"]
            if name in self._shapes:
                values[name] = master.cpu()
        kind = "trunk" if number == 0 else f"branch-{self.config.branch}"
        try:
            if number > 0 or self.config.branch == 0:
                sent = self._exchange.put(number, kind, values)
        except OSError as caught:
            error = caught
        agree(error)
        fault_point("outer.sent", number)
        return sent

    def _gather(self, number: int, step: int) -> bool:
        """Branch 0 waits for the others and makes the step; False when a stop was asked for."""
        if self.config.branch or number == 0:
            return True
        everyone = self.config.branches
        if not self._await(
            step, lambda: len(self._exchange.present(number)) == everyone, lambda: self._missing(number)
        ):
            return False
        error: Exception | None = None
        try:
            if not self._exchange.has(number, "trunk"):
                self._exchange.bring_together(number, self._shapes)
        except (OSError, ExchangeError, TensorFileError) as caught:
            error = caught
        agree(error)
        return True

    def _is_complete(self, number: int) -> bool:
        """Whether the result is there for all that this rank holds."""
        owners = {self._owner(parameter) for _, parameter in self._trunk}
        return all(self._exchange.has(number, "trunk", owner) for owner in owners)

    def _take(self, number: int) -> int:
        """Put the result into the model and its masters; moments stay as they are. Gives the bytes read."""
        files: dict[int, TensorFile] = {}
        error: Exception | None = None
        received = 0
        owners = {self._owner(parameter) for _, parameter in self._trunk}
        try:
            files = {owner: self._exchange.open(number, "trunk", owner) for owner in owners}
        except ExchangeError as caught:
            error = caught
        agree(error)
        for name, parameter in self._trunk:
            state = self.engine.read_parameter(parameter)
            shared = files[self._owner(parameter)].read(name, tuple(parameter.shape))
            state["master"] = shared.to(self.engine.device, copy=True)
            received += shared.nbytes
            self.engine.write_parameter(parameter, state)
        return received

    def _missing(self, number: int) -> list[int]:
        """Whom a round waits for: those who have not written, else the one who makes the step."""
        if number == 0:
            return [0]
        present = self._exchange.present(number)
        return [branch for branch in range(self.config.branches) if branch not in present] or [0]

    def _await(self, step: int, is_ready: Callable[[], bool], missing: Callable[[], list[int]]) -> bool:
        """Until all ranks are ready; False when a stop was asked for."""
        patience = _Patience(self._exchange, self.config.wait_seconds)
        began, pause = time.perf_counter(), POLL_SECONDS[0]
        while True:
            error = None
            with self._watchdog.section("outer", step):  # anew each time: waiting for other branches is no hang
                late, stopping = self._votes(not is_ready(), self._stop.received is not None)
                if not late or stopping:
                    self._waited += time.perf_counter() - began
                    return not late
                if dist.get_rank() == 0:
                    error = patience.look(missing(), step)
                    self.tell(step)
                if self._votes(error is not None)[0]:
                    agree(error)
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS[1])

    def _votes(self, *flags: bool) -> list[bool]:
        """Each flag, set where it is on some rank."""
        votes = torch.tensor([float(flag) for flag in flags], device=self.engine.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def _on_all(self, flag: bool) -> bool:
        return not self._votes(not flag)[0]

    def _beat(self, step: int) -> None:
        if dist.get_rank() == 0:
            saved = [step_of(folder) for folder in complete_checkpoints(self.run)]
            self._beaten = time.monotonic()
            oldest = min(saved, default=0) // self.config.every
            self._exchange.beat({"step": step, "meetings": self.meetings, "oldest": oldest})


class _Patience:
    """How long a branch has been waiting for others that show no progress."""

    def __init__(self, exchange: Exchange, wait_seconds: float):
        self._exchange, self._wait_seconds = exchange, wait_seconds
        self._seen: dict[int, dict[str, int]] = {}
        self._since = self._looked = self._said = time.monotonic()

    def look(self, missing: list[int], step: int) -> ExchangeError | None:
        """The error when it has been too long; now and then a line about whom it waits for."""
        now = time.monotonic()
        if now - self._looked < BEAT_SECONDS and now - self._since < self._wait_seconds:
            return None
        self._looked = now
        seen = {branch: self._exchange.last_beat(branch) for branch in missing}
        if seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._said > SAY_SECONDS:
            self._said = now
            log.info("step %d: waiting for %s", step, _names(seen))
        if not self._wait_seconds or now - self._since <= self._wait_seconds:
            return None
        return ExchangeError(
            f"waited {self._wait_seconds:g} s at step {step} for {_names(seen)}, with no progress there; look at those "
            "runs and start them again, then this one: it goes on from here (longer: outer.wait_seconds)"
        )


def _names(seen: Mapping[int, Mapping[str, Any]]) -> str:
    places = []
    for branch, beat in sorted(seen.items()):
        where = f"last seen at step {beat['step']}" if beat else "never seen"
        places.append(f"branch {branch} ({where})")
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more
