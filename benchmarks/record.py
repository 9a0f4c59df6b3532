"""The record of a run: one JSON file, replaced after each result, so that a kill loses no earlier one."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from fastattn.errors import DataError, InputError
from fastattn.files import write_text

SCHEMA = 1


class Record:
    """The results of a command and the conditions of the measurement.

    Args:
        kind: the command.
        command: the whole command line.
        device: the device of the measurement.
        path: the file; None keeps the record in memory.
        append: continue the record in that file.

    Attributes:
        data: ``schema, kind, command, started, finished, environment`` and ``results``, a list of JSON objects whose
            form each command defines.
    """

    def __init__(
        self, kind: str, command: str, device: torch.device, path: Path | None, *, append: bool = False
    ) -> None:
        self.path = path
        if append and path is not None and path.exists():
            self.data = self._continued(read(path), kind, command, device)
            self.save()
            return
        self.data = {
            "schema": SCHEMA,
            "kind": kind,
            "command": command,
            "started": _now(),
            "finished": None,
            "environment": environment.describe(device),
            "results": [],
        }
        self.save()

    def _continued(self, data: dict[str, Any], kind: str, command: str, device: torch.device) -> dict[str, Any]:
        """The earlier record, if it is of the same kind, device and code."""
        now, then = environment.describe(device), data["environment"]
        same = all(now[field] == then[field] for field in ("device", "commit", "dirty", "source"))
        if data["kind"] != kind or not same:
            raise InputError(f"--append: {self.path} is of another command, device or code. Choose another --out.")
        return data | {"command": f"{data['command']} && {command}", "finished": None}

    def add(self, result: dict[str, Any]) -> None:
        """Append a result and write the file."""
        self.data["results"].append(result)
        self.save()

    def set(self, **fields: Any) -> None:
        """Set top-level fields and write the file."""
        self.data.update(fields)
        self.save()

    def finish(self, device: torch.device) -> None:
        self.set(finished=_now(), clocks_after=environment.clocks(device))

    def save(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.data, indent=1))


def read(path: Path) -> dict[str, Any]:
    """A record from its file.

    Raises:
        DataError: it is missing, or not a record of this schema.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give the JSON of a benchmark, see benchmarks/results/.") from None
    except ValueError:
        raise DataError(f"{path}: not JSON. Give the record of a benchmark.") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise DataError(f"{path}: not a benchmark record of schema {SCHEMA}. Run the benchmark again.")
    return data


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
