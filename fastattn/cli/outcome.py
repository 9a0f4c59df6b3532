"""The last output of a command that trains: its figures, and how to continue if it was stopped."""

from __future__ import annotations

import sys
from typing import Any


def report(outcome: Any) -> int:
    """Print the figures of a run and return the exit code, for a stopped run 128 plus the signal's number."""
    print(outcome.summary())
    if outcome.progress.signal is None:
        return 0
    print(f"stopped at step {outcome.progress.step}, with a checkpoint; --resume goes on from there", file=sys.stderr)
    return 128 + outcome.progress.signal
