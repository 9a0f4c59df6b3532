"""``python -m benchmarks gpu --out DIR``: all tests and benchmarks that need a GPU, offline, in under nine minutes.

Each step of ``gpu_plan.py`` is a group of processes with a time limit, killed as a group. Each result is written to
disk at once. A step that is missing, fails or takes too long is a row of the report and does not stop the others. No
step starts a self-check. ``--rehearse`` runs the same plan on the simulated device and prints which steps would be left
undone at which minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fastattn
from benchmarks import command_line, report, tables
from benchmarks.environment import REPOSITORY
from benchmarks.gpu_plan import KERNELS, Plan, Step, timetable, undone
from benchmarks.record import Record, read
from fastattn.errors import DataError, InputError
from fastattn.files import write_text
from fastattn.testing import simulated

COLUMNS = ["step", "result", "seconds", "note"]
TAIL = 3000  # characters of output that a row keeps
MOST_LINES = 95
LEAST_S = 5.0  # no step begins with less time left
REHEARSAL_PATIENCE = 20.0  # factor on the time limit of a step in the interpreter
LIMIT_S = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser, out_is="DIR")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help=f"end after S seconds ({LIMIT_S:g})")
    parser.add_argument("--rehearse", action="store_true", help="on the simulated device: does every step work?")


def run(args: argparse.Namespace) -> int:
    if args.rehearse and (reason := simulated.unavailable_reason()):
        raise InputError(f"--rehearse: {reason}.")
    if not args.rehearse and args.device != "cuda":
        raise InputError(f"gpu: got --device {args.device}; allowed: cuda, or --rehearse, which needs no GPU.")
    with simulated.present() if args.rehearse else contextlib.nullcontext():
        device = command_line.device(argparse.Namespace(**vars(args) | {"device": "cuda"}))
        out = (args.out or Path("runs") / "gpu").resolve()
        shutil.rmtree(out / "caches", ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        for stale in out.glob("*.json"):
            stale.unlink()
        record = Record("gpu", args.command_line, device, out / "gpu.json")
        record.set(columns=COLUMNS)
        missing = {name: why for name, why in fastattn.backends().items() if name in KERNELS and why is not None}
        for name, why in missing.items():
            record.add({"step": f"backend {name}", "result": "missing", "note": why})
        plan = Plan(out, tuple(name for name in KERNELS if name not in missing), args.rehearse)
        _follow(plan, record, time.monotonic() + args.limit * (REHEARSAL_PATIENCE if args.rehearse else 1), args.quiet)
        record.finish(device)
        _conclude(record, out)
    if args.rehearse:
        print("\n".join(_left_undone(Plan(out, KERNELS), args.limit)))
    return int(
        args.rehearse and any(row["result"] in ("failed", "crashed", "timed out") for row in record.data["results"])
    )


def _follow(plan: Plan, record: Record, deadline: float, quiet: bool) -> None:
    unsafe: set[str] = set()
    for phase in tqdm(plan.phases(unsafe), desc="gpu", disable=quiet):
        with ThreadPoolExecutor(max(1, len(phase))) as pool:
            for step, row in zip(phase, pool.map(lambda step: _perform(step, plan, deadline), phase), strict=True):
                record.add(row)
                if step.backend is not None and row["result"] in ("crashed", "timed out"):
                    unsafe.add(step.backend)


def _environment(step: Step, plan: Plan) -> dict[str, str]:
    """The environment of a step: self-checks off, and one cache for the kernels that all steps compile."""
    caches = plan.out / "caches"
    env = os.environ | {"FASTATTN_SELF_CHECK": "0", "TRITON_CACHE_DIR": str(caches / "triton"), **step.env}
    paths = [str(REPOSITORY), env.get("PYTHONPATH", "")]
    if plan.rehearses:
        paths.insert(0, str(simulated.startup_folder()))
        env["OMP_NUM_THREADS"] = "1"
    else:
        env["FASTATTN_CACHE"] = str(caches / "fastattn")
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _perform(step: Step, plan: Plan, deadline: float) -> dict[str, str]:
    """Run a step and return its row. Its output is written to disk while it runs."""
    began = time.monotonic()
    row = {"step": step.name, "result": "ok", "seconds": "", "note": "", "output": ""}
    if plan.rehearses and not step.is_rehearsed:
        return row | {"result": "not rehearsed", "note": "the simulated device cannot run it"}
    left = deadline - began
    if left < LEAST_S:
        return row | {"result": "not begun", "note": "out of time"}
    if shutil.which(step.command[0]) is None:
        return row | {"result": "missing", "note": f"{step.command[0]} is not installed"}
    log = plan.out / f"{step.name.replace(', ', '-').replace(' ', '-')}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            step.command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=_environment(step, plan), start_new_session=True,
        )  # fmt: skip
        code = _ended(process, min(left, step.limit_s * (REHEARSAL_PATIENCE if plan.rehearses else 1)))
    output = log.read_text(errors="replace")
    row |= {"seconds": _since(began), "output": output[-TAIL:]}
    if code is None:
        row |= {"result": "timed out", "note": _last_line(output)}
    elif code != 0:
        crashed = code < 0 or code == 3  # a signal, or the exit code of ops for a device that failed
        row |= {"result": "crashed" if crashed else "failed", "note": f"exit code {code}: {_last_line(output)}"}
    elif step.record is None:
        row |= {"note": _last_line(output)}
    if step.record is not None:
        row |= _verdicts(step.record, row)
    return row


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None if the time limit passed. All its processes are killed, so that none stays on the GPU."""
    code = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(limit_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in the driver must not stop the rest
            process.wait(2)
    return code


def _left_undone(plan: Plan, limit_s: float) -> list[str]:
    """Tables of when each step would run on a GPU if all took their whole limit, and what a shorter run would omit."""
    lines = ["", "| from | to | steps |", "| --- | --- | --- |"]
    for begin, end, phase in timetable(plan, limit_s):
        lines.append(f"| {_clock(begin)} | {_clock(end)} | {', '.join(step.name for step in phase)} |")
    lines += ["", "| taken away at | left undone |", "| --- | --- |"]
    for minute in range(1, int(limit_s // 60) + 1):
        left = undone(plan, limit_s, minute)
        lines.append(f"| minute {minute} | {len(left)}: {', '.join(left) or 'nothing'} |")
    return lines


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f}"


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no output"


def _verdicts(path: Path, row: dict[str, str]) -> dict[str, str]:
    """``row`` with the verdicts of the correctness gate in an ops record of one peer as its note."""
    try:
        results = read(path)["results"]
    except DataError:
        return {}
    why = [peer["why"] for result in results for peer in result["peers"].values() if peer["why"]]
    passes = [found for result in results for peer in result["peers"].values() for found in peer["passes"].values()]
    errors = [found["error"] for found in passes if "error" in found]
    if errors or why:
        return {
            "result": row["result"] if row["result"] != "ok" else "failed" if errors else "cannot",
            "note": (errors + why)[0][:160],
        }
    return {"note": "; ".join(dict.fromkeys(found["gate"] for found in passes if "gate" in found))[:160]}


def _conclude(record: Record, out: Path) -> None:
    """Write report.md and the plots, and print the short table."""
    parts = {}
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(DataError):
            parts[path.stem] = read(path)
    parts.pop("gpu", None)
    sections = [
        f"# Tests and benchmarks on {record.data['environment']['device']}",
        tables.conditions(record.data),
        tables.table(record.data),
    ]
    sections += [f"## {name}\n\n{tables.conditions(part)}\n\n{tables.table(part)}" for name, part in parts.items()]
    for name, part in parts.items():
        if part["kind"] == "ops":
            try:
                sections += [f"![{path.stem}]({path.name})" for path in report.draw(part, out, name)]
            except Exception as error:  # without a plot the numbers are still reported
                sections.append(f"No plots of {name}: {error}")
    outputs = [
        row for row in record.data["results"] if row.get("output") and row["step"].startswith(("profile", "ncu"))
    ]
    sections += [f"## {row['step']}\n\n```\n{row['output'].rstrip()}\n```" for row in outputs]
    write_text(out / "report.md", "\n\n".join(sections) + "\n")
    print("\n".join(_short(record, [part for part in parts.values() if part["kind"] == "ops"], out)))


def _short(record: Record, parts: list[tables.Record], out: Path) -> list[str]:
    """Under 100 lines: the result of each step, then our fastest kernel beside the fastest peer."""
    rows = [[row.get(column, "")[:100] for column in COLUMNS] for row in record.data["results"]]
    lines = tables.markdown(COLUMNS, rows).splitlines()
    cells = [
        [result["id"], pass_name, *_beside(result, pass_name)]
        for part in parts for result in part["results"] for pass_name in tables.passes_of(result)
    ]  # fmt: skip
    if cells:
        lines += ["", *tables.markdown(["case", "pass", "ours", "time", "vs best peer"], cells).splitlines()]
    cut = lines[:MOST_LINES] + ([f"... {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else [])
    return [*cut, f"all of it: {out / 'report.md'}"]


def _beside(result: dict[str, Any], pass_name: str) -> tuple[str, str, str]:
    ours = {name: tables.timing(result, name, pass_name) for name in result["peers"] if name.startswith(tables.OURS)}
    timed = {name: timing for name, timing in ours.items() if timing is not None}
    if not timed:
        return "none", "", ""
    best = min(timed, key=lambda name: timed[name].median)
    rivals = tables.rivals(result, pass_name)
    rival = min(rivals, key=lambda name: rivals[name].median, default=None)
    ratio = f"{timed[best].times_faster_than(rivals[rival]):.2f}× {rival}" if rival else ""
    return best, tables.seconds(timed[best].median), ratio
