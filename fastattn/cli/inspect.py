"""``fastattn inspect``: the attention of a model on a text, as a page for a browser or a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastattn.cli import device
from fastattn.cli.flags import add_model
from fastattn.errors import input_error


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Show which tokens a model attends to when it reads a text: every head, what a chosen token attends to, "
        "entropies and rollout. The page is one file, and a browser opens it without a network."
    )
    parser = commands.add_parser("inspect", help="show the attention of a model", description=text)
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="TEXT", help="what the model reads; - is standard input")
    parser.add_argument("--target", metavar="TEXT", help="what an encoder-decoder writes")
    parser.add_argument(
        "--out", type=Path, default=Path("attention.html"), metavar="FILE",
        help="an .html page, or a .png picture of all heads (default attention.html)",
    )  # fmt: skip
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in (".html", ".png"):
        raise input_error("--out", str(args.out), "a name that ends in .html or .png", "The page is interactive.")
    from fastattn.lm.finetune.load import is_finetuned, load_finetuned
    from fastattn.lm.train import find_model
    from fastattn.lm.view import plot_attention

    source, target = find_model(args.checkpoint, best=True), device.choose(args.device)
    model = load_finetuned(source, target).model if is_finetuned(source) else source.load_pretrained(target)
    text = sys.stdin.read() if args.text == "-" else args.text
    print(plot_attention(model, source.tokenizer(), text, args.out, args.target))
    return 0
