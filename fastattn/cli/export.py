"""``fastattn export``: a model as a folder in Hugging Face's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastattn.cli.flags import add_model


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Write a model as a folder that transformers loads: config.json, safetensors, tokenizer.json, and the chat "
        "template if it has one. The format is the first of Hugging Face's that describes the model exactly."
    )
    parser = commands.add_parser("export", help="write a model for transformers", description=text)
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; it must not exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.lm.load import export
    from fastattn.lm.train import find_model

    print(f"{args.out}: {export(find_model(args.checkpoint, best=True), args.out)}")
    return 0
