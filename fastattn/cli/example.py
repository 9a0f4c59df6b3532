"""``fastattn example``: train a model for a task on Python's own source, and compare it with a baseline."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastattn.cli import device

TEXT = """\
Three tasks on the source of Python's standard library, with no download. Each writes its data, trains a model, and
compares it on held-out modules with stated baselines. --out then holds data/ and run/, in the formats of fastattn
train and finetune, and result.json with all figures.

  classify    which package a docstring comes from; baseline: always the largest one
  summarise   the first line of a function's docstring from its code; baselines: the
              function's first line, and its first words, by ROUGE-1, -2 and -L and BLEU
  code        the next token of Python code; baseline: how often each token occurs
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "example", help="see a task solved on real data in minutes", description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", choices=("classify", "summarise", "code"), help="which one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of data and model (fastattn-example-NAME)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="at most so many updates of the weights, for a quick look"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.errors import input_error
    from fastattn.files import write_text
    from fastattn.lm.examples.shipped import run_example

    if args.steps is not None and args.steps < 1:
        raise input_error(
            "--steps", args.steps, "a positive int", "Without it the example runs as many steps as it needs."
        )
    out = args.out or Path(f"fastattn-example-{args.name}")
    target = device.choose(args.device)
    result = run_example(args.name, out, device=target, steps=args.steps, show_progress=not args.quiet)
    print(f"\n{result.table()}")
    if args.json:
        write_text(args.json, result.to_json())
    print(f"\n{result.verdict()}; all figures: {out / 'result.json'}")
    return 0
