"""The two hosts of the CUDA kernels, C++ and ctypes, make the same calls of the driver for the same structs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import cuda
from fastattn.backends.cuda import abi, library
from fastattn.backends.cuda.instances import (
    DSINKS,
    DTYPES,
    AnyConfig,
    Instance,
    PrepareConfig,
    RowwiseConfig,
    dkdv_configs,
    library_instances,
)
from fastattn.testing.simulated.planted import Fault
from fastattn.testing.simulated.recording import MAP_BYTES, RecordedLaunch, RecordingDriver, built_host, recorded_cuda

pytestmark = pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt to read the names of kernels")


@pytest.fixture
def recorded() -> Iterator[RecordingDriver]:
    with recorded_cuda() as recording:
        yield recording


@pytest.fixture
def host(recorded: RecordingDriver) -> library.Library:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc to compile the C++ host")
    return built_host(recorded)


class Noting:
    """Launches nothing but keeps the structs."""

    def __init__(self) -> None:
        self.structs: list[tuple[abi.Abi, abi.Fields]] = []

    def launch(self, struct: abi.Abi, fields: abi.Fields) -> None:
        self.structs.append((struct, fields))

    def prepared(self, struct: abi.Abi, fields: abi.Fields) -> abi.Launch:
        order = struct.addresses
        return lambda at, stream: self.launch(struct, {**fields, **dict(zip(order, at, strict=True)), "stream": stream})


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def dense(
    d_qk: int = 64, d_v: int | None = None, h_kv: int = 2, s_kv: int = 150, needs: str = "qkv", **options: Any
) -> Callable[[], None]:
    def run() -> None:
        kind = {"dtype": options.pop("dtype", torch.bfloat16), "device": options.pop("device", "cuda")}
        q, k, v = (
            normal(2, 70, 4, d_qk, **kind),
            normal(2, s_kv, h_kv, d_qk, **kind),
            normal(2, s_kv, h_kv, d_v or d_qk, **kind),
        )
        for name, x in (("q", q), ("k", k), ("v", v)):
            x.requires_grad_(name in needs)
        if options.pop("sinks", False):
            options["sinks"] = normal(4, **kind).requires_grad_()
        out = fastattn.attention(q, k, v, backend="cuda", **options)
        if needs:
            out.backward(torch.ones_like(out))

    return run


def packed() -> None:
    q, bounds = normal(90, 4, 64).requires_grad_(), torch.tensor([0, 20, 20, 90], dtype=torch.int32, device="cuda")
    options = {"max_seqlen_q": 70, "max_seqlen_kv": 70, "causal": True}
    fastattn.attention_varlen(q, q, q, bounds, bounds, backend="cuda", **options).sum().backward()


def with_terms(d: int, needs: str = "qkv", **options: Any) -> Callable[[], None]:
    """Every term at once, in broadcastings that differ."""

    def run() -> None:
        ids = torch.arange(70, device="cuda").repeat(2, 1) // 30
        mask = torch.ones(1, 4, 1, 70, dtype=torch.bool, device="cuda")
        bias = normal(70, 1, dtype=torch.float32).requires_grad_("b" in needs)
        terms = {"segment_ids": ids, "mask": mask, "bias": bias, "alibi_slopes": normal(4).float(), "dropout_p": 0.2}
        dense(d, s_kv=70, needs=needs, **terms, **options)()

    return run


def without_atomics() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        dense(causal=True)()
    finally:
        torch.use_deterministic_algorithms(False)


def cache(
    d: int = 64, page_size: int = 16, pages: int = 8, new: int = 0, fp8: bool = False, **options: Any
) -> Callable[[], None]:
    def run() -> None:
        rows = [normal(2, new, 2, d) for _ in range(2)] if new else []
        store, table = normal(pages, page_size, 2, d), torch.arange(pages, device="cuda").int().view(2, -1)
        lengths = torch.tensor([3, 9], dtype=torch.int32, device="cuda")
        q = normal(2, 1, 8, d)
        caches = store, normal(*store.shape) if new else store
        if fp8:
            caches = tuple(x.to(torch.float8_e4m3fn) for x in caches)
        fastattn.attention_with_kv_cache(q, *caches, lengths, *rows, block_table=table, backend="cuda", **options)

    return run


CALLS: dict[str, Callable[[], None]] = {
    **{f"D {d}": dense(d, causal=True) for d in (40, 64, 96, 128, 192, 256)},
    **{f"D {d}, everything": dense(d, softcap=4.0, window=(9, 3), sinks=True) for d in (64, 96, 128, 192, 256)},
    "D 192 and 128": dense(192, 128),
    "no mask": dense(128, h_kv=1),
    "one head of keys for four": dense(256, h_kv=1, causal=True),
    "fp16": dense(64, dtype=torch.float16),
    "another device": dense(64, device="cuda:1"),
    "keys that nobody sees": dense(64, s_kv=300, window=(3, 3)),
    "no key": dense(64, s_kv=0),
    "only dq": dense(64, needs="q"),
    "only dv": dense(128, needs="v"),
    "no gradient": dense(128, needs=""),
    "packed": packed,
    **{f"D {d}, with terms": with_terms(d, causal=True) for d in (64, 128, 192, 256)},
    "terms, softcap, gradient of a bias": with_terms(128, "qb", softcap=4.0, dtype=torch.float16),
    "without atomics": without_atomics,
    **{f"cache, D {d}": cache(d) for d in (64, 128, 192, 256)},
    "cache, one split": cache(pages=2),
    "cache, new rows": cache(d=128, new=3),
    "cache, splits": cache(page_size=64, pages=64),
    "cache, softcap": cache(softcap=3.0, page_size=24),
    "cache, window": cache(window=(5, 0), page_size=1, pages=64),
    **{f"cache, e4m3, D {d}": cache(d, fp8=True) for d in (64, 256)},
    "cache, pages of 2, new rows": cache(d=128, page_size=2, pages=16, new=3, softcap=3.0),
}


def names_of_kernels() -> dict[str, str]:
    """The name of each kernel in C++, by the name that the ctypes host gives it."""
    after = [RowwiseConfig("backward_postprocess", config) for config in dkdv_configs() if config.fused]
    after += [RowwiseConfig("backward_sum_heads", config) for config in dkdv_configs()]
    more = [Instance(config, dtype) for config in (DSINKS, *after) for dtype in DTYPES]
    return {instance.name: signature(instance) for instance in [*library_instances(), *more]}


def signature(instance: Instance) -> str:
    config: AnyConfig = instance.config
    space = "fa::" if config.arguments.endswith("Params") else "fa::sm90::"
    given = f"{instance.traits}::Params" if isinstance(config, PrepareConfig) else f"{space}{config.arguments}"
    return f"void fa::sm90::{config.function}_kernel<{instance.traits}>({given})"


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [line.replace(" >", ">") for line in done.stdout.splitlines()]


def facts(launch: RecordedLaunch) -> dict[str, Any]:
    return {
        "grid": list(launch.grid), "block": list(launch.block), "stream": launch.stream, "device": launch.device,
        "follows": launch.follows, "maps": [bytes(x) for x in launch.maps],
        "struct": launch.argument[len(launch.maps) * MAP_BYTES :],
    }  # fmt: skip


def compare(call: Callable[[], None], recorded: RecordingDriver, host: library.Library) -> None:
    noting, by_ctypes = Noting(), cuda._kernels()
    with mock.patch.object(cuda, "_delivered", return_value=(noting, "noted")), torch.cuda.stream(torch.cuda.Stream()):
        call()
    assert noting.structs
    found = []
    for kernels in (by_ctypes, host):
        recorded.clear()
        for struct, fields in noting.structs:
            kernels.launch(struct, fields)
        assert recorded.broken_rule == ""
        found.append(recorded.copies())
    ours, theirs = found
    names = names_of_kernels()
    assert [names[x.kernel.decode()] for x in ours] == demangled([x.kernel.decode() for x in theirs])
    after_append = [False, *("append" in x.kernel.decode() for x in ours)]
    follows = [bool(before or b"combine" in x.kernel) for before, x in zip(after_append, ours, strict=False)]
    assert [bool(x.follows) for x in ours] == follows, "only kernels that wait for the one before may begin ahead of it"
    for one, other in zip(ours, theirs, strict=True):
        expected, seen = facts(one), facts(other)
        padding = -len(one.argument) % 64 if one.maps else 0  # maps are aligned to 64 bytes, and so is what holds them
        assert len(seen["struct"]) == len(expected["struct"]) + padding
        seen["struct"] = seen["struct"][: len(expected["struct"])]
        assert seen == expected
        assert other.shared <= one.shared


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_both_hosts_make_the_same_calls(
    call: Callable[[], None], recorded: RecordingDriver, host: library.Library
) -> None:
    compare(call, recorded, host)


N = "fastattn.backends.cuda.nvrtc:"
FAULTS = [
    Fault("a stride of a result", N + "result_view", "(2 * heads * width, 2 * width,", "(2 * width, 2 * heads * width,",
          lambda given: compare(CALLS["D 64"], *given)),
    Fault("too many keys shown", N + "row_view", 'given["key_end"] - given["key_begin"]', 'given["seqlen_kv"]',
          lambda given: compare(CALLS["keys that nobody sees"], *given)),
    Fault("blocks of the combination", N + "NvrtcKernels._decode_steps", "* given[\"heads_q\"]", "",
          lambda given: compare(CALLS["cache, splits"], *given)),
    Fault("a promotion in L2", "fastattn.backends.driver:encode_map", "L2_PROMOTION_256B", "2",
          lambda given: compare(CALLS["D 64"], *given)),
    Fault("the order of kernels", N + "NvrtcKernels._backward_steps", "return steps", "return steps[::-1]",
          lambda given: compare(CALLS["without atomics"], *given)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_difference_is_reported(fault: Fault, recorded: RecordingDriver, host: library.Library) -> None:
    fault.is_reported((recorded, host))


def test_the_host_says_what_the_driver_refuses(host: library.Library, recorded: RecordingDriver) -> None:
    noting = Noting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_delivered", lambda: (noting, "noted"))
        dense(needs="")()
    ((struct, fields),) = noting.structs
    with pytest.raises(RuntimeError, match="tensor map of k was refused"):
        host.launch(struct, {**fields, "k": int(fields["k"]) + 8})
    assert recorded.broken_rule == "globalAddress: null, or not a multiple of 16"
    with pytest.raises(RuntimeError, match="invalid argument"):
        host.launch(struct, {**fields, "device": 7})
