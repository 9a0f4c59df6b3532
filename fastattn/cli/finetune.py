"""``fastattn finetune``: train a model for a task on labelled examples, and score it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastattn.cli import device
from fastattn.cli.flags import (
    TRAINING,
    Flag,
    add_columns,
    add_flags,
    add_rate_search,
    columns_of,
    given,
    with_defaults,
)
from fastattn.cli.outcome import report, report_rates

TEXT = """\
Train a model for a task on your own examples, evaluate it on held-out ones, and write checkpoints, log.jsonl and
scores.json to --out. Ctrl-C stops with a checkpoint; --resume continues from the newest.
"""
FIELDS = """\
examples: JSON lines, JSON, CSV, TSV, Parquet, CoNLL, a folder of datasets.save_to_disk or of images, or one with train
and dev files

  classify    text, label                 and text_pair, if two texts are compared
  regression  text, label                 a number; and text_pair
  multilabel  text, labels                any number of labels; and text_pair
  tag         words, labels               lists of equal length; in a table separated by spaces
  qa          question, context, answer   and answer_start, the character where it begins, if it occurs twice
  seq2seq     source, target              translation, summarisation; or two files, line by line
  instruct    prompt, response            the response is learned, right after the prompt
  chat        messages, response          {role, content} each; without a response, the assistant's last message
  dpo         prompt, chosen, rejected    two responses, of which one is preferred; or two conversations
  image       image, label                the path of a file; or a folder with a subfolder of images for each class
  caption     image, text                 a text that says what the image shows
  vqa         image, question, answer     a question about the image; the answer follows right after it

The columns of GLUE, SQuAD, CNN/DailyMail, WMT, Alpaca and CoNLL are known; --field names others.
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
    Flag("--chat-template", "chat_template", str, None, "Jinja template of chat and dpo; else the model's, or ChatML"),
    Flag("--dpo-beta", "dpo_beta", float, 0.1, "of dpo: the larger, the closer the model stays to what it was"),
    Flag("--image-size", "image_size", int, None, "height and width of images, with --preset; else the preset's"),
    Flag("--patch-size", "patch_size", int, None, "of the patches that become tokens, likewise"),
    Flag(
        "--augment", "augment", str, "none", "random changes of images in training; flip also shifts",
        ("none", "shift", "flip"),
    ),
    Flag("--length", "length", int, None, "most tokens in a row; the model's if not given"),
    Flag("--dropout", "dropout", float, None, "probability of dropping; the model's if not given"),
    Flag("--epochs", "epochs", float, 3.0, "passes over the examples"),
    Flag("--steps", "steps", int, None, "updates of the weights, instead of --epochs"),
    *with_defaults(
        (flag for flag in TRAINING if flag.name != "--steps"),
        {"lr": 3e-4, "weight_decay": 0.01, "eval_rows": 256},
    ),
)  # fmt: skip
TASKS = (
    "classify", "regression", "multilabel", "tag", "qa", "seq2seq", "instruct", "chat", "dpo", "image", "caption",
    "vqa",
)  # fmt: skip
_PATHS = ("data", "eval", "checkpoint", "pretrained")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "finetune", help="train a model for a task", description=TEXT, epilog=FIELDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--task", default=argparse.SUPPRESS, choices=TASKS, help="what the model is to do; see below",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="examples to learn from; for seq2seq two, too",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="examples to evaluate on, file by file",
    )
    add_columns(parser)
    add_start(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_rate_search(parser)
    device.add_flag(parser)
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def add_start(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the weights to start from."""
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


def paths(args: argparse.Namespace) -> dict[str, Any]:
    """The files and folders on the command line, by field of ``FinetuneConfig``."""
    found: dict[str, Any] = {}
    for name in _PATHS:
        if name in args:
            value = getattr(args, name)
            several = tuple(map(_findable, value if isinstance(value, list) else [value]))
            found[name] = several[0] if len(several) == 1 else several
    return found


def run(args: argparse.Namespace) -> int:
    from fastattn.errors import input_error
    from fastattn.lm.finetune import FinetuneConfig, finetune
    from fastattn.lm.finetune.config import resumed_config
    from fastattn.lm.finetune.run import make_trainer
    from fastattn.lm.train import find_checkpoint
    from fastattn.lm.train.parallel import joined, ranks

    flags = given(args, FLAGS) | {name: value for name, value in vars(args).items() if name == "task"}
    flags |= paths(args)
    if "field" in args:
        flags["columns"] = tuple(columns_of(args).items())
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
            name: flags.pop(name)
            for name in ("task", "data", "checkpoint", "pretrained", "preset", "columns")
            if name in flags
        }
        if "chat_template" in flags:
            start["chat_template"] = _findable(flags.pop("chat_template"))
        config = FinetuneConfig(**start).changed(flags)
    with joined(device.choose(args.device)) as target:
        if args.find_lr:
            return report_rates(make_trainer(args.out, config, target, show_progress=not args.quiet), args)
        outcome = finetune(args.out, config, device=target, resume=checkpoint, show_progress=not args.quiet)
        if not ranks().leads:
            return 0
    return report(outcome)


def _findable(given: str) -> str:
    """The absolute path, so that --resume finds it from any folder; a name that is no file or folder is unchanged."""
    path = Path(given).expanduser()
    return str(path.absolute() if path.exists() else path)
