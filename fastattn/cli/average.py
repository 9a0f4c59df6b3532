"""``fastattn average``: the mean of the weights of several checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Average the weights of the newest checkpoints of a run, or of those given, into a checkpoint that every other "
        "command takes. Train with --keep 5, say, to have several."
    )
    parser = commands.add_parser("average", help="average the weights of checkpoints", description=text)
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        type=Path,
        metavar="DIR",
        help="--out of a run, or several checkpoints",
    )
    parser.add_argument("--last", type=int, default=5, metavar="N", help="newest checkpoints of a run (default 5)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the new checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.lm.train.average import average_checkpoints, find_checkpoints

    found = find_checkpoints(args.checkpoint, args.last)
    average_checkpoints(found, args.out)
    print(f"{args.out}: the mean of {', '.join(str(checkpoint.folder) for checkpoint in found)}")
    return 0
