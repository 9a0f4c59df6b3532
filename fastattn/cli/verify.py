"""``fastattn verify``: the error of each usable backend against fp64."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastattn.cli import device


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Compare each usable backend with fp64 over the grid of cases; exit code 1 if one breaks the tolerance rule."
    parser = commands.add_parser("verify", help="check numerics on this machine", description=text)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.testing.verify import verify

    report = verify(device=str(device.choose(args.device)), quick=args.quick, backends=args.backend)
    print(report.table())
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0 if report.ok else 1
