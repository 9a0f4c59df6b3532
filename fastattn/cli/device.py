"""The ``--device`` flag of every command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default auto: a GPU if any)"
    )


def choose(name: str) -> torch.device:
    """The device of this name; raises InputError if this machine has none."""
    import torch

    from fastattn.errors import input_error

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable = ["auto", "cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            usable.append("mps")
        raise input_error("--device", repr(name), ", ".join(usable), "See fastattn info.") from error
    return device
