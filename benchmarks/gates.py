"""``python -m benchmarks gates``: compile the Triton kernels for several GPUs, without one; check the machine code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from fastattn.backends.triton.tools import builds, derived, gates
from fastattn.errors import InputError
from fastattn.files import write_text

EXPECTED = Path(__file__).parent / "expected"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the main shapes only")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at a time (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="builds whose name contains this")
    parser.add_argument(
        "--config", action="append", default=[], type=_config, metavar="MxNxWARPSxSTAGES",
        help="try this configuration in place of the table's; may be repeated",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, metavar="N", help="instead, N builds with features drawn at random")
    parser.add_argument(
        "--derived", action="store_true", help="instead, the kernels of derivatives, statistics and e4m3"
    )
    parser.add_argument(
        "--changed", action="store_true", help="leave out builds whose code and arguments are those of the figures"
    )
    parser.add_argument(
        "--update", action="store_true", help="write the figures that pass as those to expect from now on"
    )


def run(args: argparse.Namespace) -> int:
    try:
        import triton
    except ImportError:
        raise InputError("gates: Triton is not installed, and compiles the kernels. Run: pip install triton") from None
    expected_file = EXPECTED / f"triton-{triton.__version__}.json"
    expected = gates.expected_figures(expected_file)
    todo = _chosen(args)
    there = {build.name for build in (*builds.all_builds(), *derived.all_builds())}
    figures_now = {name: figures for name, figures in expected.items() if name in there}
    todo.sort(key=lambda build: build.name in expected)  # the new ones first
    known = gates.codes(expected) if args.changed else {}
    results, failed = [], {}
    compiled = gates.compiled(todo, args.processes, known)
    for build, figures in tqdm(compiled, total=len(todo), desc="gates", disable=None):
        results.append((build, figures))
        wrong = gates.problems(build, figures, None if args.update else expected.get(build.name))
        if wrong:
            failed[build.name] = wrong
        elif args.update and build.name in there:  # written after each build, so that a kill loses one
            figures_now |= gates.as_expected([(build, figures)])
            _write(expected_file, figures_now)
    if not results:
        print(f"None of {len(todo)} builds has changed.")
        return 0
    print(gates.table(results))
    for name in sorted(failed):
        print(f"FAILED {name}: {'; '.join(failed[name])}")
    slowest, figures = max(results, key=lambda result: result[1].seconds)
    print(f"The slowest to compile: {slowest.name}, {figures.seconds:.1f} s.")
    unchanged = f", {len(todo) - len(results)} have not changed" if args.changed else ""
    print(f"{len(results) - len(failed)} of {len(results)} builds pass{unchanged}, Triton {triton.__version__}")
    if not expected:
        print(f"There are no expected figures for this version; --update writes {expected_file.name}.")
    return 1 if failed else 0


def _chosen(args: argparse.Namespace) -> list[builds.Build]:
    """The builds that the options name."""
    found = builds.sampled(args.sample) if args.sample else builds.all_builds(args.quick)
    found = derived.all_builds() if args.derived else found
    todo = [build for build in found if args.only in build.name]
    if not todo:
        raise InputError(f"--only: no build's name contains {args.only!r}. One of them: {found[0].name!r}.")
    if not args.config:
        return todo
    if args.update or args.changed or args.derived:
        raise InputError("--config tries what is not in the table: leave out --update, --changed and --derived.")
    return [dataclasses.replace(build, config=config) for build in todo for config in args.config]


def _config(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){3}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: four numbers, as in 64x32x8x2")
    return tuple(map(int, text.split("x")))


def _write(path: Path, figures: Mapping[str, object]) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(figures[name])}" for name in sorted(figures))
    write_text(path, f"{{\n{lines}\n}}\n")
