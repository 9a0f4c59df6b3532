"""Arguments shared by several commands."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import torch

from benchmarks.record import Record
from fastattn.errors import InputError
from fastattn.testing import simulated


def add_common(parser: argparse.ArgumentParser, out_is: str = "FILE") -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="tiny problems, few rounds: does everything work?")
    parser.add_argument("--out", type=Path, metavar=out_is, help="where the record goes (default: below runs)")
    parser.add_argument("--append", action="store_true", help="go on with the record at --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def device(args: argparse.Namespace, *, is_timed: bool = True) -> torch.device:
    """The device asked for, its threads set.

    Raises:
        InputError: this machine has no such device, or Triton's interpreter would be measured.
    """
    is_rehearsed = args.device == "cuda" and torch.cuda.is_available() and simulated.is_present()
    if is_timed and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and not is_rehearsed:
        raise InputError("TRITON_INTERPRET is set: its interpreter would be measured, not a kernel. Unset it.")
    if args.device not in ("cpu", "cuda"):
        raise InputError(f"--device: got {args.device!r}; allowed: cpu, cuda.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: got 'cuda', but torch sees no GPU. Use --device cpu, or a CUDA build of torch.")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads: got {args.threads}; allowed: at least 1.")
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def record(args: argparse.Namespace, name: str, on: torch.device) -> Record:
    """The record that a command fills."""
    return Record(args.command, args.command_line, on, out(args, name), append=args.append)


def out(args: argparse.Namespace, name: str) -> Path:
    """The file of the record."""
    if args.out is not None:
        return args.out
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "benchmarks" / f"{args.command}-{name}-{moment}.json"
