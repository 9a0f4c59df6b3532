"""The CUDA backend on the simulated GPU: its own host code, and its kernels on the emulated machine, judged."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulate
import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import cuda
from fastattn.backends.cuda import abi
from fastattn.cli import main
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.testing import simulated
from fastattn.testing import verify as verification
from fastattn.testing.caches import CacheCase, make_cache_sample, measure_cache
from fastattn.testing.cases import Case
from fastattn.testing.simulated.emulated import emulated_cuda
from fastattn.testing.simulated.planted import Fault
from fastattn.testing.simulated.recording import recorded_cuda
from fastattn.testing.tolerance import assert_within

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulator")
BF16 = torch.bfloat16


@pytest.fixture(scope="session")
def library() -> Path:
    """Asked for before any test has a cache folder of its own."""
    return emulate.kept_library()


@pytest.fixture(autouse=True)
def emulated(library: Path, machine: simulated.Machine) -> Iterator[None]:
    with emulated_cuda(machine, library):
        yield


def normal(*shape: int, device: str = "cuda", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16).requires_grad_(grad)


def qkv(device: str = "cuda", grad: bool = False) -> list[Tensor]:
    return [normal(1, 40, heads, 64, device=device, grad=grad) for heads in (4, 2, 2)]


def attend(tensors: list[Tensor], **options: Any) -> Tensor:
    out = fastattn.attention(*tensors, causal=True, backend="cuda", **options)
    assert isinstance(out, Tensor)
    return out


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Forward and backward of a case of each kind, judged."""
    groups = ("heads", "band", "sinks", "softcap", "memory", "packed")
    every = [case for case in verification.cases(quick=False) if isinstance(case, Case) and case.group in groups]
    kinds = {
        case.group: dataclasses.replace(case, dtype=BF16, B=1)
        for case in every
        if max(case.S_q, case.S_kv, case.D_qk, case.D_v) <= 64 and case.D_qk % 8 == case.D_v % 8 == 0
    }
    assert len(kinds) == len(groups)
    monkeypatch.setattr(verification, "cases", lambda quick: list(kinds.values()))
    assert main(["verify", "--device", "cuda", "--backend", "cuda"]) == 0
    assert "all within the tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("more", [{}, {"page_size": 16}, {"page_size": 16, "bias": True, "alibi": True}], ids=str)
def test_a_cache(more: dict[str, Any]) -> None:
    case = CacheCase("cuda", before=(70, 3), s_q=(1, 1), D_qk=64, D_v=64, dtype=BF16, sinks=True, **more)
    assert_within(measure_cache("cuda", make_cache_sample(case, "cuda")))


def test_it_serves_by_name_alone(trusted: None) -> None:
    found = fastattn.explain(*qkv())
    assert found.chosen == "triton" and found.reasons["cuda"] == []
    assert found.passed_over["cuda"] == ["not yet run on a GPU"]


def step() -> Callable[[], object]:
    cache, table = normal(8, 16, 2, 64), torch.arange(8, device="cuda").int().view(2, 4)
    q, new, lengths = normal(2, 1, 4, 64), normal(2, 1, 2, 64), torch.tensor([3, 40], dtype=torch.int32, device="cuda")
    arguments = (q, cache, cache.clone(), lengths, new, new.clone())
    return lambda: fastattn.attention_with_kv_cache(*arguments, block_table=table, backend="cuda")


def training_step() -> Callable[[], object]:
    leaves = qkv(grad=True)

    def run() -> list[Tensor]:
        out = attend(leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def inference() -> Callable[[], object]:
    tensors = qkv()
    return lambda: attend(tensors)


def few_queries() -> Callable[[], object]:
    """Of four heads that share two key heads: a tile of the kernels for caches holds both of a group."""
    tensors = [normal(2, 7, 4, 64), normal(2, 50, 2, 64), normal(2, 50, 2, 64)]
    return lambda: attend(tensors)


CALLS = {
    inference: ["forward"],
    few_queries: ["decode"],
    training_step: ["forward", "backward"],
    step: ["decode"],
}  # fmt: skip


@pytest.mark.parametrize("prepare", CALLS, ids=lambda prepare: prepare.__name__)
def test_calls_never_wait_and_run_on_the_current_stream(
    prepare: Callable[[], Callable[[], object]], machine: simulated.Machine
) -> None:
    """The second by its plan; whichever device is current."""
    run, side = prepare(), torch.cuda.Stream()
    machine.waits.clear()
    with torch.cuda.stream(side), torch.cuda.device(1):
        run()
        run()
    assert machine.waits == [] and [launch.kernel for launch in machine.launches] == 2 * CALLS[prepare]
    assert {(launch.device, launch.stream) for launch in machine.launches} == {(0, side.cuda_stream)}


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (20, 3), "softcap": 5.0}], ids=["causal", "window"])
def test_few_queries_of_a_group_share_a_tile(options: dict[str, Any], machine: simulated.Machine) -> None:
    q, k, v = normal(2, 7, 4, 64), normal(2, 50, 2, 64), normal(2, 50, 2, 64)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = fastattn.attention(*(x.cpu().float() for x in (q, k, v)), **options, backend="eager")
    for tensors in ([q, k, v], [q, k, v], heads_first):
        out = fastattn.attention(*tensors, **options, backend="cuda")
        torch.testing.assert_close(out.cpu().float(), expected, atol=0.02, rtol=0.02)
    assert [launch.kernel for launch in machine.launches] == 3 * ["decode"]
    with fastattn.use_backend(
        "cuda"
    ):  # torch's diagonal begins in the upper left; that of a cache ends in the lower right
        fastattn.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    fastattn.attention(q.requires_grad_(), k, v, causal=True, backend="cuda")  # gradients need both parts of lse
    assert [launch.kernel for launch in machine.launches][3:] == 2 * ["forward"]


