"""``fastattn evaluate``: score a checkpoint on a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastattn.cli import device
from fastattn.cli.flags import add_columns, add_model, columns_of


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Score a checkpoint of fastattn finetune on a file of examples of its task, or one of fastattn train on text. "
        "Depending on the task: loss, perplexity, bits per byte, accuracy, precision, recall, F1 (also of entities), "
        "Matthews, Pearson, Spearman, exact match, BLEU, chrF, ROUGE."
    )
    parser = commands.add_parser("evaluate", help="score a checkpoint on a file", description=text)
    add_model(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PATH", help="a file of examples; for a pre-trained model any text"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples, or N rows of the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="also write each example and its prediction there, as JSON lines",
    )
    add_columns(parser)
    parser.add_argument("--attention", choices=("fastattn", "eager"), help="instead of what the run used")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.errors import input_error
    from fastattn.files import write_text
    from fastattn.lm.finetune.evaluate import evaluate
    from fastattn.lm.train import find_model

    if args.limit is not None and args.limit < 1:
        raise input_error("--limit", args.limit, "a positive int", "Without it all are used.")
    found = evaluate(
        find_model(args.checkpoint, best=True), args.data, device=device.choose(args.device),
        columns=columns_of(args), attention=args.attention, limit=args.limit, predictions=args.predictions,
        show_progress=not args.quiet,
    )  # fmt: skip
    print(found.table())
    if args.json:
        write_text(args.json, found.to_json())
    return 0
