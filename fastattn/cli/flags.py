"""Flags as tables: one line for each setting, shared by the commands that train. Imports are light."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastattn.errors import input_error


class Flag(NamedTuple):
    """A flag for one field of a command's config.

    Attributes:
        name: the flag with its dashes.
        field: its field of the config.
        kind: int, float, str or another type of argparse; bool makes a pair of switches, ``--name`` and ``--no-name``.
        default: the default of the field, repeated for the help text; for None ``help`` says what happens.
        help: the help text.
        choices: allowed values, if they are few and fixed.
    """

    name: str
    field: str
    kind: Callable[[str], object]
    default: object
    help: str
    choices: tuple[str, ...] | None = None


# The fields of ``fastattn.lm.train.TrainConfig``, which every config of a run has.
TRAINING = (
    Flag("--steps", "steps", int, 1000, "updates of the weights"),
    Flag("--max-minutes", "max_minutes", float, None, "stop after this long, with a checkpoint"),
    Flag("--batch", "batch", int, 16, "rows in each update"),
    Flag("--micro-batch", "micro_batch", int, None, "rows computed at once; all if not given"),
    Flag("--lr", "lr", float, 3e-3, "highest learning rate"),
    Flag("--final-lr", "final_lr", float, 0.1, "learning rate at the end, as a part of --lr"),
    Flag("--warmup", "warmup", float, 0.05, "steps of warm-up, or a part of all steps if below 1"),
    Flag("--weight-decay", "weight_decay", float, 0.1, "of matrices"),
    Flag("--clip", "clip", float, 1.0, "largest norm of the gradient"),
    Flag("--seed", "seed", int, 0, "of weights, data order and dropout"),
    Flag(
        "--precision", "precision", str, "auto", "of matrix products; auto: bfloat16 on a GPU, else float32",
        ("auto", "float32", "bfloat16"),
    ),
    Flag("--eval-every", "eval_every", int, 100, "steps between held-out losses"),
    Flag("--eval-rows", "eval_rows", int, 64, "rows of a held-out loss"),
    Flag("--patience", "patience", int, None, "stop after this many evaluations without a better one"),
    Flag("--keep-best", "keep_best", bool, False, "keep the checkpoint of the best evaluation, too"),
    Flag("--save-every", "save_every", int, 100, "steps between checkpoints"),
    Flag("--keep", "keep", int, 2, "newest checkpoints kept"),
    Flag("--compile", "compile", bool, False, "let torch.compile make kernels; the first step is slow"),
    Flag(
        "--checkpoint-activations", "recompute", bool, False,
        "save memory: compute activations again in the backward pass, but for those of attention",
    ),
    Flag(
        "--parallel", "parallel", str, "auto", "how the processes of torchrun share the work",
        ("auto", "ddp", "fsdp"),
    ),
    Flag("--tensorboard", "tensorboard", bool, False, "also log for TensorBoard, to OUT/tensorboard"),
    Flag("--wandb", "wandb", bool, False, "also log for Weights & Biases; WANDB_MODE=offline: to OUT/wandb"),
    Flag("--log-every", "log_every", int, 10, "steps between lines of the log"),
)  # fmt: skip


def with_defaults(flags: Iterable[Flag], defaults: Mapping[str, object]) -> tuple[Flag, ...]:
    """The flags with other defaults for some fields."""
    return tuple(flag._replace(default=defaults.get(flag.field, flag.default)) for flag in flags)


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add ``flags``; a flag that is not given does not appear in the parsed arguments."""
    for flag in flags:
        shown = "" if flag.default is None or flag.kind is bool else f" (default {flag.default})"
        text = flag.help + shown
        if flag.kind is bool:
            parser.add_argument(
                flag.name, dest=flag.field, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                flag.name, dest=flag.field, type=flag.kind, choices=flag.choices, default=argparse.SUPPRESS,
                metavar=None if flag.choices else flag.kind.__name__.upper(), help=text,
            )  # fmt: skip


def add_rate_search(parser: argparse.ArgumentParser) -> None:
    """Add ``--find-lr``, of a command that trains."""
    parser.add_argument(
        "--find-lr", action="store_true",
        help="no run: try 100 learning rates up to 1, suggest one, and write lr.json and lr.png to --out",
    )  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint``, of a command that uses a model."""
    text = "--out of a run (its best, if kept, or newest), one checkpoint, or a folder in Hugging Face's format"
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help=text)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add ``--field``, which ``columns_of`` reads."""
    parser.add_argument(
        "--field", action="append", default=argparse.SUPPRESS, metavar="FIELD=COLUMN",
        help="take a field of the task from this column (text=sentence, source=translation.en); may be repeated",
    )  # fmt: skip


def columns_of(args: argparse.Namespace) -> dict[str, str]:
    """The columns that ``--field`` gives, by field of the task."""
    found: dict[str, str] = {}
    for pair in getattr(args, "field", ()):
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise input_error("--field", repr(pair), "FIELD=COLUMN", "For example --field text=sentence.")
        found[name] = column
    return found


def given(args: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    """The settings on the command line, by field."""
    fields = {flag.field for flag in flags}
    return {name: value for name, value in vars(args).items() if name in fields}
