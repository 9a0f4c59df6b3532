"""``python -m benchmarks.profile_call DEVICE BACKEND``: profile one forward and backward pass."""

from __future__ import annotations

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from fastattn.measure.peers import fastattn_peer, pass_call
from fastattn.measure.workload import Operands, Workload


def main(device_type: str, backend: str) -> None:
    on_gpu = device_type == "cuda"
    s, heads, d, dtype = (8192, 16, 128, "bf16") if on_gpu else (256, 2, 64, "fp32")
    workload = Workload(s_q=s, s_kv=s, heads_q=heads, heads_kv=heads, d_qk=d, d_v=d, dtype=dtype, causal=True)
    operands = Operands.of(workload, torch.device(device_type))
    call = pass_call(fastattn_peer(None if backend == "auto" else backend).prepare(operands), operands, "both")
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(workload.id)
    print(profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))


if __name__ == "__main__":
    main(*sys.argv[1:])
