"""A run's part in keeping the trunk of several branches together: when they meet, and how long they wait.

:mod:`lightbulb.train.outer` has the step itself, :mod:`lightbulb.train.exchange` the folder they meet in.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightbulb.parallel.collective import agree
from lightbulb.parallel.engine import Engine
from lightbulb.train.exchange import Exchange, ExchangeError
from lightbulb.train.faults import StopSignal, fault_point
from lightbulb.train.manifest import complete_checkpoints, step_of
from lightbulb.train.outer import OuterConfig, shared_names
from lightbulb.train.tensor_file import TensorFileError
from lightbulb.train.watchdog import Watchdog

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = (0.002, 0.5)
"""Between two looks at the folder: at first, and at most."""
BEAT_SECONDS = 1.0
SAY_SECONDS = 60.0
_SHOWN = 4


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
        ConfigError: nothing of a trunk is trained, or a pattern names no parameter.
    """

    def __init__(self, config: OuterConfig, engine: Engine, run: Path, stop: StopSignal, watchdog: Watchdog):
        self.config, self.engine, self.run = config, engine, run
        self.meetings = 0
        self._stop, self._watchdog = stop, watchdog
        layout = f"{engine.parallel.label()} on {dist.get_world_size()} ranks"
        self._exchange = Exchange(config, dist.get_rank(), layout)
        shared = shared_names(engine.model_config, engine.trained, config.local)
        self._trunk: list[tuple[str, nn.Parameter]] = [pair for pair in engine.all_parameters() if pair[0] in shared]
        self._shapes = {name: tuple(p.shape) for name, p in self._trunk if self._owner(p) == dist.get_rank()}
        self._beat(0)

    def is_due(self, step: int) -> bool:
        """Whether a round belongs before the next step; lets the others see that this branch has come so far."""
        self._tell(step)
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
            self._agree(lambda: self._exchange.check_open(number))
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

    def _owner(self, parameter: nn.Parameter) -> int:
        """The rank whose file holds what this rank's replicas share."""
        return dist.get_global_rank(self.engine.replicas(parameter), 0)

    def _contribute(self, number: int) -> int:
        """Write this branch's trunk (round 0: branch 0 alone, as the result)."""
        values = {}
        for name, parameter in self._trunk:
            master = self.engine.read_parameter(parameter)["master"]
            if name in self._shapes:
                values[name] = master.cpu()
        kind = "trunk" if number == 0 else f"branch-{self.config.branch}"
        writes = number > 0 or self.config.branch == 0
        sent = self._agree(lambda: self._exchange.put(number, kind, values) if writes else 0)
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
        if not self._on_all(self._exchange.has(number, "trunk")):
            self._agree(lambda: self._exchange.bring_together(number, self._shapes))
        return True

    def _is_complete(self, number: int) -> bool:
        """Whether the result is there for all that this rank holds."""
        owners = {self._owner(parameter) for _, parameter in self._trunk}
        return all(self._exchange.has(number, "trunk", owner) for owner in owners)

    def _take(self, number: int) -> int:
        """Put the result into the model and its masters; moments stay as they are. Gives the bytes read."""
        results = self._agree(lambda: self._results(number))
        for name, parameter in self._trunk:
            state = self.engine.read_parameter(parameter)
            state["master"] = results[name].to(self.engine.device, copy=True)
            self.engine.write_parameter(parameter, state)
        return sum(shared.nbytes for shared in results.values())

    def _results(self, number: int) -> dict[str, Tensor]:
        """What a round made of this rank's trunk, as views of files."""
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, parameter in self._trunk:
            shapes.setdefault(self._owner(parameter), {})[name] = tuple(parameter.shape)
        files = {owner: self._exchange.open(number, "trunk", mine, owner) for owner, mine in shapes.items()}
        return {name: files[owner].read(name, shape) for owner in files for name, shape in shapes[owner].items()}

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
                    self._tell(step)
                if self._votes(error is not None)[0]:
                    agree(error)
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS[1])

    def _agree(self, function: Callable[[], T]) -> T:
        """This rank's result, or an error on every rank where one has it."""
        try:
            result, error = function(), None
        except (OSError, ExchangeError, TensorFileError) as caught:
            error = caught
        agree(error)
        return result

    def _votes(self, *flags: bool) -> list[bool]:
        """Each flag, set where it is on some rank."""
        votes = torch.tensor([float(flag) for flag in flags], device=self.engine.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def _on_all(self, flag: bool) -> bool:
        return not self._votes(not flag)[0]

    def _tell(self, step: int) -> None:
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beat(step)

    def _beat(self, step: int) -> None:
        self._beaten = time.monotonic()
        if dist.get_rank() == 0:
            saved = [step_of(folder) for folder in complete_checkpoints(self.run)]
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
