"""SIGINT and SIGTERM end a run after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from fastattn.lm.train.settings import Progress

_STOPPING = b"\nstopping after this step, with a checkpoint; the same again stops at once\n"


@contextlib.contextmanager
def stop_signals(progress: Progress, *, alone: bool = True) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM in ``progress`` for the loop to stop at a step's end; a second one acts at once.

    With ``alone=False`` it does not: ``torchrun`` passes on a signal that its processes may have had already.
    Outside the main thread signals cannot be caught, and are left alone.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        progress.signal = number
        if alone:
            restore()
            with contextlib.suppress(OSError):  # of a closed stderr
                os.write(2, _STOPPING)  # not print, which may be what was interrupted

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        pass
    try:
        yield
    finally:
        restore()
