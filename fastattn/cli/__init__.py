"""The command line: ``fastattn COMMAND``, and one file for each command.

A command's file imports little; the rest is imported when the command runs. Errors of the user end in one sentence on
stderr and exit code 2; an interrupted command exits with 128 plus the signal's number.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from fastattn.cli import (
    average,
    build,
    chat,
    config,
    demo,
    doctor,
    evaluate,
    example,
    export,
    finetune,
    generate,
    glue,
    info,
    inspect,
    predict,
    prepare,
    train,
    verify,
)
from fastattn.errors import DataError, InputError, UnsupportedError
from fastattn.version import __version__

# The module of an optional package, and the extra of fastattn that installs it.
_EXTRAS = {"filelock": "train", "safetensors": "train", "tokenizers": "train", "tqdm": "train", "matplotlib": "bench"}
_EXTRAS |= {"torchmetrics": "eval", "sacrebleu": "eval", "peft": "lora", "PIL": "vision"}
COMMANDS = (
    info, doctor, build, verify, prepare, train, finetune, evaluate, predict, glue, average, generate, chat, export,
    inspect, example, demo,
)  # fmt: skip


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser and those of the commands by name."""
    parser = argparse.ArgumentParser(prog="fastattn", description="Fast attention: check it, train with it.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    for command in commands.choices.values():
        config.add_flag(command)
    return parser, commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; wrong flags exit at once with code 2, as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = make_parser()
    try:
        args = parser.parse_args(config.expand(argv, commands))
        return args.run(args)
    except (DataError, InputError, UnsupportedError, FloatingPointError) as error:
        message = str(error)
    except BrokenPipeError:  # the reader of the output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        message = f"the package {error.name!r} is missing: pip install 'fastattn[{_EXTRAS[error.name]}]'"
    except KeyboardInterrupt:
        print("\nfastattn: interrupted", file=sys.stderr)
        return 130
    print(f"fastattn {argv[0]}: {message}", file=sys.stderr)
    return 2