def test_another_device_and_a_fresh_thread_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    here = qkv(grad=True)
    there = [x.detach().to("cuda:1").requires_grad_() for x in here]
    found: list[list[Tensor]] = []

    def run(tensors: list[Tensor]) -> None:
        out = attend(tensors)
        found.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])

    run(here)
    thread = threading.Thread(target=run, args=(there,))
    thread.start()
    thread.join()
    assert all(torch.equal(x.cpu(), y.cpu()) and y.device.index == 1 for x, y in zip(*found, strict=True))


def test_a_graph_computes_what_its_inputs_hold_by_then() -> None:
    tensors = qkv()
    attend(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(tensors)
    for x in tensors:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, attend(tensors))


def test_what_a_kernel_may_not_touch_is_refused(machine: simulated.Machine) -> None:
    x = normal(1, 40, 4, 64)
    for address, device, where in ((x.cpu().data_ptr(), 0, "no memory"), (x.data_ptr(), 1, "on cuda:0")):
        with pytest.raises(RuntimeError, match=f"illegal memory access.*q of forward on cuda:{device}.*{where}"):
            machine.check_address("forward", "q", address, device)


def assert_held(most: int) -> None:
    """No more bytes of the device, soon: autograd's threads let go of gradients a moment after they have given them."""
    ends = time.monotonic() + 5
    while (found := torch.cuda.memory_allocated()) > most and time.monotonic() < ends:
        time.sleep(0.01)
    assert found <= most


@pytest.mark.parametrize("prepare", CALLS, ids=lambda prepare: prepare.__name__)
def test_a_plan_keeps_no_tensor(prepare: Callable[[], Callable[[], object]]) -> None:
    others = torch.cuda.memory_allocated()  # what tests before this one left behind
    run, before = prepare(), torch.cuda.memory_allocated()
    run()
    assert_held(before)
    del run
    assert_held(others)


# --- planted faults: plans that launch what is stale, memory that a kernel may not touch --------------------------


def unplanned(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.125) -> Tensor:
    inputs = Inputs(q, k, v, max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1])
    return cuda.BACKEND.forward(inputs, AttentionSpec(scale, right=0))[0]


def by_plan_as_without(_: object) -> None:
    """Each of several calls of a kind, the results of the earlier ones left alone."""
    calls = [qkv() for _ in range(3)]
    results = [attend(tensors) for tensors in calls]
    assert all(torch.equal(out, unplanned(*tensors)) for out, tensors in zip(results, calls, strict=True))


def turned_around(_: object) -> None:
    tensors = qkv()
    assert torch.equal(attend(tensors, scale=-0.3), unplanned(*tensors, scale=-0.3))


def without_atomics(_: object) -> None:
    """If the flag says so when gradients are computed, whatever it said before."""
    with recorded_cuda() as recording:
        out = attend(qkv(grad=True))
        torch.use_deterministic_algorithms(True)
        try:
            out.backward(torch.ones_like(out))
        finally:
            torch.use_deterministic_algorithms(False)
    assert not any(b"fused" in launch.kernel for launch in recording.launches)


def odd_gradient(_: object) -> None:
    with recorded_cuda() as recording:
        out = attend(qkv(grad=True))
        out.backward(normal(out.numel() + 4)[4:].view(out.shape))
    assert recording.broken_rule == ""


def odd_query(_: object) -> None:
    with recorded_cuda():
        for shift in (0, 0, 0, 4):  # the third is recognised by the check of the second
            q, k, v = qkv()
            attend([normal(q.numel() + shift)[shift:].view(q.shape), k, v])


def shown_tensors(_: object) -> None:
    with recorded_cuda() as recording:
        for _ in range(2):
            q, k, v = qkv()
            out = attend([q, k, v])
    shown = [found.address for found in recording.launches[-1].maps]
    assert shown == [x.data_ptr() for x in (q, k, v, out)]


