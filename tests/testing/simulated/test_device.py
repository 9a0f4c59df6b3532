"""The simulated GPUs themselves: results, refusals, counts, poisoned memory, captures."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.testing import simulated


def on(device: str = "cuda", *shape: int) -> Tensor:
    return torch.randn(shape or (3, 4), device=device)


def test_operators_compute_as_on_the_cpu(machine: simulated.Machine) -> None:
    x, y = torch.randn(5, 4), torch.randn(4, 6)
    for compute in (
        lambda a, b: a @ b, lambda a, b: (a + 1).softmax(-1).sum(0), lambda a, b: a[1:, ::2].t() * a.mean(),
        lambda a, b: torch.cat([a, b.t()[:, :4]]), lambda a, b: a.cumsum(0).sort(-1).values, lambda a, b: a[a > 0],
        lambda a, b: F.layer_norm(a, (4,)), lambda a, b: a.to(torch.bfloat16).float(), lambda a, b: a.double().var(),
    ):  # fmt: skip
        there = compute(x.cuda(), y.cuda())
        assert there.device == torch.device("cuda:0")
        torch.testing.assert_close(there.cpu(), compute(x, y))  # composed operators may take another way


def test_views_share_memory(machine: simulated.Machine) -> None:
    x = torch.zeros(4, 6, device="cuda")
    for view in (x[1], x.t(), x.view(24), x.view(torch.int32), x.as_strided((2, 2), (6, 1), 7), x.unfold(1, 2, 2)):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and view.is_cuda
    x[1].add_(1)
    x.view(24)[0] = 5
    assert x.sum() == 11


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: x.add_(cpu),
        lambda x, cpu: x @ cpu.t(),
        lambda x, cpu: torch.cat([x, cpu]),
        lambda x, cpu: torch.where(x > 0, x, cpu),
        lambda x, cpu: x.masked_fill(cpu > 0, 0.0),
        lambda x, cpu: x.clamp(torch.zeros(()), torch.ones(())),  # numbers are let through by most operators, not here
        lambda x, cpu: x.gather(0, cpu.long() * 0),
        lambda x, cpu: cpu[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda x, cpu: x + torch.ones(4, device="cuda:1"),
        lambda x, cpu: F.linear(x, cpu),
        lambda x, cpu: F.embedding(torch.zeros(1, dtype=torch.long), x),
        lambda x, cpu: torch.rand(2, device="cuda", generator=torch.Generator()),
        lambda x, cpu: nn.Linear(4, 2)(x),
        lambda x, cpu: x.numpy(),
    ],
)
def test_what_a_gpu_refuses(mix: Callable[[Tensor, Tensor], object], machine: simulated.Machine) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device|Expected a 'cuda'"):
        mix(on(), torch.randn(3, 4))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, cpu: x + torch.ones(()),
        lambda x, cpu: torch.where(x > 0, x, torch.zeros(())),
        lambda x, cpu: x[torch.tensor([0, 2])],
        lambda x, cpu: x.copy_(cpu),
        lambda x, cpu: x * 2 + cpu.sum().item(),
        lambda x, cpu: x.to("cuda:1"),
    ],
)
def test_what_a_gpu_lets_pass(mix: Callable[[Tensor, Tensor], Tensor], machine: simulated.Machine) -> None:
    assert mix(on(), torch.randn(3, 4)).is_cuda


@pytest.mark.parametrize(
    ("wait", "operator"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: bool(x.any()), "aten::_local_scalar_dense"),
        (lambda x: x.tolist(), "aten::copy_"),
        (lambda x: x.cpu(), "aten::copy_"),
        (lambda x: torch.ones(3).to("cuda"), "aten::copy_"),
        (lambda x: torch.tensor([1.0], device="cuda"), "aten::copy_"),
        (lambda x: x[x > 0], "aten::nonzero"),
        (lambda x: x.masked_select(x > 0), "aten::masked_select"),
        (lambda x: torch.equal(x, x.clone()), "aten::equal"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_waits_are_counted_with_their_line(
    wait: Callable[[Tensor], object], operator: str, machine: simulated.Machine
) -> None:
    x = on()
    machine.waits.clear()
    wait(x)
    assert [found.operator for found in machine.waits] == [operator]
    assert "test_device.py" in machine.waits[0].line
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_wait(machine: simulated.Machine) -> None:
    x = on()
    machine.waits.clear()
    torch.zeros(3, device="cuda") + x.sum() + x.new_full((3,), 2.0)
    torch.ones(3).to("cuda", non_blocking=True)
    torch.randint(0, 9, (2,), device="cuda").clamp(max=3)
    assert machine.waits == []


def test_fresh_memory_is_poisoned(machine: simulated.Machine) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        assert torch.empty(5, device="cuda", dtype=dtype).float().isnan().all()
    assert (torch.empty(5, device="cuda", dtype=torch.int32) == -1).all()
    assert torch.empty_strided((2, 2), (1, 2), device="cuda").isnan().all()


def test_devices_and_streams(machine: simulated.Machine) -> None:
    assert torch.cuda.device_count() == 2 and torch.empty(1, device="cuda:1").get_device() == 1
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1 and torch.empty(1, device="cuda").device.index == 1
        there: list[int] = []
        thread = threading.Thread(target=lambda: there.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert there == [0], "each thread has a current device of its own"
    side = torch.cuda.Stream()
    assert torch.cuda.current_stream().cuda_stream == 0
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side and torch.cuda.current_stream().cuda_stream == side.cuda_stream != 0
        assert torch.cuda.current_stream(1).cuda_stream == 0
    side.wait_stream(torch.cuda.current_stream())
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    second.record()
    assert first.elapsed_time(second) >= 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(2)


def test_gradients_flow_on_each_device(machine: simulated.Machine) -> None:
    for device in ("cuda:0", "cuda:1"):
        x = torch.randn(3, 4, device=device, requires_grad=True)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)).to(device)
        model(x).square().mean().backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        assert x.grad is not None and x.grad.device == x.device and bool(x.grad.isfinite().all())


def test_capture_and_replay(machine: simulated.Machine) -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = (x + 1) * 2
        total = y.sum()
        y[1:].mul_(10)
    assert not torch.cuda.is_current_stream_capturing()
    x.fill_(3)
    for _ in range(2):
        graph.replay()
        assert y.tolist() == [8, 80, 80, 80] and total == 32
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def test_random_numbers_follow_their_generator(machine: simulated.Machine) -> None:
    torch.manual_seed(3)
    first = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(first[0], torch.rand(4, device="cuda")) and not torch.equal(*first)
    state = torch.cuda.get_rng_state()
    again = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(again, torch.rand(4, device="cuda"))
    own = torch.Generator(device="cuda").manual_seed(1)
    assert torch.rand(2, device="cuda", generator=own).is_cuda


def test_memory_is_counted(machine: simulated.Machine) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device="cuda")
    y = x + 1
    assert torch.cuda.memory_allocated() - before == x.nbytes + y.nbytes
    del y
    assert torch.cuda.max_memory_allocated() - before == 8000 and torch.cuda.memory_allocated() - before == 4000


def test_nothing_stays_when_they_are_gone() -> None:
    code = """
import torch
from fastattn.testing import simulated
names = ("is_available", "Stream", "current_stream", "synchronize", "device_count")
before = [getattr(torch.cuda, name) for name in names]
with simulated.present():
    assert torch.cuda.is_available() and torch.accelerator.is_available()
assert before == [getattr(torch.cuda, name) for name in names]
assert not torch.cuda.is_available() and not torch.accelerator.is_available()
assert torch.version.cuda is None and not hasattr(torch._C, "_cuda_getCurrentRawStream")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
