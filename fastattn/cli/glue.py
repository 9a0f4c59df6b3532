"""``fastattn glue``: fine-tune a model on every task of GLUE, and average the scores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastattn.cli import device, finetune
from fastattn.cli.flags import add_flags, given

TEXT = """\
Fine-tune a model for each task of GLUE below --data (CoLA, SST-2, MRPC, ... with train.tsv and dev.tsv, as published),
and print the scores and their average. If it was stopped, the same command continues.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("glue", help="fine-tune and score on every task of GLUE", description=TEXT)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the runs")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with a folder for each task")
    finetune.add_start(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    add_flags(parser, finetune.FLAGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.lm.finetune import FinetuneConfig
    from fastattn.lm.finetune.glue import run_glue

    flags = given(args, finetune.FLAGS) | finetune.paths(args)
    start = {name: flags.pop(name) for name in ("data", "checkpoint", "pretrained", "preset") if name in flags}
    config = FinetuneConfig(task="classify", **start).changed(flags)
    outcome = run_glue(args.out, config, device=device.choose(args.device), show_progress=not args.quiet)
    print(outcome.table())
    if outcome.signal is None:
        return 0
    print("stopped; the same command continues from there", file=sys.stderr)
    return 128 + outcome.signal
