"""``python -m benchmarks fuzz``: random problems by the hundred thousand, and a record of what was judged.

The problems are judged in blocks, by several processes. Each finished block is a line of the log, so a killed run loses
the blocks in work alone, and the same command goes on where it stopped. A block in which a result missed its bound, by
chance or not, is judged again when the code has changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import command_line, tables
from benchmarks.environment import REPOSITORY
from fastattn.errors import InputError
from fastattn.files import write_text
from fastattn.testing.fuzz import examine, usable
from fastattn.testing.verify import PARTS

BLOCK = 50  # problems
LOG = REPOSITORY / "runs" / "benchmarks" / "fuzz.jsonl"
DTYPES = ("float32", "bfloat16", "float16", "float64")
COLUMNS = ["judged", *DTYPES, "refused", "failed", "by chance", "closest to its bound"]
Block = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--problems", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems and values (default: 0)")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    log = "the finished blocks, to go on from (default: runs/benchmarks/fuzz.jsonl)"
    parser.add_argument("--log", type=Path, default=LOG, metavar="FILE", help=log)


def run(args: argparse.Namespace) -> int:
    for name in ("problems", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}: got {getattr(args, name)}; allowed: at least 1.")
    args.threads = args.threads or 1  # of each process
    device = command_line.device(args, is_timed=False)
    names = args.backend or list(usable())
    record = command_line.record(args, device.type, device)
    source = record.data["environment"]["source"]
    about = {"seed": args.seed, "device": device.type, "backends": names}
    log = Log(args.log, about, source)
    problems = 20 if args.quick else args.problems
    wanted = [(first, min(first + BLOCK, problems)) for first in range(0, problems, BLOCK)]
    judge = functools.partial(judge_block, seed=args.seed, device=device.type, backends=names)
    with tqdm(total=problems, desc="fuzz", unit="problem", disable=args.quiet) as bar:
        bar.update(sum(end - first for first, end in wanted if (first, end) in log.blocks))
        missing = [block for block in wanted if block not in log.blocks]
        for found in in_processes(judge, missing, args.jobs, args.threads):
            log.add(found)
            bar.update(found["end"] - found["first"])
    blocks = [log.blocks[block] for block in wanted]
    failures = [failure for block in blocks for failure in block["failures"]]
    for row in rows(blocks):
        record.add(row)
    record.set(columns=COLUMNS, problems=problems, seed=args.seed, failures=failures, **summary(blocks))
    record.finish(device)
    print(tables.table(record.data), *failures, sep="\n\n")
    return 1 if failures else 0


class Log:
    """The finished blocks, by the numbers of their first problem and of the one after their last.

    Args:
        path: the file, a line of JSON for each block.
        about: what all blocks have in common.
        source: the code that judges; blocks in which a result missed its bound under other code are left out.

    Raises:
        InputError: the file is of a run with other options.
    """

    def __init__(self, path: Path, about: dict[str, Any], source: str) -> None:
        self.path, self.source = path, source
        self.blocks: dict[tuple[int, int], Block] = {}
        head, *lines = list(_lines(path)) or [about]
        if head != about:
            raise InputError(
                f"--log: {path} is of other problems or backends: {head}. Choose another file, or remove it."
            )
        for block in lines:
            by_chance = any(count[3] for count in block["counts"].values())
            if block["source"] == source or not (block["failures"] or by_chance):
                self.blocks[block["first"], block["end"]] = block
        # whole lines alone: what a killed run wrote last may end anywhere
        write_text(path, "".join(json.dumps(line) + "\n" for line in (about, *self.blocks.values())))

    def add(self, block: Block) -> None:
        block = block | {"source": self.source}
        self.blocks[block["first"], block["end"]] = block
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(block) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def in_processes(judge: Any, blocks: Sequence[tuple[int, int]], jobs: int, threads: int) -> Iterator[Block]:
    """The judged blocks, in the order in which they are done.

    Raises:
        BrokenProcessPool: a process died. What is in the log stays.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,))
    try:
        for done in concurrent.futures.as_completed([pool.submit(judge, block) for block in blocks]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def judge_block(block: tuple[int, int], seed: int, device: str, backends: Sequence[str]) -> Block:
    """Judge the problems of some numbers: how many calls ran, were refused and failed, by way, backend and dtype."""
    counts: dict[str, list[float]] = {}
    failures, begin = [], time.process_time()
    for number in range(*block):
        for trial in examine(number, seed, device, backends):
            result = trial.result
            key = f"{trial.way}/{result.backend}/{str(result.case.dtype).removeprefix('torch.')}"
            ran, refused, failed, by_chance, closest = counts.get(key, (0, 0, 0, 0, 0.0))
            worst = result.worst.strain if result.worst and result.ok else 0.0
            ran, refused = ran + bool(result.rows or result.broken), refused + (not result.rows and not result.broken)
            failed, by_chance = failed + trial.failed, by_chance + trial.is_by_chance
            counts[key] = [ran, refused, failed, by_chance, max(closest, round(worst, 3))]
            if trial.failed:
                failures.append(f"# problem {number}\n{trial.smallest()}")
    first, end = block
    seconds = round(time.process_time() - begin, 2)
    return {"first": first, "end": end, "seconds": seconds, "counts": counts, "failures": failures}


def rows(blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """A row for both passes of each backend, and one for each other way to call one."""
    table: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for key, (ran, refused, failed, by_chance, closest) in block["counts"].items():
            way, backend, dtype = key.split("/")
            name = f"{way}, {backend}" if way in PARTS else way
            row = table.setdefault(name, {"judged": name} | dict.fromkeys(COLUMNS[1:], 0))
            for column, more in zip((dtype, *COLUMNS[-4:-1]), (ran, refused, failed, by_chance), strict=True):
                row[column] += more
            row[COLUMNS[-1]] = max(row[COLUMNS[-1]], closest)
    order = [*PARTS, ""]
    yield from sorted(table.values(), key=lambda row: (order.index(_part(row["judged"])), row["judged"]))


def _part(name: str) -> str:
    return next((part for part in PARTS if name.startswith(f"{part},")), "")


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """The time of a problem, and by which code how many were judged."""
    sources: dict[str, int] = {}
    for block in blocks:
        sources[block["source"]] = sources.get(block["source"], 0) + block["end"] - block["first"]
    per_problem = sorted(block["seconds"] / (block["end"] - block["first"]) for block in blocks)
    return {
        "cpu_seconds": round(sum(block["seconds"] for block in blocks)),
        "cpu_ms_per_problem": round(1000 * per_problem[len(per_problem) // 2], 1),
        "sources": sources,
    }
