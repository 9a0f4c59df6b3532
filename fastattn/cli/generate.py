"""``fastattn generate``: text from a checkpoint, as it is generated."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastattn.cli import device


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Continue a prompt with a model that fastattn train has made, printing the text as it comes."
    parser = commands.add_parser("generate", help="generate text from a checkpoint", description=text)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="--out of a run (its newest), or one checkpoint"
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="beginning of the text (default: none)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to generate (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that make up P")
    parser.add_argument("--seed", type=int, metavar="N", help="the same text each time")
    parser.add_argument("--attention", choices=("fastattn", "eager"), help="instead of what the run used")
    parser.add_argument("--no-cache", action="store_true", help="compute every token anew: slower, the same text")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.generate import Sampling, stream_text
    from fastattn.train import find_checkpoint

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    checkpoint = find_checkpoint(args.checkpoint)
    model = checkpoint.load_model(device.choose(args.device), args.attention)
    pieces = stream_text(model, checkpoint.tokenizer(), args.prompt, args.tokens, sampling, use_cache=not args.no_cache)
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
