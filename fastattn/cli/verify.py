"""``fastattn verify``: the error of each usable backend against fp64."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastattn.cli import device
from fastattn.errors import input_error
from fastattn.files import write_text

CHECKED = ("triton",)  # backends that are selected automatically after a passed self-check


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Compare each usable backend with fp64 over the grid of cases; exit code 1 if one breaks the tolerance rule."
    parser = commands.add_parser("verify", help="check numerics on this machine", description=text)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="also judge N random problems")
    jobs = "processes for the random problems (default 1)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems (default 0)")
    record = "only run the self-check that automatic selection of a GPU backend requires, and store its verdict"
    parser.add_argument("--record", action="store_true", help=record)
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.testing.fuzz import fuzz
    from fastattn.testing.verify import verify

    if args.fuzz < 0:
        raise input_error("--fuzz", args.fuzz, "a number >= 0", "0 judges the grid of cases alone.")
    if args.jobs < 1:
        raise input_error("--jobs", args.jobs, "a number >= 1", "The number of cores is the most that helps.")
    target = str(device.choose(args.device))
    if args.record:
        return _record(target, args.backend)
    report = verify(device=target, quick=args.quick, backends=args.backend)
    print(report.table(), flush=True)
    failure = fuzz(args.fuzz, args.seed, target, args.backend, jobs=args.jobs) if args.fuzz else None
    if args.fuzz:
        print(f"\n{failure}" if failure else f"\n{args.fuzz} random problems: all within the tolerance rule")
    if args.json:
        found = report.to_dict() | {"fuzz": {"problems": args.fuzz, "failure": str(failure) if failure else None}}
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    return 0 if report.ok and failure is None else 1


def _record(target: str, backends: list[str] | None) -> int:
    """Run the self-check of each backend with kernels for this GPU, print its verdict, and store it."""
    import torch

    from fastattn import backends as all_backends
    from fastattn.evidence import check_again

    if torch.device(target).type != "cuda":
        raise input_error("--record", f"--device {target}", "--device cuda", "Only a GPU backend needs a self-check.")
    major, minor = torch.cuda.get_device_capability(target)
    failed = False
    for name in backends or CHECKED:
        missing = all_backends().get(name, "there is no such backend")
        verdict = None if missing else check_again(name, 10 * major + minor)
        failed = failed or verdict is None or verdict.failure is not None
        print(f"{name}: {missing or (verdict and verdict.failure) or 'passed, and remembered'}", flush=True)
    return int(failed)