def stays_on_its_stream(_: object) -> None:
    tensors, side = qkv(), torch.cuda.Stream()
    with recorded_cuda() as recording:
        attend(tensors)
        with torch.cuda.stream(side):
            attend(tensors)
    packed = recording.launches[-1].argument[4 * 128 :]
    assert recording.launches[-1].stream == abi.FORWARD.unpack(packed)["stream"] == side.cuda_stream


def without_a_plan(_: object) -> None:
    """As sinks have it."""
    leaves = qkv("cuda:1", grad=True)
    out = attend(leaves, sinks=normal(4, device="cuda:1"))
    out.backward(torch.ones_like(out))


def appends(_: object) -> None:
    cache, lengths = normal(2, 16, 2, 64), torch.tensor([3, 9], dtype=torch.int32, device="cuda")
    for _ in range(2):
        new = normal(2, 1, 2, 64)
        fastattn.attention_with_kv_cache(
            normal(2, 1, 4, 64), cache, cache.clone(), lengths, new, new.clone(), backend="cuda"
        )
        assert torch.equal(cache[0, 3], new[0, 0])


def moves_rows(_: object) -> None:
    """New rows that lie in the cache, each where the one before is to be stored; a call before them makes the plan."""
    lengths = torch.tensor([3], dtype=torch.int32, device="cuda")
    for lies_in_cache in (False, True):
        cache, q = normal(1, 16, 2, 64), normal(1, 8, 4, 64)
        new = (cache if lies_in_cache else normal(1, 16, 2, 64))[:, 2:10]
        expected = new.clone()
        fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, new, expected, backend="cuda")
        assert torch.equal(cache[:, 3:11], expected)


C, DRIVER = "fastattn.backends.cuda.", "fastattn.backends.driver:"
FAULTS = [
    Fault("addresses of the first call", C + "abi:Abi.template", "self.version, *addresses",
          "self.version, *(fields[name] for name in self.addresses)", by_plan_as_without),
    Fault("the stream of the first call", DRIVER + "Block.use", "self.buffer, at, stream)",
          "self.buffer, at, stream if self.stream is None else self.stream)", stays_on_its_stream),
    Fault("structs of the first call", DRIVER + "launcher", "addresses != (held := block.addresses)",
          "(held := block.addresses) is None", shown_tensors),
    Fault("maps of the first call", C + "nvrtc:_launcher", "held is None or held[which] != addresses[which]",
          "held is None", shown_tensors),
    Fault("maps of one tensor", C + "nvrtc:_launcher", "addresses[which] + skipped", "addresses[0] + skipped",
          shown_tensors),
    Fault("memory that calls share", C + "plans:_run", "[new(x) for x in make]",
          "[vars(abi).setdefault(id(x), new(x)) for x in make]", by_plan_as_without),
    Fault("tensors in another order", C + "plans:_run", "launch(ordered(addresses)",
          "launch(ordered([addresses[0], addresses[2], addresses[1], *addresses[3:]])", by_plan_as_without),
    Fault("a scale that q has not got", C + "plans:forward", "is not getattr(inputs, name)", "is None", turned_around),
    Fault("a plan with another flag", "fastattn.autograd:PlannedAttention.backward",
          "plan.deterministic == is_deterministic()", "True", without_atomics),
    Fault("a gradient that is not aligned", "fastattn.autograd:_aligned", "x.data_ptr() % ALIGNMENT == 0", "True",
          odd_gradient),
    Fault("a plan for another alignment", "fastattn.plan:_look_up_kind", "x.data_ptr() % ALIGNMENT", "0", odd_query),
    Fault("a check without alignment", "fastattn.plan:look_up", "seen.offsets != _offsets(given)", "False", odd_query),
    Fault("a result in host memory", C + "abi:results", "device=inputs.q.device", "device='cpu'", turned_around),
    Fault("a workspace on another device", C + "backward:own_tensors",
          "delta = torch.empty(rows, dtype=torch.float32, device=q.device)",
          "delta = torch.empty(rows, dtype=torch.float32, device='cuda:0')", without_a_plan),
    Fault("a step that stores nothing", C + "decode:Step.fields", "self.stores)", "False)", appends),
    Fault("new rows that others are stored over", C + "plans:for_cache",
          "return general(of(*tensors), spec)", "pass", moves_rows),
]  # fmt: skip


@pytest.mark.parametrize("probe", {fault.probe: None for fault in FAULTS}, ids=lambda probe: probe.__name__)
def test_nothing_is_reported_without_a_fault(probe: Callable[[Any], None]) -> None:
    probe(None)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_reported(fault: Fault) -> None:
    fault.is_reported(None)
