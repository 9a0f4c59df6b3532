"""``fastattn build``: compile the kernels ahead of their first use."""

from __future__ import annotations

import argparse

from fastattn.errors import DataError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Compile the kernels of csrc/ ahead of time into the cache, where every process of this user finds them."
    parser = commands.add_parser("build", help="compile the kernels ahead of time", description=text)
    parser.add_argument(
        "--cpu", action="store_true", help="the CPU kernels, the default; takes seconds, needs a C++ compiler"
    )
    parser.add_argument(
        "--cuda", action="store_true", help="the CUDA kernels for Hopper; takes minutes, needs nvcc and ninja"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.backends import cpu
    from fastattn.backends.cuda import library
    from fastattn.compiled import BuildError

    try:
        if args.cuda:
            print(f"CUDA kernels: {library.build_kept()}")
        if args.cpu or not args.cuda:
            print(f"CPU kernels: {cpu.delivery()}")
    except BuildError as error:
        raise DataError(f"The kernels cannot be built: {error}") from None
    return 0
