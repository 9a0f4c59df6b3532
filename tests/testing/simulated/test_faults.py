"""Faults planted one at a time in the code that only runs on a GPU: each has to be reported."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks import gpu
from benchmarks.gpu_plan import Plan, Step
from fastattn import dispatch, evidence, functional
from fastattn.backends import driver
from fastattn.backends.cuda import nvrtc
from fastattn.backends.triton import launch
from fastattn.measure import timing
from fastattn.measure.peers import fastattn_peer
from fastattn.measure.workload import Workload
from fastattn.problem import Inputs, Problem
from fastattn.spec import AttentionSpec
from fastattn.testing import simulated
from fastattn.testing.caches import CacheCase, make_cache_sample, measure_cache
from fastattn.testing.simulated.planted import Fault
from fastattn.testing.simulated.recording import RecordingDriver, recorded_cuda

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the recording driver")


@dataclass
class Room:
    """What a probe works with."""

    machine: simulated.Machine
    recording: RecordingDriver
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch


# --- probes -------------------------------------------------------------------------------------------------------


def normal(*shape: int, device: str = "cuda", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def triton_call(room: Room, s: int = 20, grad: bool = False, device: str = "cuda", **options: Any) -> Tensor:
    q = normal(1, s, 2, 16, device=device, grad=grad)
    room.machine.waits.clear()
    out = fastattn.attention(q, q, q, backend="triton", **options)
    if grad:
        out.backward(torch.ones_like(out))
    assert not room.machine.waits, room.machine.waits
    assert not grad or (q.grad is not None and bool(q.grad.isfinite().all()))
    return out


def keeps_plans_apart(room: Room) -> None:
    """Calls of another kind than the one before, which differ in one thing, are served as they are."""

    def call(q: Tensor) -> Tensor:
        for _ in range(3):  # the second time by a plan, the third recognised by torch's check of all tensors
            out = fastattn.attention(q, q.detach() + 0, q.detach() * 1, backend="triton")
        assert out.device == q.device and bool(out.isfinite().all())
        assert out.requires_grad == (q.requires_grad and torch.is_grad_enabled())
        return out

    q = normal(1, 20, 2, 16)
    call(q)
    call(normal(1, 20, 2, 16, device="cuda:1"))
    leaf = normal(1, 20, 2, 16, grad=True)
    with torch.no_grad():
        call(leaf)
    call(leaf)
    call(normal(20 * 2 * 16 + 4)[4:].view(1, 20, 2, 16))  # 8 bytes off


def refuses_freed_memory(room: Room) -> None:
    q, k, v = (normal(1, 20, 2, 16) for _ in range(3))
    for _ in range(3):
        fastattn.attention(q, k, v, backend="triton")
    k.untyped_storage().resize_(0)
    room.monkeypatch.setattr(functional, "by_plan", lambda *_: pytest.fail("a kernel would read it"))
    with pytest.raises(fastattn.InputError, match="storage"):
        fastattn.attention(q, k, v, backend="triton")


def runs_plans_on_the_stream(room: Room) -> None:
    q, side = normal(1, 20, 2, 16), torch.cuda.Stream()
    for _ in range(2):
        fastattn.attention(q, q.clone(), q.clone(), backend="triton")
    with torch.cuda.stream(side), torch.cuda.device(1):
        fastattn.attention(q, q.clone(), q.clone(), backend="triton")
    last = room.machine.launches[-1]
    assert (last.device, last.stream) == (0, side.cuda_stream)


def served_on_another_device(room: Room) -> None:
    triton_call(room, device="cuda:1", grad=True)


def serves(room: Room) -> None:
    assert bool(triton_call(room).isfinite().all())


def trains(room: Room) -> None:
    triton_call(room, grad=True)


def drops(room: Room) -> None:
    triton_call(room, dropout_p=0.1)


def decodes(room: Room) -> None:
    cache, table = normal(8, 8, 2, 16), torch.arange(8, device="cuda").int().view(2, 4)
    q, lengths = normal(2, 1, 4, 16), torch.tensor([3, 9], dtype=torch.int32, device="cuda")
    room.machine.waits.clear()
    fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, block_table=table, backend="triton")
    assert not room.machine.waits, room.machine.waits


def judges_caches(room: Room) -> None:
    case = CacheCase("one token", page_size=8, dtype=torch.bfloat16, before=(3, 9), s_q=(1, 1))
    assert all(row.ok for row in measure_cache("triton", make_cache_sample(case, "cuda")))


def warns(room: Room) -> None:
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: evidence.Verdict("dq is off"))
    dispatch._warn_slow.cache_clear()
    q = normal(1, 9, 2, 16)
    with pytest.warns(UserWarning, match="slow 'portable'.*dq is off"):
        fastattn.attention(q, q, q)


def aligned(room: Room) -> None:
    q = normal(1, 37, 3, 16)
    inputs, spec = Inputs(q, q, q, max_seqlen_q=37, max_seqlen_kv=37), AttentionSpec(0.25)
    result = launch.forward(inputs, spec)
    found = launch.Backward.of(q, None, *result, inputs, spec)
    assert all(x.data_ptr() % 16 == 0 for x in found.stats[:3]), "kernels would be compiled again"


def keeps_its_kernels(room: Room) -> None:
    q = normal(1, 9, 2, 16)
    inputs, spec = Inputs(q, q, q, max_seqlen_q=9, max_seqlen_kv=9), AttentionSpec(0.25)
    before = torch.backends.cuda.matmul.fp32_precision
    flags = []
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        flags.append(launch.Call.of(inputs, spec).flags)
    torch.backends.cuda.matmul.fp32_precision = before
    assert flags[0] == flags[1], "kernels would be compiled again"


def cuda_call(room: Room, x: Tensor | None = None, device: str = "cuda", **options: Any) -> Any:
    q = normal(2, 70, 2, 64, device=device) if x is None else x
    out = fastattn.attention(q, q, q, backend="cuda", **options)
    assert room.recording.broken_rule == "", room.recording.broken_rule
    return room.recording.launches[-1], out


def launches_without_a_context(room: Room) -> None:
    room.recording.bind(None)
    cuda_call(room)


def launches_on_each_device(room: Room) -> None:
    for index in (0, 1):
        assert cuda_call(room, device=f"cuda:{index}")[0].device == index


def leaves_devices_as_they_were(room: Room) -> None:
    """Contexts follow the current device, as in CUDA's runtime; the second call is by a plan."""
    room.machine.turned.append(room.recording.bind)
    room.recording.bind(0)
    for _ in range(2):
        q, k, v = (normal(2, 70, 2, 64, device="cuda:1") for _ in range(3))
        fastattn.attention(q, k, v, backend="cuda")
        assert room.recording.launches[-1].device == 1
        assert room.recording.bound == torch.cuda.current_device() == 0


