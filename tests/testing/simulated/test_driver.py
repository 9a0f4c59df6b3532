"""The host code of the CUDA backend over a recording driver: contexts, captures, tensor maps, launches, argument sizes.

The tensors are on the simulated GPUs, so devices and streams are those of torch.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import compiled
from fastattn.backends import cuda, driver
from fastattn.backends.cuda import abi, library, nvrtc
from fastattn.backends.cuda.instances import COMBINE, PADDED_ROWS, PREPROCESS, Instance, forward_configs
from fastattn.testing.simulated.recording import RecordedLaunch, RecordingDriver, argument_bytes, recorded_cuda

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the recording driver")
MAPS = {"forward": 4, "dkdv": 7, "decode": 2}


@pytest.fixture
def recorded() -> Iterator[RecordingDriver]:
    """The backend through ctypes; no rule of the driver is broken."""
    with recorded_cuda() as recording:
        yield recording
    assert recording.broken_rule == ""


def normal(*shape: int, device: str = "cuda", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def attend(device: str = "cuda", grad: bool = False, **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [
        normal(2, 70, 4, 64, device=device, grad=grad),
        *(normal(2, 70, 2, 64, device=device, grad=grad) for _ in range(2)),
    ]
    return fastattn.attention(*leaves, causal=True, backend="cuda", **options), leaves


def decode(*new: Tensor) -> Tensor:
    cache, table = normal(64, 64, 2, 64), torch.arange(64, device="cuda").int().view(2, 32)
    lengths = torch.tensor([3, 900], dtype=torch.int32, device="cuda")
    out = fastattn.attention_with_kv_cache(
        normal(2, 1, 8, 64), cache, cache.clone() if new else cache, lengths, *new, block_table=table, backend="cuda"
    )
    assert isinstance(out, Tensor)
    return out


def kernels(launches: list[RecordedLaunch]) -> list[str]:
    return [launch.kernel.decode().split("_bfloat16")[0] for launch in launches]


def test_forward_and_backward(recorded: RecordingDriver) -> None:
    out, _ = attend(grad=True)
    assert kernels(recorded.launches) == ["forward"]
    out.backward(torch.ones_like(out))
    assert kernels(recorded.launches)[1:] == ["rowwise", "backward_dkdv", "rowwise"]
    assert [len(launch.maps) for launch in recorded.launches] == [MAPS["forward"], 0, MAPS["dkdv"], 0]
    forward = recorded.launches[0]
    assert forward.grid[0] == 132 and forward.shared == nvrtc.SHARED_BYTES and forward.device == 0


def test_maps_show_the_tensors(recorded: RecordingDriver) -> None:
    out, (q, k, v) = attend()
    of_q, of_k, of_v, of_out = recorded.launches[0].maps
    for found, x in ((of_q, q), (of_k, k), (of_v, v), (of_out, out)):
        batch, rows, heads, columns = x.shape
        assert found.address == x.data_ptr() and found.type == 9
        assert list(found.sizes)[:4] == [columns, rows, heads, batch]
        assert list(found.strides)[:3] == [2 * x.stride(1), 2 * x.stride(2), 2 * x.stride(0)]
    assert of_out.box[1] == 64 and of_q.box[0] == 64


def test_decoding_and_its_splits(recorded: RecordingDriver) -> None:
    """By a plan from the second call on."""
    for new in ((), (normal(2, 1, 2, 64), normal(2, 1, 2, 64))):
        for _ in range(2):
            recorded.clear()
            decode(*new)
            assert kernels(recorded.launches) == [*(["append"] if new else []), "decode", "combine"]
            assert [len(launch.maps) for launch in recorded.launches][-2:] == [MAPS["decode"], 0]


@pytest.mark.parametrize("call", [attend, decode], ids=["dense", "decode"])
def test_a_thread_without_a_context_gets_one(call: Callable[[], object], recorded: RecordingDriver) -> None:
    """As those of autograd and of servers are: the driver says 201 to them."""
    recorded.bind(None)
    call()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == [] and {launch.device for launch in recorded.launches} == {0}


def test_without_it_the_driver_refuses(recorded: RecordingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "use_device", lambda device: None)
    recorded.bind(None)
    with pytest.raises(RuntimeError, match="invalid device context"):
        attend()
    recorded.library.rec_reset()


def test_each_device_has_its_context_and_modules(recorded: RecordingDriver) -> None:
    recorded.bind(0)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        attend(device)
    assert [launch.device for launch in recorded.launches] == [0, 1, 0]
    assert recorded.library.rec_modules() == 2, "a module for each device, and no more"


def test_backward_on_the_threads_of_autograd(recorded: RecordingDriver) -> None:
    out, leaves = attend("cuda:1", grad=True)
    recorded.bind(None)
    out.backward(torch.ones_like(out))
    assert {launch.device for launch in recorded.launches} == {1} and leaves[0].grad is not None


def test_the_current_stream(recorded: RecordingDriver) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        out, _ = attend(grad=True)
        out.backward(torch.ones_like(out))
        decode()
    assert {launch.stream for launch in recorded.launches} == {side.cuda_stream}


def test_a_first_call_may_be_captured(recorded: RecordingDriver) -> None:
    recorded.bind(0)
    recorded.library.rec_set_capturing(1)
    attend()
    recorded.library.rec_set_capturing(0)
    assert kernels(recorded.launches) == ["forward"]


ODD_TENSORS = {
    "an offset of one row": lambda: normal(2, 71, 4, 64)[:, 1:],
    "an offset of 8 bytes": lambda: normal(1, 2 * 70 * 4 * 64 + 4).flatten()[4:].view(2, 70, 4, 64),
    "rows of 72 numbers": lambda: normal(2, 70, 4, 72)[..., :64],
    "rows of 66 numbers": lambda: normal(2, 70, 4, 66)[..., :64],
    "heads first": lambda: normal(2, 4, 70, 64).transpose(1, 2),
    "one batch entry, expanded": lambda: normal(1, 70, 4, 64).expand(2, -1, -1, -1),
    "one head, odd stride": lambda: normal(2, 70, 3, 64)[:, :, 1:2],
    "one row": lambda: normal(2, 9, 4, 64)[:, 3:4],
}


@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_whatever_the_strides_maps_keep_the_rules(
    make: Callable[[], Tensor], head_dim: int, recorded: RecordingDriver
) -> None:
    """The fixture asserts that no rule was broken."""
    x = make()[..., :head_dim].requires_grad_()
    out = fastattn.attention(x, x, x, backend="cuda")
    out.sum().backward()
    assert kernels(recorded.launches)[0] == "forward"


@pytest.mark.parametrize("page_size", [1, 2, 4, 16, 24, 64, 256])
def test_pages_of_any_size(page_size: int, recorded: RecordingDriver) -> None:
    cache = normal(8, page_size, 2, 64)
    table = torch.arange(8, device="cuda").int().view(2, 4)
    lengths = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    fastattn.attention_with_kv_cache(normal(2, 1, 8, 64), cache, cache, lengths, block_table=table, backend="cuda")
    launch = recorded.launches[0]
    if page_size < 8:
        assert kernels([launch]) == ["decode_gathered"] and not launch.maps, "threads copy the rows"
        return
    box_rows = launch.maps[0].box[1]
    assert page_size % box_rows == 0 or box_rows >= page_size, "a box must not leave its page"


def test_arguments_are_as_long_as_the_driver_reads(recorded: RecordingDriver) -> None:
    """It copies whole multiples of 64 bytes, for the alignment of the maps."""
    for size in range(1, 700, 37):
        buffer, address = driver.aligned_buffer(size)
        assert address % 64 == 0
        assert address + -(-size // 64) * 64 <= ctypes.addressof(buffer) + len(buffer)


def test_the_bytes_arrive(recorded: RecordingDriver) -> None:
    q = normal(1, 70, 2, 64)
    inputs = fastattn.problem.Inputs(q, q, q, max_seqlen_q=70, max_seqlen_kv=70)
    results = (torch.empty_like(q), *(torch.empty(1, 2, 70, device="cuda") for _ in range(2)))
    fields = abi.forward_fields(inputs, fastattn.spec.AttentionSpec(0.125), results, 7)
    cuda._kernels().launch(abi.FORWARD, fields)
    (launch,) = recorded.launches
    assert launch.argument[MAPS["forward"] * driver.MAP_BYTES :] == abi.FORWARD.pack(fields)
    assert launch.stream == 7


@pytest.mark.parametrize(("version", "major"), [(12040, 12), (13000, 13), (11080, 11)])
def test_nothing_newer_than_the_driver(
    version: int, major: int, recorded: RecordingDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(driver, "_driver", lambda: recorded.library)
    recorded.library.rec_set_version(version)
    assert driver.supported_major() == major
    asked: list[str] = []
    monkeypatch.setattr(nvrtc, "_wheel_libraries", lambda m: asked.append(f"wheel {m}") or [])
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name: asked.append(name) or (_ for _ in ()).throw(OSError()))
    nvrtc.load.cache_clear()
    with pytest.raises(nvrtc.NvrtcError, match="NVRTC was not found"):
        nvrtc.load()
    assert asked == [x for m in (13, 12) if m <= major for x in (f"wheel {m}", f"libnvrtc.so.{m}")]


def test_a_library_newer_than_the_driver_is_left(recorded: RecordingDriver, tmp_path: Path) -> None:
    source, target = tmp_path / "library.c", tmp_path / "libfastattn.so"
    source.write_text("long long fa_cuda_version(void) { return 13000; }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    compiled.seal(target)
    recorded.library.rec_set_version(12040)
    with pytest.raises(OSError, match="built with CUDA 13, the driver knows CUDA 12"):
        library.Library(target)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("config", [COMBINE, PREPROCESS, forward_configs()[0]], ids=lambda config: config.function)
def test_arguments_have_the_size_that_the_kernel_declares(config: Any, tmp_path: Path) -> None:
    """By the compiler's own word: the size of the parameter in its PTX."""
    instance = Instance(config, "bfloat16")
    for name, text in nvrtc.headers().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    source = tmp_path / "kernel.cu"
    source.write_text(nvrtc.source_of(instance))
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_90a",
        "-ptx",
        f"-I{tmp_path}",
        str(source),
        "-o",
        str(tmp_path / "kernel.ptx"),
    ]
    subprocess.run(command, check=True, timeout=300)
    (size,) = re.findall(rf"{nvrtc.KERNEL}_param_0\[(\d+)\]", (tmp_path / "kernel.ptx").read_text())[:1]
    rounded = -(-argument_bytes(instance) // 64) * 64 if config == forward_configs()[0] else argument_bytes(instance)
    assert int(size) in (rounded, argument_bytes(instance))


def test_padded_rows_fill_the_grid(recorded: RecordingDriver) -> None:
    out, _ = attend(grad=True)
    out.backward(torch.ones_like(out))
    prepare = recorded.launches[1]
    assert prepare.grid[0] == 2 * 4 * -(-70 // PADDED_ROWS)
