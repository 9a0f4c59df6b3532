"""``fastattn finetune``: from a model and labelled examples to a model for a task, and its scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastattn.cli import device
from fastattn.cli.flags import TRAINING, Flag, add_flags, given, with_defaults
from fastattn.cli.outcome import report

TEXT = """\
Train a model for a task on examples of your own, evaluate it on held-out ones, and leave checkpoints, log.jsonl and
scores.json in --out. Ctrl-C stops with a checkpoint; --resume goes on from the newest.
"""
FIELDS = """\
examples: a .jsonl file with an object in each line, or a .csv or .tsv file whose first line names the columns

  classify   text, label                 and text_pair, if two texts are compared
  tag        words, labels               lists of equal length; in a table separated by spaces
  qa         question, context, answer   and answer_start, the character where it begins, if it occurs twice
  seq2seq    source, target              translation, summarisation
  instruct   prompt, response            the response is learned, right after the prompt
"""
FLAGS = (
    Flag("--preset", "preset", str, None, "size of a new model, trained from nothing: tiny, small, base, ..."),
    Flag(
        "--method", "method", str, "full", "what is trained: all of it, its head alone, or adapters",
        ("full", "frozen", "lora"),
    ),
    Flag("--lora-rank", "lora_rank", int, 8, "of the adapters"),
    Flag("--lora-alpha", "lora_alpha", float, 16.0, "factor on what they add, divided by the rank"),
    Flag("--lora-dropout", "lora_dropout", float, 0.0, "probability of dropping their inputs"),
    Flag("--attention", "attention", str, "fastattn", "fastattn, or eager: the plain formula", ("fastattn", "eager")),
    Flag("--vocab-size", "vocab_size", int, 4096, "size of the tokenizer learned from the examples, with --preset"),
    Flag("--held-out", "held_out", float, 0.1, "part of --data kept for evaluation if there is no --eval"),
    Flag("--length", "length", int, None, "most tokens in a row; the model's if not given"),
    Flag("--dropout", "dropout", float, None, "probability of dropping; the model's if not given"),
    Flag("--epochs", "epochs", float, 3.0, "passes over the examples"),
    Flag("--steps", "steps", int, None, "updates of the weights, instead of --epochs"),
    *with_defaults(
        (flag for flag in TRAINING if flag.name != "--steps"),
        {"train.optim.lr": 3e-4, "train.optim.weight_decay": 0.01, "train.eval_rows": 256},
    ),
)  # fmt: skip
_PATHS = ("data", "eval", "checkpoint", "pretrained")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "finetune", help="train a model for a task", description=TEXT, epilog=FIELDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--task", default=argparse.SUPPRESS, choices=("classify", "tag", "qa", "seq2seq", "instruct"),
        help="what the model is to do; see below",
    )  # fmt: skip
    parser.add_argument("--data", default=argparse.SUPPRESS, metavar="FILE", help="examples to learn from")
    parser.add_argument("--eval", default=argparse.SUPPRESS, metavar="FILE", help="examples to evaluate on")
    parser.add_argument(
        "--checkpoint",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="start from this: --out of a run, or a checkpoint",
    )
    parser.add_argument(
        "--pretrained",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="start from a folder in Hugging Face's format; nothing is downloaded",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.errors import input_error
    from fastattn.lm.finetune import FinetuneConfig, finetune
    from fastattn.lm.finetune.config import resumed_config
    from fastattn.lm.train import find_checkpoint
    from fastattn.lm.train.parallel import joined, ranks

    flags = given(args, FLAGS) | {name: value for name, value in vars(args).items() if name == "task"}
    for name in _PATHS:
        if name in args:
            path = Path(getattr(args, name)).expanduser()
            # absolute, so that --resume finds it from any folder; a name without a folder is told as it was given
            flags[name] = str(path.absolute() if path.exists() else path)
    if args.resume:
        checkpoint = find_checkpoint(args.out)
        config = resumed_config(checkpoint, flags)
    else:
        checkpoint = None
        for name in ("task", "data"):
            if name not in flags:
                raise input_error(
                    f"--{name}", "nothing", "a value", "A new run needs it; see fastattn finetune --help."
                )
        start: dict[str, Any] = {
            name: flags.pop(name) for name in ("task", "data", "checkpoint", "pretrained", "preset") if name in flags
        }
        config = FinetuneConfig(**start).changed(flags)
    with joined(device.choose(args.device)) as target:
        outcome = finetune(args.out, config, device=target, resume=checkpoint, show_progress=not args.quiet)
        if not ranks().leads:
            return 0
    return report(outcome)
