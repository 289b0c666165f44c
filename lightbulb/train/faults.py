"""What interrupts a run: stop signals, and faults planted by tests.

A signal to any one rank stops all of them at the same step boundary. Launchers turn one Ctrl-C into several signals
within milliseconds, so only a later SIGINT, an impatient person's, ends the process at once.
"""

import os
import signal
import time
from types import FrameType, TracebackType

import torch

from lightbulb.parallel.collective import any_rank

IMPATIENCE_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Context in which SIGTERM, SIGINT and SIGUSR1 (batch systems) ask for a stop instead of ending the process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.received: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self) -> bool:
        """Whether any rank was asked to stop (a collective: call it at the same place on every rank)."""
        return any_rank(self.received is not None, self.device)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = now
        elif number == signal.SIGINT and now - self.received > IMPATIENCE_SECONDS:
            os._exit(128 + number)


def fault_point(name: str) -> None:
    """A place where tests can hold a run: ``LIGHTBULB_FAULT=sleep:save:5`` sleeps 5 s at the point ``save``."""
    kind, _, rest = os.environ.get("LIGHTBULB_FAULT", "").partition(":")
    point, _, seconds = rest.partition(":")
    if kind == "sleep" and point == name:
        time.sleep(float(seconds))
