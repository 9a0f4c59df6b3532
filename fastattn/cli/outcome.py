"""The end of a command that trains: its figures, and how to go on if it was stopped."""

from __future__ import annotations

import sys
from typing import Any


def report(outcome: Any) -> int:
    """Print the figures of a run; the exit code, which for a stopped run is 128 plus the signal's number."""
    print(outcome.summary())
    if outcome.progress.signal is None:
        return 0
    print(f"stopped at step {outcome.progress.step}, with a checkpoint; --resume goes on from there", file=sys.stderr)
    return 128 + outcome.progress.signal
