"""Peak memory of one call, in addition to its operands.

On CUDA the allocator reports it. On a CPU no torch counter includes the memory of kernels and libraries, so a fresh
process runs the call and reads the high-water mark of its resident memory, reset just before (Linux). ``getrusage``
does not work: its mark cannot be reset, and building the operands would have raised it already.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from fastattn.measure import correctness
from fastattn.measure.correctness import Verdict
from fastattn.measure.peers import EAGER, SDPA, fastattn_peer, pass_call
from fastattn.measure.workload import Operands, Workload

_STATUS = Path("/proc/self/status")
Result = TypeVar("Result")


def cuda_peak(call: Callable[[], object]) -> int:
    """Peak bytes of CUDA's allocator during ``call``, minus those allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def process_peak(call: Callable[[], Result]) -> tuple[int, Result]:
    """The peak of resident memory during ``call`` minus the bytes resident before, and the result of ``call``."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call could use freed memory that malloc still holds
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    return max(0, _status_bytes("VmHWM") - before), result


def cannot_measure_process() -> str | None:
    """The reason why ``process_peak`` does not work on this machine; None if it does."""
    if not _STATUS.exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        return "needs Linux's /proc/self/clear_refs"
    return None


def available_bytes() -> int:
    """Memory of the machine that is free or can be freed."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@dataclass(frozen=True)
class Peak:
    """The peak memory of one pass of one peer, and the verdict of the correctness gate on the measured call."""

    peer: str
    pass_name: str
    bytes: int
    verdict: Verdict


def in_fresh_process(
    workload: Workload, peers: Sequence[str], passes: Sequence[str], timeout_s: float = 600
) -> list[Peak]:
    """CPU peaks of the named peers, all in one process that does nothing else. If it dies, later peaks are missing.

    Args:
        workload: what to run.
        peers: of ``PEERS`` below.
        passes: "forward", "both".
        timeout_s: the process is ended after this long; finished measurements are kept.
    """
    names = {"peers": list(peers), "passes": list(passes)}
    task = {"workload": workload.to_dict(), "threads": torch.get_num_threads(), **names}
    command = [sys.executable, "-m", "fastattn.measure.memory"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(json.dumps(task), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    found = (json.loads(line) for line in output.splitlines() if line.endswith("}"))
    return [Peak(**{**peak, "verdict": Verdict(**peak["verdict"])}) for peak in found]


PEERS = {peer.name: peer for peer in (fastattn_peer(None), EAGER, SDPA)}


def _main() -> None:
    """The fresh process: a task on stdin, a line of JSON for each peak on stdout."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    w = Workload.from_dict(task["workload"])
    small = Workload(s_q=64, s_kv=64, heads_q=1, heads_kv=1, d_qk=w.d_qk, d_v=w.d_v, dtype=w.dtype)
    first, operands = (Operands.of(each, torch.device("cpu")) for each in (small, w))
    part = correctness.Part.of(operands)
    # the gate needs the gradient of the sampled part alone; memory does not depend on the values of dout
    operands = dataclasses.replace(operands, dout=part.only(operands.dout))
    for name, pass_name in itertools.product(task["peers"], task["passes"]):
        peer = PEERS[name]
        pass_call(peer.prepare(first), first, pass_name)()  # loads libraries and starts threads
        taken, (out, gradients) = process_peak(pass_call(peer.prepare(operands), operands, pass_name))
        assert out is not None
        verdict = correctness.judge(part, operands, out, gradients)
        print(json.dumps(dataclasses.asdict(Peak(name, pass_name, taken, verdict))), flush=True)


if __name__ == "__main__":
    _main()
