"""``python -m benchmarks overhead``: the time of fastattn outside its kernels: calls, import, installation."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastattn
from benchmarks import command_line, compiled_calls, tables
from benchmarks.environment import REPOSITORY
from benchmarks.peers import PEERS
from fastattn.measure.peers import pass_call
from fastattn.measure.timing import compare, stopwatch
from fastattn.measure.workload import Operands, Workload

COLUMNS = ["what", "value", "beside", "note"]
Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    steps: list[Callable[[], Iterator[Row]]] = [
        lambda: _calls(device, args.quick),
        lambda: _calls_of_a_gpu(args.quick),
        *([] if args.quick else [_compiled]),
        lambda: _imports(1 if args.quick else 7),
        _size,
        *([] if args.quick else [_installation]),
    ]
    for step in tqdm(steps, desc="overhead", disable=args.quiet):
        for row in step():
            record.add(row)
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _calls(device: torch.device, quick: bool) -> Iterator[Row]:
    """Host time of a call on a problem so small that its kernels take little of it."""
    dtype = "bf16" if device.type == "cuda" else "fp32"
    workload = Workload(
        s_q=16, s_kv=16, heads_q=1, heads_kv=1, d_qk=16, d_v=16, dtype=dtype, passes=("forward", "both")
    )
    operands = Operands.of(workload, device)
    able = [PEERS[name] for name in ["sdpa", "fastattn", *(f"fastattn-{backend}" for backend in fastattn.backends())]]
    able = [peer for peer in able if not peer.reasons(workload, device.type)]
    for pass_name in workload.passes:
        calls = {}
        for peer in able:
            try:
                calls[peer.name] = pass_call(peer.prepare(operands), operands, pass_name)
                calls[peer.name]()
            except Exception as error:
                calls.pop(peer.name, None)
                yield {"what": f"one call, {pass_name}, {peer.name}", "value": "failed", "note": str(error)[:200]}
        watch = stopwatch(device, wall=True)
        times = compare(calls, watch, rounds=3 if quick else 31, round_s=0.002 if quick else 0.02)
        for name, timing in times.items():
            ratio = 1 / timing.times_faster_than(times["sdpa"])
            yield {
                "what": f"one call, {pass_name}, {name}",
                "value": f"{tables.seconds(timing.median)} ±{timing.spread:.0%}",
                "beside": f"{ratio:.2f}× sdpa",
                "note": "1 head, 16 tokens, D 16",
            }


KINDS = {"forward": "forward", "both": "forward and backward", "decode": "a paged step with its append"}


def _calls_of_a_gpu(quick: bool) -> Iterator[Row]:
    """Host time of what runs on a GPU, up to the driver, in a process of its own: ``benchmarks/host_time.py``."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.host_time", str(answer), *(["--quick"] if quick else [])]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield {"what": "host time of calls on a GPU", "value": "failed", "note": said[:200]}
            return
        rows = json.loads(answer.read_text(encoding="utf-8"))
    for row in rows:
        kind, who = row["kind"], row["who"]
        where = "on the CPU" if who == "sdpa" else "host time on a GPU"
        yield {
            "what": f"{where}, {KINDS[kind]}, {who}",
            "value": f"{tables.seconds(row['seconds'])} ±{row['spread']:.0%}",
            "beside": f"{row['ratio']:.2f}× sdpa" + (" forward" if kind == "decode" else ""),
            "note": "to the driver, which takes notes alone; 1 head, 16 tokens, D 16" if kind != "decode" else
                    "to the driver, which takes notes alone; 2 sequences, 8 heads, D 64",
        }  # fmt: skip


def _compiled() -> Iterator[Row]:
    """Host time of compiled calls on the CPU, and what it is made of: ``benchmarks/compiled_calls.py``."""
    for row in compiled_calls.rows():
        yield {
            "what": f"a compiled call, forward, {row['what']}",
            "value": f"{tables.seconds(row['seconds'])} ±{row['spread']:.0%}",
            "beside": f"{row['ratio']:.2f}× sdpa",
            "note": "B 1, 32 tokens, 8 heads, D 32; no gradient",
        }


def _imports(rounds: int) -> Iterator[Row]:
    """Import times in fresh processes, with and without fastattn in turn."""
    seconds: dict[str, list[float]] = {"torch": [], "fastattn": []}
    for _ in range(rounds):
        for module, found in seconds.items():
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            found.append(float(done.stdout))
    torch_s, both_s = (statistics.median(found) for found in seconds.values())
    # pairs of one round, so that drift of the machine cancels
    own = statistics.median(both - alone for alone, both in zip(*seconds.values(), strict=True))
    note = f"import torch: {torch_s:.2f} s, import fastattn, which imports it: {both_s:.2f} s"
    yield {"what": "import, above torch's own", "value": tables.seconds(max(own, 0.0)), "note": note}


def _size() -> Iterator[Row]:
    folder = Path(fastattn.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    yield {
        "what": "size of the package",
        "value": tables.size(_bytes(files)),
        "note": f"{len(files)} files, no bytecode",
    }


def _bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _installation() -> Iterator[Row]:
    """``pip install`` of a copy of the sources, without its dependencies and without network."""
    names = ("fastattn", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    with tempfile.TemporaryDirectory() as temporary:
        copy, target = Path(temporary) / "source", Path(temporary) / "target"
        copy.mkdir()
        for source in (REPOSITORY / name for name in names):
            if source.is_dir():
                shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            elif source.exists():
                shutil.copy(source, copy)
        options = [
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--no-compile",
            "--quiet",
            "--target",
            str(target),
        ]
        began = time.perf_counter()
        try:
            done: Any = subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, str(copy)],
                capture_output=True,
                text=True,
                timeout=600,
            )
        except subprocess.TimeoutExpired:
            yield {"what": "installation", "value": "failed", "note": "not done after 600 s"}
            return
        took = time.perf_counter() - began
        if done.returncode != 0:
            yield {
                "what": "installation",
                "value": "failed",
                "note": (done.stderr.strip().splitlines() or ["no message"])[-1],
            }
            return
        installed = _bytes([path for path in target.rglob("*") if path.is_file()])
        note = "pip install from source, dependencies and build tools there"
        yield {"what": "installation", "value": tables.seconds(took), "beside": tables.size(installed), "note": note}
