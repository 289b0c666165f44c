"""What interrupts a run: stop signals, and faults planted by tests.

A signal to any one rank stops all of them at the same step boundary. Launchers turn one Ctrl-C into several signals
within milliseconds, so only a later SIGINT, an impatient person's, ends the process at once.
"""

import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Self

import torch
from torch import nn

from lightbulb.parallel.collective import any_rank

IMPATIENCE_SECONDS = 1.0
ACTIONS = ("kill", "stop", "hang", "raise", "sleep", "exit", "nan")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(ABC):
    """Context in which SIGTERM, SIGINT and SIGUSR1 (batch systems) are handled instead of ending the process."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """What a signal does."""


class StopSignal(Interrupted):
    """Signals ask for a stop at the next step boundary.

    Attributes:
        received: when the first one came, by the monotonic clock; None before.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.received: float | None = None

    def requested(self) -> bool:
        """Whether any rank was asked to stop (a collective: call it at the same place on every rank)."""
        return any_rank(self.received is not None, self.device)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = now
        elif number == signal.SIGINT and now - self.received > IMPATIENCE_SECONDS:
            os._exit(128 + number)


class PlantedFault(RuntimeError):
    """Raised where LIGHTBULB_FAULT asks for it."""


class Fault(NamedTuple):
    """One entry of LIGHTBULB_FAULT; a key that is not given matches every rank or step."""

    action: str
    point: str
    rank: int | None = None
    step: int | None = None
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """``"kill:point=step:rank=1:step=5"``.

        Raises:
            ValueError: naming the entry and what is allowed.
        """
        action, *pairs = text.split(":")
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        known = {"point": str, "rank": int, "step": int, "seconds": float}
        if action not in ACTIONS or len(values) != len(pairs) or not values.keys() <= known.keys():
            raise ValueError(
                f"LIGHTBULB_FAULT: {text!r} is not ACTION[:key=value ...] with an action of {', '.join(ACTIONS)} "
                f"and keys of {', '.join(known)}"
            )
        return cls(action, **{"point": "step"} | {key: known[key](value) for key, value in values.items()})


def is_planted(action: str, point: str, step: int | None = None) -> Fault | None:
    """The planted fault of this action for this place, rank and step."""
    rank = int(os.environ.get("RANK", "0"))
    for text in filter(None, os.environ.get("LIGHTBULB_FAULT", "").split(";")):
        fault = Fault.parse(text)
        if (fault.action, fault.point) == (action, point) and fault.rank in (None, rank) and fault.step in (None, step):
            return fault
    return None


def fault_point(point: str, step: int | None = None) -> None:
    """A place where tests can break a run by the environment variable LIGHTBULB_FAULT.

    Entries are separated by ``;``: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``hang`` (an endless loop in Python),
    ``raise`` (:class:`PlantedFault`), ``sleep`` (``seconds``), ``exit`` (with code 0); ``nan`` is for
    :func:`poisoned`. Example: ``kill:point=save.rename:rank=0;sleep:point=step:step=3:seconds=2``.
    """
    if "LIGHTBULB_FAULT" not in os.environ:
        return
    if fault := is_planted("sleep", point, step):
        time.sleep(fault.seconds)
    if is_planted("raise", point, step):
        raise PlantedFault(f"planted at {point}, step {step}")
    if is_planted("kill", point, step):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_planted("stop", point, step):
        os.kill(os.getpid(), signal.SIGSTOP)
    if is_planted("exit", point, step):
        os._exit(0)
    if is_planted("hang", point, step):
        while True:
            pass


@contextmanager
def poisoned(model: nn.Module, step: int) -> Iterator[None]:
    """Inside, the gradient of this rank's first parameter is NaN if ``nan`` is planted at this step."""
    if is_planted("nan", "step", step) is None:
        yield
        return
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    hook = trained.register_hook(lambda gradient: gradient * math.nan) if trained is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
