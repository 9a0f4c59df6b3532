"""A program that checks plans under a driver that records launches. It prints one line of JSON.

The real compiler compiles kernels for sm_80. A call without a plan and a call by a plan, on other tensors of the same
kind, must launch the same kernels with the same grids and numbers, and with pointers to their own tensors.
"""

import json
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

NOTED = []


class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, *rest):
        arguments = rest[5:]  # behind the function, two kinds of metadata and two hooks
        NOTED.append((self.name, (x, y, z), stream, arguments))


class Utilities:
    load_binary = staticmethod(lambda *_: (1, 2, 100, 0, 1024))
    get_device_properties = staticmethod(lambda _: {"max_shared_mem": 166912})


class Noting(DriverBase):
    def __init__(self):
        self.utils, self.launcher_cls = Utilities(), Launcher

    is_active = classmethod(lambda cls: True)
    get_current_target = lambda self: GPUTarget("cuda", 80, 32)  # noqa: E731
    get_current_device = lambda self: 0  # noqa: E731
    get_current_stream = lambda self, *_: 7  # noqa: E731
    get_active_torch_device = lambda self: torch.device("cpu")  # noqa: E731
    get_benchmarker = map_python_to_cpp_type = lambda self, *_: None


driver.set_active(Noting())

from fastattn.backends.triton import BACKEND, plans  # noqa: E402
from fastattn.kv_cache import CacheInputs  # noqa: E402
from fastattn.problem import Inputs  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402

SPEC = AttentionSpec(0.125, right=0)


def pointers(args):
    """The arguments with tensors as addresses, tuples of any kind as lists; constants by their text."""
    if isinstance(args, tuple):
        return [pointers(x) for x in args]
    if isinstance(args, torch.Tensor):
        return args.data_ptr()
    return args if isinstance(args, int | float) or args is None else str(args)


def renamed(noted, tensors):
    """Launches with each address replaced by the name of the tensor it lies in, and the offset."""
    spans = {name: (x.data_ptr(), x.data_ptr() + max(1, x.untyped_storage().nbytes())) for name, x in tensors.items()}

    def of(x):
        if isinstance(x, list):
            return [of(y) for y in x]
        if isinstance(x, int) and x > 1 << 32:
            inside = [(f"{name}+{x - begin}") for name, (begin, end) in spans.items() if begin <= x < end]
            return inside[0] if inside else "workspace"
        return x

    return [(name, grid, stream, of(pointers(args))) for name, grid, stream, args in noted]


def launches(call, *given):
    NOTED.clear()
    results = call(*given)
    names = {f"given {n}": x for n, x in enumerate(given) if x is not None}
    return renamed(NOTED, names | {f"result {n}": x for n, x in enumerate(results)}), results


def compared(usual, prepared, make):
    """Whether both ways launch alike, and what each costs the host."""
    ours, theirs = make(), make()
    expected, _ = launches(usual, *ours)
    found, _ = launches(prepared, *theirs)
    microseconds = [cost(usual, ours), cost(prepared, theirs)]
    return {"same": found == expected, "launches": [name for name, *_ in found], "microseconds": microseconds}


def cost(call, given, rounds=5, count=40):
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            call(*given)
        times.append((time.perf_counter() - begin) / count)
    NOTED.clear()
    return round(min(times) * 1e6, 1)


def dense():
    q, k, v = (torch.zeros(1, 256, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    return q, k, v


def with_gradient():
    q, k, v = dense()
    lse, low = torch.zeros(1, 8, 256), torch.zeros(1, 8, 256)
    return torch.zeros_like(q), torch.zeros_like(q), lse, low, q, k, v


def step(paged):
    q, k, v = (torch.zeros(2, 1, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    caches = [torch.zeros(16, 64, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    if not paged:
        caches, table = [torch.zeros(2, 512, 2, 64, dtype=torch.bfloat16) for _ in range(2)], None
    return q, *caches, torch.tensor([100, 7], dtype=torch.int32), k, v, table


def inputs_of(q, k, v):
    return Inputs(q, k, v, max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1])


def cache_of(*tensors):
    return CacheInputs(*tensors, max_seqlen_q=1)


def main():
    def forward(*qkv):
        return BACKEND.forward(inputs_of(*qkv), SPEC)

    def backward(dout, out, lse, low, *qkv):
        grads = BACKEND.backward(dout, None, out, lse, low, inputs_of(*qkv), SPEC, ("q", "k", "v"))
        return grads.dq, grads.dk, grads.dv

    def decode(*tensors):
        return BACKEND.attend_to_cache(cache_of(*tensors), SPEC)

    problem = inputs_of(*dense())
    found = {
        "forward": compared(forward, BACKEND.prepared_forward(problem, SPEC, keep=True), dense),
        "backward": compared(backward, BACKEND.prepared_backward(problem, SPEC, problem.q.to("meta")), with_gradient),
    }
    for paged in (True, False):
        prepared = BACKEND.prepared_for_cache(cache_of(*step(paged)), SPEC)
        found[f"decode, paged={paged}"] = compared(decode, prepared, lambda paged=paged: step(paged))
    x = dense()[1]
    found["shared"] = BACKEND.prepared_forward(inputs_of(x, x, x), SPEC, keep=True) is None
    found["copied"] = plans.prepare(lambda q, k, v: forward(q + 0, k, v), dense()) is None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
