"""The command line. A command is a module here with ``add_arguments(parser)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence

from fastattn.errors import DataError, InputError

COMMANDS = {
    "ops": "speed and memory of attention itself",
    "model": "training and generation steps of a model",
    "train": "training a GPT-2 beside nanoGPT's recipe and Hugging Face's Trainer, and an LSTM",
    "finetune": "a fine-tuned classifier beside the recipe of Hugging Face's example script, over several seeds",
    "decode": "attention to a key/value cache, generation with and without one",
    "speculative": "trees of guesses over a cache, guessed text, decoding with the same bits in every batch",
    "layers": "differential, latent, gated and QK-normed attention beside their formulas",
    "derivatives": "forward mode, double backward, statistics, intervals and per-sample gradients, beside torch",
    "swap": "functions and modules that fastattn replaces, each beside its replacement",
    "fuzz": "random problems, judged on every backend that runs here; no measurement",
    "overhead": "host time for each call, import time, installation time and size",
    "report": "tables and plots from records",
    "gpu": "all tests and benchmarks that need a GPU, in under nine minutes",
    "tune": "tile sizes of the Triton kernels",
    "predict": "the time of the CUDA kernels on an H200 by a model, without a GPU",
    "gates": "compile gates of the Triton kernels, without a GPU",
    "ptx": "what Triton and nvcc compile, run on this CPU by an interpreter of PTX, and judged",
}


def parser() -> argparse.ArgumentParser:
    """The parser of every command that is there; ``run`` is the command's function."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of fastattn.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        if importlib.util.find_spec(f"benchmarks.{_module(name)}") is None:
            continue
        command = commands.add_parser(name, help=about, description=about)
        module = importlib.import_module(f"benchmarks.{_module(name)}")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    args.command_line = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        return args.run(args)
    except (InputError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _module(command: str) -> str:
    return "model_step" if command == "model" else command


if __name__ == "__main__":
    sys.exit(main())
