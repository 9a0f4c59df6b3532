"""``python -m benchmarks gpu --out DIR``: everything a GPU can tell, offline, in under nine minutes.

Each step is a process of its own under a time limit, and each result is on disk as soon as it is there. What is
missing, fails or takes too long is a row, not the end. A kernel runs first alone, on small problems: a backend that
crashes or hangs there is left out of what follows.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import fastattn
from benchmarks import command_line, report, tables
from benchmarks.environment import REPOSITORY
from benchmarks.peers import chosen
from benchmarks.record import Record, read
from benchmarks.suites import SUITES
from fastattn.errors import DataError
from fastattn.files import write_text

COLUMNS = ["step", "result", "seconds", "note"]
TAIL = 3000  # characters of output that a row keeps
MOST_LINES = 95
BENCH = (sys.executable, "-m", "benchmarks")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: its row.
        command: what to run; its program may be missing.
        limit_s: ended after this long.
        record: an ops record whose verdicts become the note of the row.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    record: Path | None = None


@dataclass(frozen=True)
class Plan:
    """The arguments, as the steps need them."""

    device: str
    quick: bool
    out: Path
    scratch: Path
    backends: tuple[str, ...]

    @property
    def common(self) -> tuple[str, ...]:
        return ("--device", self.device, "--quiet", *(("--quick",) if self.quick else ()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser, out_is="DIR")
    parser.add_argument("--limit", type=float, default=500, metavar="S", help="begin nothing after S seconds (500)")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    out = args.out or Path("runs") / "gpu"
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("gpu.json", "ops.json", "model.json", "overhead.json"):
        (out / stale).unlink(missing_ok=True)
    record = Record("gpu", args.command_line, device, out / "gpu.json")
    record.set(columns=COLUMNS)
    usable = tuple(name for name, why in fastattn.backends().items() if why is None and name != "eager") or ("eager",)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(device.type, args.quick, out, Path(scratch), usable)
        _follow(plan, record, time.monotonic() + args.limit, args.quiet)
    record.finish(device)
    _conclude(record, out)
    return 0


def _follow(plan: Plan, record: Record, deadline: float, quiet: bool) -> None:
    for name, why in fastattn.backends().items():
        if why is not None:
            record.add({"step": f"backend {name}", "result": "missing", "note": why})
    first = list(_first_steps(plan))
    # processes may share a GPU while nothing is timed; a CPU, on which this only rehearses, may be slow and busy
    workers, patience = (4, 1.0) if plan.device == "cuda" else (1, 5.0)
    unsafe: set[str] = set()
    perform = functools.partial(_perform, deadline=deadline, patience=patience)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(first), desc="kernels", disable=quiet) as bar:
        rows = pool.map(perform, [step for _, step in first])
        for (backend, _), row in zip(first, rows, strict=True):
            record.add(row)
            bar.update()
            if row["result"] in ("crashed", "timed out"):
                unsafe.add(backend)
    for step in tqdm(list(_steps(plan, unsafe)), desc="gpu", disable=quiet):
        record.add(perform(step))


def _first_steps(plan: Plan) -> Iterator[tuple[str, Step]]:
    cases = SUITES["first"].cases[: 1 if plan.quick else None]
    for backend in plan.backends:
        for n, workload in enumerate(SUITES["first"].quick().cases[:1] if plan.quick else cases):
            path = plan.scratch / f"{backend}-{n}.json"
            options = ("--suite", "first", "--case", workload.id, "--peers", f"fastattn-{backend}", "--no-memory")
            command = (*BENCH, "ops", *plan.common, *options, "--effort", "0.1", "--out", str(path))
            yield backend, Step(f"first run, {backend}: {workload.id}", command, 60, path)


def _steps(plan: Plan, unsafe: set[str]) -> Iterator[Step]:
    """Most telling first: what the time does not suffice for is at the end."""
    safe = [backend for backend in plan.backends if backend not in unsafe]
    quick = ("--quick",) if plan.quick else ()
    verify = (sys.executable, "-m", "fastattn", "verify", "--device", plan.device, *quick)
    for backend in safe:
        yield Step(f"verify, {backend}", (*verify, "--backend", backend), 60)
    for backend in unsafe:
        yield Step(f"verify, {backend} (crashed above)", (*verify, "--backend", backend), 30)
    yield from _op_steps(plan, unsafe)
    model = (*BENCH, "model", *plan.common, "--append", "--out", str(plan.out / "model.json"))
    yield Step("model", (*model, "--compile", "no"), 70)
    overhead = (
        "overhead",
        *plan.common,
        *(() if plan.quick else ("--quick",)),
        "--out",
        str(plan.out / "overhead.json"),
    )
    yield Step("overhead", (*BENCH, *overhead), 40)
    for backend in safe:
        profile = (sys.executable, "-m", "benchmarks.profile_call", plan.device, backend)
        yield Step(f"profile, {backend}", profile, 30)
        counters = ("ncu", "--clock-control", "none", "--launch-skip", "10", "--launch-count", "3")
        yield Step(f"ncu, {backend}", (*counters, *profile), 45)
        yield Step(f"compute-sanitizer, {backend}", _sanitized(plan, backend), 60)
    if plan.device == "cuda":
        yield Step("model, compiled", (*model, "--compile", "yes"), 100)


def _op_steps(plan: Plan, unsafe: set[str]) -> Iterator[Step]:
    """The suites. Compiling takes seconds for each shape, so only the suites with few shapes have such peers."""
    # fastattn chooses by itself, so it is as safe as the least safe backend
    left_out = {f"fastattn-{backend}" for backend in unsafe} | ({"fastattn"} if unsafe else set())
    all_peers = [peer.name for peer in chosen(None, plan.device) if peer.name not in left_out]
    quickly = [name for name in all_peers if name not in ("flex", "eager-compiled", "sdpa-math")]
    suites = [
        ("llm", all_peers, 60.0),
        ("paper", quickly, 110.0),
        ("features", all_peers, 60.0),
        ("small", quickly, 20.0),
    ]
    for name, peers, budget in suites if plan.device == "cuda" else [("cpu", all_peers, 60.0)]:
        options = (
            "--suite",
            name,
            "--peers",
            *peers,
            "--effort",
            "0.3",
            "--append",
            "--out",
            str(plan.out / "ops.json"),
        )
        seconds = min(budget, 5.0) if plan.quick else budget
        memory = ("--no-memory",) if plan.quick else ()
        command = (*BENCH, "ops", *plan.common, *options, *memory, "--budget", str(seconds))
        yield Step(f"ops, {name}", command, budget + 40)


def _sanitized(plan: Plan, backend: str) -> tuple[str, ...]:
    case = SUITES["first"].quick().cases[0].id
    options = ("--device", plan.device, "--quiet", "--quick", "--no-memory", "--suite", "first", "--case", case)
    out = str(plan.scratch / "sanitized.json")
    return (
        "compute-sanitizer",
        "--error-exitcode",
        "9",
        *BENCH,
        "ops",
        *options,
        "--peers",
        f"fastattn-{backend}",
        "--out",
        out,
    )


def _perform(step: Step, deadline: float, patience: float) -> dict[str, str]:
    """Run a step and say how it went."""
    began = time.monotonic()
    row = {"step": step.name, "result": "ok", "seconds": "", "note": "", "output": ""}
    left = deadline - began
    if left < 5:
        return row | {"result": "not begun", "note": "out of time"}
    if shutil.which(step.command[0]) is None:
        return row | {"result": "missing", "note": f"{step.command[0]} is not installed"}
    try:
        done = subprocess.run(
            step.command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=min(patience * step.limit_s, left),
        )  # fmt: skip
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        return row | {
            "result": "timed out",
            "seconds": _since(began),
            "note": _last_line(output),
            "output": output[-TAIL:],
        }
    row |= {"seconds": _since(began), "output": output[-TAIL:]}
    if code != 0:
        crashed = code < 0 or code == 3  # a signal, or ops's word for a device that failed
        row |= {"result": "crashed" if crashed else "failed", "note": f"exit code {code}: {_last_line(output)}"}
    if step.record is not None:
        row |= _verdicts(step.record, row)
    return row


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f}"


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no output"


def _verdicts(path: Path, row: dict[str, str]) -> dict[str, str]:
    """What the gate said in an ops record of one peer."""
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
    """report.md and the plots, and the short table on the terminal."""
    parts = {}
    for name in ("ops", "model", "overhead"):
        try:
            parts[name] = read(out / f"{name}.json")
        except DataError as error:
            print(f"no {name}: {error}")
    sections = [
        f"# Everything {record.data['environment']['device']} told",
        tables.conditions(record.data),
        tables.table(record.data),
    ]
    sections += [f"## {name}\n\n{tables.conditions(part)}\n\n{tables.table(part)}" for name, part in parts.items()]
    if "ops" in parts:
        try:
            sections += [f"![{path.stem}]({path.name})" for path in report.draw(parts["ops"], out, "ops")]
        except Exception as error:  # a picture must not cost the numbers
            sections.append(f"No plots: {error}")
    outputs = [
        row for row in record.data["results"] if row.get("output") and row["step"].startswith(("profile", "ncu"))
    ]
    sections += [f"## {row['step']}\n\n```\n{row['output'].rstrip()}\n```" for row in outputs]
    write_text(out / "report.md", "\n\n".join(sections) + "\n")
    print("\n".join(_short(record, parts.get("ops"), out)))


def _short(record: Record, ops: tables.Record | None, out: Path) -> list[str]:
    """Under 100 lines: what failed, then the best the suites have."""
    rows = [[row.get(column, "")[:100] for column in COLUMNS] for row in record.data["results"]]
    lines = tables.markdown(COLUMNS, rows).splitlines()
    if ops is not None:
        cells = []
        for result in ops["results"]:
            for pass_name in tables.passes_of(result):
                best, own = tables.best_rival(result, pass_name), tables.timing(result, tables.OURS, pass_name)
                if own is not None:
                    ratio = f"{best[1]:.2f}× {best[0]}" if best else ""
                    cells.append([result["id"], pass_name, tables.seconds(own.median), ratio])
        lines += ["", *tables.markdown(["case", "pass", "fastattn", "vs best peer"], cells).splitlines()]
    cut = lines[:MOST_LINES] + ([f"... {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else [])
    return [*cut, f"all of it: {out / 'report.md'}"]
