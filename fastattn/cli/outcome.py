"""The closing output of a command that trains: its figures, and the way to continue a stopped run."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def report(outcome: Any) -> int:
    """Print the figures of a run and return the exit code, for a stopped run 128 plus the signal's number."""
    print(outcome.summary())
    if outcome.progress.signal is None:
        return 0
    print(f"stopped at step {outcome.progress.step}, with a checkpoint; --resume goes on from there", file=sys.stderr)
    return 128 + outcome.progress.signal


def report_rates(trainer: Any, args: argparse.Namespace) -> int:
    """Search for a learning rate with the trainer of a run, print what was found, and return the exit code."""
    from fastattn.lm.train.learning_rate import find_rate

    found = find_rate(trainer, show_progress=not args.quiet)
    if trainer.ranks.leads:
        print(found.table())
        print(f"the losses: {args.out / 'lr.json'}, lr.png")
    return 0
