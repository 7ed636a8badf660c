"""SIGTERM and Ctrl-C as a request to stop after the current step. Imports no torch."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

from tenfold.core.console import UserError


class Interrupted(UserError):
    """A run that was asked to stop and has left a checkpoint. Exit status 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number


class InterruptCatcher:
    """Context in which SIGTERM and the first SIGINT only set `received`; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