def launches_on_the_stream(room: Room) -> None:
    """With a plan, and without one."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for options in ({}, {"sinks": normal(2)}):
            assert cuda_call(room, **options)[0].stream == side.cuda_stream


def launches_in_a_capture(room: Room) -> None:
    room.recording.bind(0)
    room.recording.library.rec_set_capturing(1)
    cuda_call(room)


def maps_odd_strides(room: Room) -> None:
    cuda_call(room, normal(2, 70, 2, 66)[..., :64])


def maps_rows(room: Room) -> None:
    q = normal(2, 70, 2, 64)
    cuda_call(room, q)
    assert list(room.recording.launches[0].maps[0].strides)[:3] == [2 * q.stride(1), 2 * q.stride(2), 2 * q.stride(0)]


def maps_pages(room: Room) -> None:
    cache, table = normal(8, 24, 2, 64), torch.arange(8, device="cuda").int().view(2, 4)
    lengths = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    fastattn.attention_with_kv_cache(normal(2, 1, 8, 64), cache, cache, lengths, block_table=table, backend="cuda")
    assert 24 % room.recording.launches[0].maps[0].box[1] == 0, "a box leaves its page"


def rounds_arguments(room: Room) -> None:
    buffer, address = driver.aligned_buffer(100)
    assert address + 128 <= torch.iinfo(torch.int64).max and len(buffer) >= 128 + 63


def says_errors(room: Room) -> None:
    room.monkeypatch.setattr(driver, "use_device", lambda device: None)
    room.recording.bind(None)
    with pytest.raises(RuntimeError, match="invalid device context"):
        fastattn.attention(*[normal(1, 9, 2, 64)] * 3, backend="cuda")


def asks_the_driver(room: Room) -> None:
    room.recording.library.rec_set_version(12040)
    asked: list[int] = []
    room.monkeypatch.undo()
    room.monkeypatch.setattr(driver, "_driver", lambda: room.recording.library)
    room.monkeypatch.setattr(nvrtc, "_wheel_libraries", lambda major: asked.append(major) or [])
    room.monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError()))
    with pytest.raises(nvrtc.NvrtcError):
        getattr(nvrtc.load, "__wrapped__", nvrtc.load)()
    assert asked == [12]


PROBLEM = Problem("cuda", 90, torch.bfloat16, 64, 64, 1, frozenset())


def checks_once(room: Room) -> None:
    checks: list[int] = []
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: checks.append(1) or evidence.Verdict(None))
    for _ in range(2):
        room.monkeypatch.setattr(evidence, "_verdicts", {})
        assert evidence.reasons_against("triton", PROBLEM) == []
    assert len(checks) == 1


def remembers_hangs(room: Room) -> None:
    hang = evidence.Verdict("it did not end in time", final=False, hung=True, at=time.time() - 3600)
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: hang)
    assert evidence.reasons_against("triton", PROBLEM)
    room.monkeypatch.setattr(evidence, "_verdicts", {})
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: pytest.fail("checked again"))
    assert evidence.reasons_against("triton", PROBLEM)


def believes_no_failure(room: Room) -> None:
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: evidence.Verdict("dq is off"))
    (reason,) = evidence.reasons_against("triton", PROBLEM)
    assert "dq is off" in reason


def needs_no_home(room: Room) -> None:
    room.monkeypatch.delenv("FASTATTN_CACHE")
    room.monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    room.monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    room.monkeypatch.setattr(evidence.tempfile, "tempdir", str(room.tmp_path))
    checks_once(room)


def started(room: Room) -> dict[str, Any]:
    options: dict[str, Any] = {}

    def start(command: list[str], **given: Any) -> None:
        options.update(given)
        raise OSError("enough")

    room.monkeypatch.setattr(evidence.subprocess, "Popen", start)
    evidence._self_check("triton", {"device": "a GPU", "index": 0})
    return options


def forbids_checks_in_a_check(room: Room) -> None:
    assert started(room)["env"]["FASTATTN_SELF_CHECK"] == "0"


def checks_in_a_session_of_its_own(room: Room) -> None:
    assert started(room)["start_new_session"]


def hides_host_time(room: Room) -> None:
    slept: list[float] = []
    ticks = itertools.count()
    room.monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    room.monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) * 0.01)  # a call takes the host 10 ms
    watch = timing.CudaStopwatch(torch.device("cuda"))
    watch(lambda: None, 20)
    seconds = [cycles / watch.CYCLES_PER_SECOND for cycles in slept]
    assert sum(seconds) >= 20 * 0.01 and max(seconds) <= watch.LONGEST_SLEEP


def benchmarks_without_checks(room: Room) -> None:
    room.monkeypatch.setattr(evidence, "_self_check", lambda *_: pytest.fail("a benchmark began a self-check"))
    workload = Workload(s_q=64, s_kv=64, heads_q=2, heads_kv=2, d_qk=64, d_v=64)
    assert fastattn_peer("triton").reasons(workload, "cuda") == []
    step = Step("nothing", ("true",), 5)
    assert gpu._environment(step, Plan(room.tmp_path, ()))["FASTATTN_SELF_CHECK"] == "0"


def ends_whole_groups(room: Room) -> None:
    pid = room.tmp_path / "pid"
    command = ("sh", "-c", f"sleep 30 & echo $! > {pid}; wait")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LEAST_S", 0)
        row = gpu._perform(Step("children", command, 0.5), Plan(room.tmp_path, ()), time.monotonic() + 60)
    assert row["result"] == "timed out"
    time.sleep(0.3)
    stat = subprocess.run(["ps", "-o", "stat=", pid.read_text().strip()], capture_output=True, text=True).stdout
    assert not stat.strip() or stat.startswith("Z"), "a child is left on the GPU"


D, KIND = "fastattn.backends.driver:", "fastattn.plan:_look_up_kind"
L, C, E = "fastattn.backends.triton.launch:", "fastattn.backends.cuda.", "fastattn.evidence:"
FAULTS = [
    Fault("no device guard", L + "device_of", 'x.device.type == "cuda"', "False", served_on_another_device),
    Fault(
        "a result in host memory", L + "_results", "dtype=inputs.q.dtype, device=inputs.q.device",
        "dtype=inputs.q.dtype", serves,
    ),
    Fault(
        "a result on the current device", L + "Backward.dq", "device=x.q.device", 'device="cuda:0"',
        served_on_another_device,
    ),
    Fault(
        "a wait in forward", L + "sizes_of", "coded(s_q)", "coded(s_q + 0 * int(torch.ones(1, device='cuda')))",
        serves,
    ),
    Fault(
        "a wait in backward", L + "Backward.dkdv", "config = config or", "x.k.sum().item(); config = config or", trains
    ),
    Fault("a plan for another alignment", KIND, "x.data_ptr() % ALIGNMENT", "0", keeps_plans_apart),
    Fault(
        "a plan for another device", KIND, "x.dtype, x.device,", "x.dtype, 0,",
        keeps_plans_apart,
    ),
    Fault(
        "a storage that shrank", "fastattn.plan:look_up", "> x.untyped_storage().nbytes()", "< 0", refuses_freed_memory,
    ),
    Fault(
        "calls that are taken for others", "fastattn.plan:look_up", "not seen.agrees(*given)", "False",
        keeps_plans_apart,
    ),
    Fault("a plan without a gradient", KIND, "x.requires_grad", "False", keeps_plans_apart),
    Fault(
        "a plan of another grad mode", "fastattn.plan:look_up", "torch.is_grad_enabled()", "True", keeps_plans_apart,
    ),
    Fault(
        "a plan without a device guard", "fastattn.backends.triton.plans:_run",
        "current_device() != index", "False", runs_plans_on_the_stream,
    ),
    Fault("a program too few", L + "schedule_of", "(blocks * heads,)", "(blocks * heads - 1,)", serves),
    Fault("a gradient that nothing writes", L + "Backward.dq", "if dq.numel():", "if False:", trains),
    Fault(
        "statistics in parts of one allocation", "fastattn.backends.triton.arguments:Stats.like",
        "[torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in range(3)]",
        "list(torch.empty(3, *lse.shape, dtype=torch.float32, device=lse.device))", aligned,
    ),
    Fault(
        "TF32 in the key of 16-bit kernels", L + "flags_of", "inputs.q.dtype == torch.float32 and _tf32()",
        "_tf32()", keeps_its_kernels,
    ),
    Fault(
        "lengths read on the host", "fastattn.backends.triton.launch_decode:_reach", "if spec.left is None:",
        "if int(inputs.cache_lengths.max()) >= 0:", decodes,
    ),
    Fault("random numbers of the host", "fastattn.rng:new_rng_state", ", device=device", "", drops),
    Fault(
        "seeds that wait", "fastattn.rng:new_rng_state", "return ",
        "return 0 + 0 * int(torch.ones(1, device=device)) + ", drops,
    ),
    Fault(
        "a judge that mixes devices", "fastattn.testing.caches:_judge_stored",
        "torch.ones(1, device=now.device).double()", "torch.ones((), dtype=torch.float64)", judges_caches,
    ),
    Fault("a silent fall-back", "fastattn.dispatch:_warn_slow", "warnings.warn(", "(lambda *_, **__: None)(", warns),
    Fault(
        "a plan of the CUDA kernels without a device guard", C + "plans:_run", "current_device() != index", "False",
        leaves_devices_as_they_were,
    ),
    Fault(
        "a thread without a context", D + "use_device", "if current.value != device:", "if False:",
        launches_without_a_context,
    ),
    Fault(
        "the context of another device", D + "_primary_context", "ctypes.byref(handle), device)",
        "ctypes.byref(handle), 0)", launches_on_each_device,
    ),
    Fault(
        "a function of another device", C + "nvrtc:NvrtcKernels._function", "key = (device, instance)",
        "key = (0, instance)", launches_on_each_device,
    ),
    Fault(
        "the default stream", C[:-1] + ":_current_stream", "yield current_raw_stream(device)", "yield 0",
        launches_on_the_stream,
    ),
    Fault(
        "the stream of another device", C + "plans:current_raw_stream", "handle(device.index)",
        "handle(1 - device.index)", launches_on_the_stream,
    ),
    Fault(
        "a module loaded in a strict capture", D + "load_function", "ctypes.c_int(RELAXED)",
        "ctypes.c_int(0)", launches_in_a_capture,
    ),
    Fault("a swallowed error", D + "_call", "if code:", "if code and False:", says_errors),
    Fault(
        "arguments that are not rounded", D + "aligned_buffer", "size += -size % MAP_ALIGNMENT", "pass",
        rounds_arguments,
    ),
    Fault("strides that TMA refuses", C + "abi:readable_rows", "step % 16 == 0", "step % 2 == 0", maps_odd_strides),
    Fault("strides in elements", C + "nvrtc:row_view", "(2 * given", "(given", maps_rows),
    Fault(
        "a box that leaves its page", C + "decode:decode_fields", "math.gcd(inputs.page_size, TILE_ROWS)",
        "TILE_ROWS", maps_pages,
    ),
    Fault(
        "maps that are not aligned", D + "aligned_buffer", "address + -address % MAP_ALIGNMENT",
        "address + 8 + -address % MAP_ALIGNMENT", cuda_call,
    ),
    Fault("an NVRTC newer than the driver", C + "nvrtc:load", "if major <= known", "", asks_the_driver),
    Fault("a verdict that is not kept", E + "_agreed", "_remember(key, known)", "pass", checks_once),
    Fault(
        "a hang that is forgotten", E + "Verdict.holds", "HANG_HOLDS_S if self.hung", "0 if self.hung",
        remembers_hangs,
    ),
    Fault(
        "a failure that is ignored", E + "reasons_against", "if verdict.failure is None:", "if True:",
        believes_no_failure,
    ),
    Fault(
        "a home that must be there", "fastattn.compiled:folders", "except OSError", "except KeyError", needs_no_home,
    ),
    Fault(
        "a check that checks itself", E + "_self_check", ', "FASTATTN_SELF_CHECK": "0"', "",
        forbids_checks_in_a_check,
    ),
    Fault(
        "a check that leaves children", E + "_self_check", "start_new_session=True", "start_new_session=False",
        checks_in_a_session_of_its_own,
    ),
    Fault(
        "host time in device time", "fastattn.measure.timing:CudaStopwatch.__call__",
        "now = min(at_once, calls - done)", "now = calls", hides_host_time,
    ),
    Fault(
        "a benchmark that checks", "benchmarks.gpu:_environment", '"FASTATTN_SELF_CHECK": "0", ', "",
        benchmarks_without_checks,
    ),
    Fault(
        "processes left behind", "benchmarks.gpu:_ended", "os.killpg(process.pid, signal.SIGKILL)",
        "process.kill()", ends_whole_groups,
    ),
]  # fmt: skip


@pytest.fixture
def room(machine: simulated.Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    with recorded_cuda() as recording:
        yield Room(machine, recording, tmp_path, monkeypatch)


PROBES = list(dict.fromkeys(fault.probe for fault in FAULTS))


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_nothing_is_reported_without_a_fault(probe: Callable[[Room], None], room: Room) -> None:
    probe(room)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_reported(fault: Fault, room: Room) -> None:
    fault.is_reported(room)


def test_there_are_enough() -> None:
    assert len({fault.what for fault in FAULTS}) == len(FAULTS) >= 25
