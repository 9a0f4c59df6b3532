"""``fastattn train``: from text to a trained decoder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastattn.cli import device


class Flag(NamedTuple):
    """A flag for one field of ``fastattn.train.RunConfig``; ``default`` repeats the field's for the help text."""

    name: str
    field: str
    kind: Callable[[str], object]
    default: object
    help: str


FLAGS = (
    Flag("--preset", "preset", str, "tiny", "size of the model: tiny, small, base, large, gpt2-124m, gpt2-350m"),
    Flag("--attention", "attention", str, "fastattn", "fastattn, or eager: the plain formula, for comparison"),
    Flag("--length", "length", int, None, "tokens in a row; the preset's if not given"),
    Flag("--window", "window", int, None, "keys a token sees before itself; all if not given"),
    Flag("--dropout", "dropout", float, 0.0, "probability of dropping"),
    Flag("--vocab-size", "vocab_size", int, 4096, "size of the tokenizer learned from the text"),
    Flag("--held-out", "held_out", float, 0.05, "part of the documents kept for the held-out loss"),
    Flag("--steps", "train.steps", int, 1000, "updates of the weights"),
    Flag("--max-minutes", "train.max_minutes", float, None, "stop after this long, with a checkpoint"),
    Flag("--batch", "train.batch", int, 16, "rows in each update"),
    Flag("--micro-batch", "train.micro_batch", int, None, "rows computed at once; all if not given"),
    Flag("--lr", "train.optim.lr", float, 3e-3, "highest learning rate"),
    Flag("--final-lr", "train.optim.final_lr", float, 0.1, "learning rate at the end, as a part of --lr"),
    Flag("--warmup", "train.optim.warmup", float, 0.05, "steps of warm-up, or a part of all steps if below 1"),
    Flag("--weight-decay", "train.optim.weight_decay", float, 0.1, "of matrices"),
    Flag("--clip", "train.optim.clip", float, 1.0, "largest norm of the gradient"),
    Flag("--seed", "train.seed", int, 0, "of weights, data order and dropout"),
    Flag("--precision", "train.precision", str, "auto", "float32, bfloat16, or auto: bfloat16 on a GPU"),
    Flag("--eval-every", "train.eval_every", int, 100, "steps between held-out losses"),
    Flag("--eval-rows", "train.eval_rows", int, 64, "rows of a held-out loss"),
    Flag("--save-every", "train.save_every", int, 100, "steps between checkpoints"),
    Flag("--keep", "train.keep", int, 2, "newest checkpoints kept"),
    Flag("--log-every", "train.log_every", int, 10, "steps between lines of the log"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Learn a byte-level BPE, pack the documents, train a decoder; checkpoints and log.jsonl go to --out. "
        "Ctrl-C stops with a checkpoint; --resume goes on from the newest."
    )
    parser = commands.add_parser("train", help="train a language model on text", description=text)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--data", nargs="+", default=argparse.SUPPRESS, metavar="PATH",
        help="files, folders, patterns (default: the source of Python's standard library)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    for flag in FLAGS:
        shown = "" if flag.default is None else f" (default {flag.default})"
        parser.add_argument(
            flag.name, dest=flag.field, type=flag.kind, default=argparse.SUPPRESS,
            metavar=flag.kind.__name__.upper(), help=flag.help + shown,
        )  # fmt: skip
    parser.set_defaults(run=run)


def given_flags(args: argparse.Namespace) -> dict[str, object]:
    """The settings on the command line, by field of ``RunConfig``."""
    fields = {flag.field for flag in FLAGS}
    flags = {name: value for name, value in vars(args).items() if name in fields}
    if "data" in args:  # so that --resume finds it from any folder
        flags["data"] = tuple(str(Path(path).expanduser().absolute()) for path in args.data)
    return flags


def run(args: argparse.Namespace) -> int:
    from fastattn.train import RunConfig, find_checkpoint, pretrain, resumed_config

    flags = given_flags(args)
    target = device.choose(args.device)
    checkpoint = find_checkpoint(args.out) if args.resume else None
    config = resumed_config(checkpoint, flags) if checkpoint else RunConfig().changed(flags)
    outcome = pretrain(args.out, config, device=target, resume=checkpoint, show_progress=not args.quiet)
    print(outcome.summary())
    if outcome.progress.signal is None:
        return 0
    print(f"stopped at step {outcome.progress.step}, with a checkpoint; --resume goes on from there", file=sys.stderr)
    return 128 + outcome.progress.signal
