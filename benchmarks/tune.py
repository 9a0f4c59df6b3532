"""``python -m benchmarks tune``: measure the configs of the Triton kernels on this GPU and rewrite their table."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

from fastattn.backends.triton.tools import builds, gates, tuning
from fastattn.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", nargs="+", choices=tuning.KERNELS, default=list(tuning.KERNELS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tuning.HEAD_DIMS, default=list(tuning.HEAD_DIMS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=[16], help="16: bf16, 32: fp32")
    parser.add_argument("--processes", type=int, default=8, help="how many compile at a time (default: 8)")
    parser.add_argument(
        "--table", type=Path, default=tuning.TABLE_FILE, help="rewrite this file (default: the package's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")


def run(args: argparse.Namespace, timer: tuning.Timer | None = None, arch: str | None = None) -> int:
    """Tune and write the table; it is written after each row, so a kill loses one row.

    Args:
        args: the arguments.
        timer: returns the seconds of a piece of work; None measures on the GPU.
        arch: the architecture whose rows are written; None is that of the GPU.
    """
    device = torch.device("cuda" if timer is None else "cpu")
    if timer is None:
        if not torch.cuda.is_available():
            raise InputError("tune: it measures on a GPU, and torch sees none. On a GPU machine run it again.")
        timer = _seconds
    arch = arch or tuning.arch_of(device)
    rows = dict(tuning.table.TABLE)
    keys = list(itertools.product([arch], args.kernels, args.bits, args.head_dims))
    for key in tqdm(keys, desc="rows", disable=None):
        now = tuning.row_of(key)
        configs = _sound(key, tuning.candidates(key[1], key[2], now), args.processes)
        results = list(tuning.measured(key, tqdm(configs, desc=str(key), leave=False, disable=None), timer, device))
        rows[key] = tuning.fastest(results, now)
        _report(key, now, rows[key], results)
        if not args.dry_run:
            tuning.write(rows, args.table)
    return 0


def _sound(key: tuning.Key, configs: list[tuning.Config], processes: int) -> list[tuning.Config]:
    """The configs that pass the compile gates; all of them if the architecture has no gates."""
    arch, kernel, bits, head_dim = key
    if arch not in builds.TARGETS:
        return configs
    plain = kernel.partition(" ")[0]
    problems = builds.served_by(kernel, bits)
    todo = [
        builds.Build(arch, arch, plain, problem, bits, head_dim, config) for config in configs for problem in problems
    ]
    failed = {
        build.config for build, figures in gates.compiled(todo, processes) if gates.problems(build, figures, None)
    }
    return [config for config in configs if config not in failed] or configs[:1]


def _seconds(work: object) -> float:
    """Median time on the GPU."""
    from triton.testing import do_bench

    return do_bench(work, return_mode="median") / 1e3


def _report(key: tuning.Key, now: tuning.Config, chosen: tuning.Config, results: list[tuning.Measured]) -> None:
    seconds = {result.config: result.seconds for result in results}
    was = f"{now} {seconds[now] * 1e3:.3f} ms" if now in seconds else f"{now} does not pass the gates"
    print(f"{key}: {was} -> {chosen} {seconds.get(chosen, float('nan')) * 1e3:.3f} ms, of {len(results)} configs")
