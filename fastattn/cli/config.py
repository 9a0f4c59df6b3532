"""Settings from a TOML file, for every command. Its keys are the command's flags; flags on the command line override
it.

A file is turned into flags before those of the command line, so argparse checks types, choices and required flags of
both. For one file that serves several commands, put the keys of each into a table of its name.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastattn.errors import DataError, InputError, input_error
from fastattn.files import read_limited

_NAMES = {int: "an integer", float: "a number", bool: "true or false"}


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="append", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help="TOML file whose keys are these flags (steps = 500); flags given here win; may be repeated",
    )  # fmt: skip


def expand(argv: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """``argv`` with the settings of its ``--config`` files as flags before the others.

    Args:
        argv: the command's name first.
        commands: the parser of each command.

    Raises:
        DataError: a file is missing or is not TOML.
        InputError: it has a key or a value that the command does not accept.
    """
    if not argv or argv[0] not in commands:
        return list(argv)
    command, given = argv[0], list(argv[1:])
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flag(finder)
    files = getattr(finder.parse_known_args(given)[0], "config", [])
    flags = [token for path in files for token in _flags_of(path, command, given, commands)]
    return [command, *flags, *given]


def _flags_of(
    path: Path, command: str, given: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]
) -> list[str]:
    settings = _settings(path, command, commands)
    options = {
        option.removeprefix("--"): action
        for option, action in commands[command]._option_string_actions.items()
        if option.startswith("--") and option not in ("--help", "--config")
    }
    flags = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name not in options:
            near = difflib.get_close_matches(name, options, 3) or sorted(options) or ["nothing"]
            raise input_error(f"{path}: {key}", value, ", ".join(near), f"See fastattn {command} --help.")
        try:
            flags += _tokens(f"--{name}", value, options[name], given)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return flags


def _settings(path: Path, command: str, commands: Mapping[str, argparse.ArgumentParser]) -> dict[str, object]:
    """The keys of the file that are meant for the command."""
    try:
        content = tomllib.loads(read_limited(path, 1 << 20))
    except OSError as error:
        raise DataError(f"--config {path} cannot be read: {error.strerror or error}.") from error
    except RecursionError:
        raise DataError(f"--config {path} is nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise DataError(f"--config {path} is not TOML: {error}.") from error
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name in tables:
        if name not in commands:
            todo = "A table holds the flags of the command that it is named after."
            raise input_error(f"{path}: [{name}]", "a table of this name", ", ".join(commands), todo)
    return {name: value for name, value in content.items() if name not in tables} | tables.get(command, {})


def _tokens(flag: str, value: object, action: argparse.Action, given: Sequence[str]) -> list[str]:
    """The command-line tokens of one setting."""
    key = flag.removeprefix("--")
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise input_error(key, repr(value), _NAMES[bool], "It is a switch.")
        if value:
            return [flag]
        return [f"--no-{key}"] if f"--no-{key}" in action.option_strings else []
    several = action.nargs in ("+", "*")
    repeated = isinstance(action, argparse._AppendAction)
    if isinstance(value, list) and not (several or repeated):
        raise input_error(key, value, "a single value", "Remove the brackets.")
    texts = [_text(key, item, action) for item in (value if isinstance(value, list) else [value])]
    if repeated:  # argparse would append to the values of the command line, which must override the file
        is_given = any(token == flag or token.startswith(f"{flag}=") for token in given)
        return [] if is_given else [f"{flag}={text}" for text in texts]
    return [flag, *texts] if several else [f"{flag}={texts[0]}"]


def _text(key: str, value: object, action: argparse.Action) -> str:
    if action.type is int:
        is_right = isinstance(value, int) and not isinstance(value, bool)
    elif action.type is float:
        is_right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        is_right = isinstance(value, str)
    if not is_right:
        kind = _NAMES.get(action.type, "a string in quotes")  # type: ignore[call-overload]
        raise input_error(key, repr(value), kind, "See the command's --help.")
    if action.choices is not None and value not in action.choices:
        raise input_error(key, repr(value), ", ".join(map(str, action.choices)), "Choose one of them.")
    return str(value)
