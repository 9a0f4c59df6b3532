"""Files of prompts, and of what they were continued with: JSON lines that are written as they come, and resumed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.errors import DataError
from fastattn.files import read_limited, saying_why, write_text


@dataclass(frozen=True)
class Prompt:
    """A prompt and its name: the ``id`` that its line gives, else its line number, or its file's name."""

    id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder.

    Args:
        path: a ``.jsonl`` file with a ``"prompt"`` (and perhaps an ``"id"``) in each line; any other file, a prompt in
            each line that is not empty; a folder, each file below it one prompt; or "-", lines of either kind from
            standard input.

    Raises:
        DataError: there are none, a line is not what it should be, or two have one id.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        prompts = [Prompt(file.relative_to(path).as_posix(), _read(file)) for file in files]
    else:
        is_stdin = str(path) == "-"
        lines = _lines(sys.stdin.read() if is_stdin else _read(path))
        if path.suffix == ".jsonl" or (is_stdin and all(line.lstrip().startswith("{") for _, line in lines)):
            prompts = [_parsed(path, number, line) for number, line in lines]
        else:
            prompts = [Prompt(str(number), line) for number, line in lines]
    if not prompts:
        raise DataError(f"{path}: no prompts in it. Put one in each line, or in each file of a folder.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"{path}: two prompts have the id {prompt.id!r}. Give each its own, or none.")
        seen.add(prompt.id)
    return prompts


def _read(path: Path) -> str:
    try:
        return read_limited(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text. Convert the file.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Give a file or a folder of prompts.") from error


def _lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r")) for number, line in lines if line.strip()]


def _parsed(path: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error}). Each line is an object.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f'{path}:{number}: no "prompt" in it. Each line is an object like {{"prompt": "Once"}}.')
    return Prompt(str(row.get("id", number)), row["prompt"])


class Results:
    """A file of JSON lines, one for each prompt that is done. Each is on the disk before the next is begun."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open or resume the file at ``path``.

        Args:
            path: of the file; a line that a kill cut off is removed.
            settings: of the run, in the first line: a file is resumed with the settings that began it.

        Raises:
            DataError: the file is none of ours, or was made with other settings.
        """
        self.path = path
        self.done: set[str] = set()
        header = {"settings": settings}
        if not path.exists():
            write_text(path, json.dumps(header) + "\n")
            return
        whole, _, cut_off = _read(path).rpartition("\n")
        lines = whole.split("\n") if whole else []
        try:
            rows = [json.loads(line) for line in lines]
            before, self.done = rows[0]["settings"], {row["id"] for row in rows[1:]}
        except (json.JSONDecodeError, IndexError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} exists and is no file of results. Give another --out, or remove it.") from error
        if before != json.loads(json.dumps(settings)):
            changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            raise DataError(f"{path} was made with other settings ({', '.join(changed)}). Give another --out.")
        if cut_off:
            write_text(path, whole + "\n")

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A function that adds a row, a dict, to the file."""
        with saying_why(self.path), self.path.open("a", encoding="utf-8") as file:

            def add(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

            yield add
