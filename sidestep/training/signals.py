"""Stopping a run on purpose: a signal asks, the loop answers at a safe place."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

log = logging.getLogger(__name__)

STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""What schedulers, people and terminals that close send; Windows has only the first two."""


class Interrupted(BaseException):
    """A run was stopped by a signal, after saving. Not an ``Exception``, so that a sweep does not go on.

    Attributes:
        received: the signal.
        exit_code: 128 + the signal's number, as shells and schedulers expect.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received)  # as it was given, so that it can be pickled
        self.received, self.exit_code = received, 128 + received

    def __str__(self) -> str:
        return f"stopped by {self.received.name}"


class StopSignals:
    """While open, remembers the first signal instead of dying of it; Ctrl-C after it ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            for name in STOPPING:
                number = getattr(signal, name, None)
                deaf = name == "SIGHUP" and number is not None and signal.getsignal(number) is signal.SIG_IGN  # nohup
                if number is not None and not deaf:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def raise_if_received(self) -> None:
        """Leave what can be begun again.

        Raises:
            Interrupted: if there was a signal.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            before = self._before[signal.SIGINT]
            (before if callable(before) else signal.default_int_handler)(number, frame)
        self.received = signal.Signals(number)
        log.info("%s: saving at the next safe place, then stopping", self.received.name)


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the block as such, though the code of a library that it came in makes an error of its own of it.

    Raises:
        KeyboardInterrupt: in place of whatever error follows it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if noted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
