"""``fastattn train``: pre-train a model on text."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastattn.cli import device
from fastattn.cli.flags import TRAINING, Flag, add_flags, add_rate_search, given
from fastattn.cli.outcome import report, report_rates
from fastattn.errors import input_error

FLAGS = (
    Flag(
        "--objective",
        "objective",
        str,
        "causal",
        "next tokens (a decoder), masked tokens (an encoder) or spans (both)",
        ("causal", "masked", "span"),
    ),
    Flag("--preset", "preset", str, "tiny", "size of the model; of a decoder tiny, small, base, large, gpt2-124m, ..."),
    Flag(
        "--attention",
        "attention",
        str,
        "fastattn",
        "fastattn, or eager: the plain formula, for comparison",
        ("fastattn", "eager"),
    ),
    Flag("--length", "length", int, None, "tokens in a row; the preset's if not given"),
    Flag("--window", "window", int, None, "keys a token sees before itself; all if not given"),
    Flag("--dropout", "dropout", float, 0.0, "probability of dropping"),
    Flag("--context-parallel", "context_parallel", int, 1, "processes that share each row, some tokens each"),
    Flag("--vocab-size", "vocab_size", int, 4096, "size of the tokenizer learned from the text"),
    Flag("--held-out", "held_out", float, 0.05, "part of the documents kept for the held-out loss"),
    *TRAINING,
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Train a byte-level BPE, pack the documents, and train a model; checkpoints and log.jsonl go to --out. "
        "Ctrl-C stops with a checkpoint; --resume continues from the newest."
    )
    parser = commands.add_parser("train", help="train a language model on text", description=text)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--data", nargs="+", default=argparse.SUPPRESS, metavar="PATH",
        help="files, folders, patterns, hf:NAME; not cleaned; PATH:WEIGHT mixes them "
        "(default: the source of Python's standard library)",
    )  # fmt: skip
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a corpus that fastattn prepare made, instead of --data; several are mixed, by weight with DIR:WEIGHT",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_rate_search(parser)
    device.add_flag(parser)
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def given_flags(args: argparse.Namespace) -> dict[str, object]:
    """The settings on the command line, by field of ``RunConfig``."""
    flags = given(args, FLAGS)
    if "data" in args:  # so that --resume finds it from any folder
        flags["data"] = tuple(_findable(path) for path in args.data)
    if "corpus" in args:
        found = tuple(map(_findable, args.corpus))
        flags["corpus"] = found[0] if len(found) == 1 else found
        given_too = [name for name in ("data", "vocab_size", "held_out") if name in flags]
        if given_too:
            flag = "--" + given_too[0].replace("_", "-")
            raise input_error("--corpus", f"together with {flag}", "one of them", "Give it to fastattn prepare.")
    return flags


def _findable(given: str) -> str:
    """The absolute path, with its weight if it has one."""
    from fastattn.lm.train.mixture import split_weight

    path, weight = split_weight(given)
    if path.startswith("hf:"):
        return given
    return str(Path(path).expanduser().absolute()) + ("" if weight is None else f":{weight:g}")


def run(args: argparse.Namespace) -> int:
    from fastattn.lm.train import RunConfig, find_checkpoint, make_trainer, pretrain, resumed_config
    from fastattn.lm.train.parallel import joined, ranks

    flags = given_flags(args)
    with joined(device.choose(args.device)) as target:
        checkpoint = find_checkpoint(args.out) if args.resume else None
        config = resumed_config(checkpoint, flags) if checkpoint else RunConfig().changed(flags)
        if args.find_lr:
            trainer, _ = make_trainer(args.out, config, device=target, show_progress=not args.quiet)
            return report_rates(trainer, args)
        outcome = pretrain(args.out, config, device=target, resume=checkpoint, show_progress=not args.quiet)
        if not ranks().leads:
            return 0
    return report(outcome)
