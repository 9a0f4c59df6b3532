"""A program: Triton's own launcher over a recording driver, for every form of our kernels. Writes JSON to a file.

What the driver is given has to be what the launch code gave to the kernel: addresses of tensors, and numbers. A call by
a plan, on other tensors of the same kind, has to launch what a call in the usual way does.
"""

import json
import struct
import sys
from pathlib import Path

from fastattn.testing.simulated import launcher
from fastattn.testing.simulated.recording import RecordingDriver

RECORDING = RecordingDriver()
launcher.use(RECORDING)

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from triton import JITFunction  # noqa: E402

from fastattn.backends.triton import BACKEND, plans  # noqa: E402
from fastattn.kv_cache import CacheInputs  # noqa: E402
from fastattn.problem import Inputs  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402
from fastattn.storage import extent  # noqa: E402
from fastattn.testing.caches import cache_grid, make_cache_sample  # noqa: E402

SPEC = AttentionSpec(0.125, right=0)
GIVEN = []  # what the launch code gave to each kernel
run_kernel = JITFunction.run


def run_and_note(self, *args, grid, warmup, **options):
    named = [options[name] for name in self.arg_names[len(args) :] if name in options]
    values = [x for x, parameter in zip((*args, *named), self.params, strict=False) if not parameter.is_constexpr]
    GIVEN.append(list(flat(values)))
    return run_kernel(self, *args, grid=grid, warmup=warmup, **options)


JITFunction.run = run_and_note


def flat(values):
    """As a kernel takes them: addresses and numbers. Those that Triton compiles in are left out: None, 1, constexpr."""
    for x in values:
        if isinstance(x, tuple):
            yield from flat(x)
        elif isinstance(x, torch.Tensor):
            yield x.data_ptr()
        elif isinstance(x, float):
            yield struct.unpack("<I", struct.pack("<f", x))[0]
        elif isinstance(x, int) and not isinstance(x, bool) and x != 1:
            yield x


