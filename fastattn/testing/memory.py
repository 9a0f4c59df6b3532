"""Peak memory of one call, above what its operands take.

On CUDA the allocator knows. On a CPU no torch counter sees what kernels and libraries allocate, so a fresh process
runs the call and reads the kernel's high-water mark of resident memory, reset just before (Linux). ``getrusage`` will
not do: its mark cannot be reset, and building the operands would already have raised it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastattn.testing.peers import EAGER, SDPA, Peer, fastattn_peer
from fastattn.testing.workload import Operands, Workload

_STATUS = Path("/proc/self/status")
Peaks = dict[str, dict[str, int]]  # peer -> pass -> bytes


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes that CUDA's allocator held at most during ``call``, above what it held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def process_peak(call: Callable[[], object]) -> int:
    """Bytes of resident memory that this process held at most during ``call``, above what it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return max(0, peak)


def cannot_measure_process() -> str | None:
    """Why ``process_peak`` does not work on this machine; None if it does."""
    if not _STATUS.exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        return "needs Linux's /proc/self/clear_refs"
    return None


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def pass_call(peer: Peer, operands: Operands, pass_name: str) -> Callable[[], object]:
    """What a pass runs: forward without a graph, or forward and backward. Backward alone is not a call of its own."""
    forward = peer.prepare(operands)
    if pass_name == "forward":
        return torch.no_grad()(forward)
    leaves = list(operands.leaves.values())
    return lambda: torch.autograd.grad(forward(), leaves, operands.dout)


def in_fresh_process(workload: Workload, peers: Sequence[str], passes: Sequence[str], timeout_s: float = 600) -> Peaks:
    """CPU peaks of the peers named, all in one process that does nothing else. A peer that it dies on is missing.

    Args:
        workload: what to run.
        peers: of ``PEERS`` below.
        passes: "forward", "both".
        timeout_s: the process is ended after this long; what it had measured stands.
    """
    task = {"workload": workload.to_dict(), "peers": list(peers), "passes": list(passes), "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "fastattn.testing.memory"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(json.dumps(task), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    peaks: Peaks = {}
    for line in output.splitlines():
        peer, pass_name, peak = json.loads(line)
        peaks.setdefault(peer, {})[pass_name] = peak
    return peaks


PEERS = {peer.name: peer for peer in (fastattn_peer(None), EAGER, SDPA)}


def _main() -> None:
    """The fresh process: a task on stdin, one line for each peak on stdout."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    workload = Workload.from_dict(task["workload"])
    small = Workload(s_q=64, s_kv=64, heads_q=1, heads_kv=1, d_qk=workload.d_qk, d_v=workload.d_v, dtype=workload.dtype)
    first = Operands.of(small, torch.device("cpu"))
    operands = Operands.of(workload, torch.device("cpu"))
    for name in task["peers"]:
        for pass_name in task["passes"]:
            pass_call(PEERS[name], first, pass_name)()  # loads libraries and starts threads
            call = pass_call(PEERS[name], operands, pass_name)
            print(json.dumps([name, pass_name, process_peak(call)]), flush=True)


if __name__ == "__main__":
    _main()