class Keeping(TorchFunctionMode):
    """Keeps all tensors made inside, so that no result lies where one that was freed did."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.made.append(func(*args, **(kwargs or {})))
        return self.made[-1]


def launches(call):
    """(name, grid, block, numbers) of each launch."""
    RECORDING.clear()
    with Keeping():
        results = call()
    found = [
        (x.kernel.decode(), [*x.grid], [*x.block], x.stream, [int.from_bytes(a, "little") for a in x.arguments])
        for x in RECORDING.copies()
    ]
    return found, results


def told(call):
    """What a call in the usual way launched, and whether every kernel was given what it was to be given."""
    GIVEN.clear()
    found, results = launches(call)
    arrived = [numbers for *_, numbers in found]
    return {
        "launches": [name for name, *_ in found],
        "arrived": arrived == GIVEN,
        "broken": RECORDING.broken_rule,
        "stream": all(stream == launcher.STREAM for _, _, _, stream, _ in found),
    }, results


def compared(usual, prepared, make):
    """Whether a plan, on other tensors, launches what ``usual`` does."""
    names = []
    for call in (usual, prepared):
        given = make()
        found, results = launches(lambda call=call, given=given: call(*given))
        tensors = {f"given {n}": x for n, x in enumerate(given) if x is not None}
        names.append(renamed(found, tensors | {f"result {n}": x for n, x in enumerate(results)}))
    return {"same": names[0] == names[1] != [], "launches": [name for name, *_ in names[1]]}


def renamed(found, tensors):
    """Launches with each address replaced by the name of the tensor it lies in, and the offset."""
    spans = {name: (x.data_ptr(), x.data_ptr() + max(1, extent(x))) for name, x in tensors.items()}

    def of(x):
        if x < 1 << 32:
            return x
        inside = [f"{name}+{x - begin}" for name, (begin, end) in spans.items() if begin <= x < end]
        return inside[0] if inside else "workspace"

    return [(*rest, [of(x) for x in numbers]) for *rest, numbers in found]


def dense(dtype=torch.bfloat16):
    return [torch.zeros(1, 256, heads, 64, dtype=dtype) for heads in (8, 2, 2)]


def with_gradient():
    q, k, v = dense()
    lse, low = torch.zeros(2, 1, 8, 256).unbind()  # of one tensor, as plans keep them
    return torch.zeros_like(q), torch.zeros_like(q), lse, low, q, k, v


def step(paged):
    q, k, v = (torch.zeros(2, 1, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    caches = [torch.zeros(16, 64, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    if not paged:
        caches, table = [torch.zeros(2, 512, 2, 64, dtype=torch.bfloat16) for _ in range(2)], None
    return q, *caches, torch.tensor([100, 7], dtype=torch.int32), k, v, table


def inputs_of(q, k, v, **terms):
    return Inputs(q, k, v, max_seqlen_q=q.shape[-3], max_seqlen_kv=k.shape[-3]).replace(**terms)


def features():
    """Forms of the kernels: (inputs, spec), by name."""
    ids, cu = torch.zeros(1, 256, dtype=torch.int64), torch.tensor([0, 100, 256], dtype=torch.int32)
    segments = {"segment_ids_q": ids, "segment_ids_kv": ids}
    dropout = {"rng_state": torch.zeros(2, dtype=torch.int64)}
    bound = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu}
    yield "plain", inputs_of(*dense()), SPEC
    yield "fp32", inputs_of(*dense(torch.float32)), SPEC
    yield "bias and sinks", inputs_of(*dense(), bias=torch.zeros(1, 8, 256, 256), sinks=torch.zeros(1, 8)), SPEC
    yield "mask", inputs_of(*dense(), mask=torch.ones(1, 1, 256, 256, dtype=torch.bool)), AttentionSpec(0.125)
    spec = AttentionSpec(0.1, right=0, dropout_p=0.1)
    ranges = torch.zeros(1, 8, 256, 3, 2, dtype=torch.int32)
    yield "intervals", inputs_of(*dense(), intervals=ranges), SPEC
    yield "segments and dropout", inputs_of(*dense(), **segments, **dropout), spec
    yield (
        "alibi and softcap",
        inputs_of(*dense(), alibi_slopes=torch.ones(1, 8)),
        AttentionSpec(0.1, softcap=3.0, left=5),
    )
    yield "packed", inputs_of(*(x[0] for x in dense()), **bound), SPEC


def passes(inputs, spec):
    """Forward and backward, by the usual way."""
    needs = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(inputs, name) is not None]

    def run():
        out, lse, low = BACKEND.forward(inputs, spec)
        return out, BACKEND.backward(out, lse, out, lse, low, inputs, spec, needs)

    return run


def main():
    def forward(*qkv):
        return BACKEND.forward(inputs_of(*qkv), SPEC)

    def backward(dout, out, lse, low, *qkv):
        grads = BACKEND.backward(dout, None, out, lse, low, inputs_of(*qkv), SPEC, ("q", "k", "v"))
        return grads.dq, grads.dk, grads.dv

    def decode(*tensors):
        return BACKEND.attend_to_cache(cache_of(*tensors), SPEC)

    def cache_of(*tensors):
        return CacheInputs(*tensors, max_seqlen_q=1)

    forms = {name: told(passes(inputs, spec))[0] for name, inputs, spec in features()}
    for case in cache_grid((torch.bfloat16,)):
        sample = make_cache_sample(case, "cpu")
        call = lambda sample=sample: BACKEND.attend_to_cache(sample.inputs, sample.spec)  # noqa: E731
        forms[f"cache: {case.id}"] = told(call)[0]
    problem = inputs_of(*dense())
    forward_run = BACKEND.prepared_forward(problem, SPEC, keep=True)
    backward_run = BACKEND.prepared_backward(problem, SPEC, problem.q.to("meta"))

    def planned_forward(*qkv):
        out, kept = forward_run(*qkv)
        return out, *kept.unbind()

    def planned_backward(dout, out, lse, low, *qkv):
        return backward_run(dout, out, lse._base, *qkv)

    planned = {
        "forward": compared(forward, planned_forward, dense),
        "backward": compared(backward, planned_backward, with_gradient),
    }
    for paged in (True, False):
        prepared = BACKEND.prepared_for_cache(cache_of(*step(paged)), SPEC)
        planned[f"decode, paged={paged}"] = compared(decode, prepared, lambda paged=paged: step(paged))
    x = dense()[1]
    found = {
        "forms": forms,
        "planned": planned,
        "shared": BACKEND.prepared_forward(inputs_of(x, x, x), SPEC, keep=True) is None,
        "copied": plans.prepare(lambda q, k, v: forward(q + 0, k, v), dense()) is None,
    }
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
