"""The Triton backend on a GPU, with torch 2.11 and Triton 3.6. Without installation: PYTHONPATH=. pytest -m gpu."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
import fastattn.nn
from fastattn import evidence, testing
from fastattn.backends import load
from fastattn.testing import simulated
from fastattn.testing.self_check import self_check

pytestmark = pytest.mark.gpu

GRID = testing.grid((torch.float32, torch.float16, torch.bfloat16))
GRID = [case for case in GRID if max(case.D_qk, case.D_v) <= load("triton").capabilities.max_head_dim]
GIB = 1 << 30
LENGTH = 512 if torch.cuda.is_available() and not simulated.is_present() else 48  # the interpreter is slow


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def qkv(batch: int, s: int, heads: int, d: int, heads_kv: int | None = None) -> list[Tensor]:
    tensors = [normal(batch, s, h, d) for h in (heads, heads_kv or heads, heads_kv or heads)]
    return [x.requires_grad_() for x in tensors]


def grads(out: Tensor, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, dout))


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free / GIB:.0f}")


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_grid(case: testing.Case) -> None:
    testing.assert_within(testing.measure(load("triton"), testing.make(case, device="cuda")))


@pytest.mark.parametrize("case", testing.grid((torch.bfloat16,), quick=True), ids=lambda case: case.id)
@pytest.mark.parametrize("length", [1000, 2048])
def test_grid_at_lengths_of_many_tiles(case: testing.Case, length: int) -> None:
    if case.lengths is not None:
        case = dataclasses.replace(case, lengths=((length, length), (0, 7), (length // 3, length)))
    elif case.bias is not None:
        case = dataclasses.replace(case, S_q=length, S_kv=length, bias=(*case.bias[:2], length, length))
    else:
        case = dataclasses.replace(case, S_q=length, S_kv=length)
    testing.assert_within(testing.measure(load("triton"), testing.make(case, device="cuda")))


@pytest.mark.parametrize("dims", [(1, 1), (7, 7), (80, 80), (160, 160), (200, 72), (192, 128), (255, 256)], ids=str)
def test_head_dims(dims: tuple[int, int]) -> None:
    plain = next(case for case in GRID if case.id == "plain [bfloat16]")
    case = dataclasses.replace(plain, S_q=300, S_kv=333, right=0, D_qk=dims[0], D_v=dims[1])
    testing.assert_within(testing.measure(load("triton"), testing.make(case, device="cuda")))


@pytest.mark.parametrize("backward", ["eager", "portable"])
def test_backward_of_another_backend(backward: str) -> None:
    for case in testing.grid((torch.bfloat16,), quick=True):
        testing.assert_within(testing.measure("triton", testing.make(case, device="cuda"), backward))
        testing.assert_within(testing.measure(backward, testing.make(case, device="cuda"), "triton"))


def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    """The last head of the last batch entry must not notice what lies before it."""
    needs_memory(60)
    q, k, v = qkv(2, 8704, 1024, 128)
    assert q.numel() > 2**31
    window = (256, 0)
    with fastattn.use_backend("triton"):
        out = fastattn.attention(q, k, v, causal=True, window=window)
        dout = torch.randn_like(out)
        whole = [out, *grads(out, [q, k, v], dout)]
        part = [x[-1:, :, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*part, causal=True, window=window)
        expected = [out, *grads(out, part, dout[-1:, :, -1:].contiguous())]
    for name, x, y in zip(("out", "backward_dq", "dk", "dv"), whole, expected, strict=True):
        assert torch.equal(x[-1:, :, -1:], y), name


def test_one_long_row_of_a_packed_batch_beyond_2_to_the_31_elements() -> None:
    needs_memory(40)
    heads, d, total = 128, 128, 2**17 + 512
    q = normal(total, heads, d)
    assert q.numel() > 2**31
    cu_seqlens = torch.tensor([0, total - 512, total], dtype=torch.int32, device="cuda")
    out = fastattn.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, max_seqlen_q=total, max_seqlen_kv=total,
                                    window=(128, 0), causal=True, backend="triton")  # fmt: skip
    tail = q[-512:].clone()[None]
    assert torch.equal(
        out[-512:], fastattn.attention(tail, tail, tail, causal=True, window=(128, 0), backend="triton")[0]
    )


@pytest.mark.simulated
@pytest.mark.parametrize("feature", ["causal", "segments", "dropout"])
def test_graph_capture_and_replay(feature: str) -> None:
    q, k, v = qkv(2, LENGTH, LENGTH // 24, 64)
    dout = torch.randn_like(q)
    ids = torch.arange(LENGTH, device="cuda").expand(2, -1) // 100
    options: dict[str, dict[str, object]] = {
        "causal": {"causal": True},
        "segments": {"segment_ids": ids.contiguous()},
        "dropout": {"dropout_p": 0.1, "rng_state": torch.tensor([1, 2], device="cuda")},
    }

    def step() -> list[Tensor]:
        out = fastattn.attention(q, k, v, backend="triton", **options[feature])  # type: ignore[arg-type]
        return [out, *grads(out, [q, k, v], dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for x in (q, k, v, dout):
                x.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.simulated
def test_nothing_waits_for_the_device() -> None:
    q, k, v = qkv(2, LENGTH, LENGTH // 24, 64)
    ids = torch.arange(LENGTH, device="cuda").expand(2, -1) // 100
    cu_seqlens = torch.tensor([0, 10, 2 * LENGTH], dtype=torch.int32, device="cuda")

    def step() -> None:
        out = fastattn.attention(q, k, v, causal=True, segment_ids=ids, backend="triton")
        grads(out, [q, k, v], torch.ones_like(out))
        packed = [x.detach().flatten(0, 1) for x in (q, k, v)]
        fastattn.attention_varlen(
            *packed,
            cu_seqlens,
            cu_seqlens,
            max_seqlen_q=2 * LENGTH - 10,
            max_seqlen_kv=2 * LENGTH - 10,
            backend="triton",
        )

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.simulated
def test_it_runs_on_the_current_stream() -> None:
    q, k, v = (x.detach() for x in qkv(1, 2 * LENGTH, 4, 64))
    expected = fastattn.attention(q, k, v, backend="triton")
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        out = fastattn.attention(late, k, v, backend="triton")
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out, expected)


@pytest.mark.simulated
def test_every_device() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs several GPUs, there is {count}")
    on_first = qkv(1, LENGTH // 2, 4, 64)
    out = fastattn.attention(*on_first, causal=True, backend="triton")
    expected = [out, *grads(out, on_first, torch.ones_like(out))]
    for index in range(1, count):  # the current device stays the first
        there = [x.detach().to(f"cuda:{index}").requires_grad_() for x in on_first]
        out = fastattn.attention(*there, causal=True, backend="triton")
        found = [out, *grads(out, there, torch.ones_like(out))]
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, expected, strict=True))


def test_torch_compile_of_a_module() -> None:
    module = fastattn.nn.MultiHeadAttention(256, 4, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = normal(2, 130, 256)
    with fastattn.use_backend("triton"):
        results = []
        for call in (module, torch.compile(module, fullgraph=True)):
            at = x.clone().requires_grad_()
            out = call(at, at, at, need_weights=False)[0]
            results.append([out, *grads(out, [at, *module.parameters()], torch.ones_like(out))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def peak_memory(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_linear_in_length() -> None:
    """Up to 128k tokens, forward and backward; a score matrix of that length would take 32 GiB for each head."""
    needs_memory(12)
    peaks = []
    for s in (32768, 65536, 131072):
        q, k, v = qkv(1, s, 4, 64)

        def step(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            out = fastattn.attention(q, k, v, window=(1024, 0), causal=True, backend="triton")
            grads(out, [q, k, v], torch.ones_like(out))

        step()
        peaks.append(peak_memory(step))
    assert all(later <= 2.1 * earlier for earlier, later in itertools.pairwise(peaks)), peaks


@pytest.mark.parametrize("feature", ["causal", "gqa", "bias", "dropout"])
def test_ten_runs_give_the_same_bits(feature: str) -> None:
    q, k, v = qkv(2, 1111, 8, 128, heads_kv=2 if feature == "gqa" else 8)
    leaves, options = [q, k, v], {}
    if feature == "bias":
        options["bias"] = normal(1, 8, 1111, 1111).requires_grad_()
        leaves = [*leaves, options["bias"]]
    if feature == "dropout":
        options |= {"dropout_p": 0.2, "rng_state": torch.tensor([3, 4], device="cuda")}
    dout = normal(*q.shape)
    runs = []
    for _ in range(10):
        out = fastattn.attention(q, k, v, causal=True, backend="triton", **options)
        runs.append([out, *grads(out, leaves, dout)])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_tf32_is_opt_in() -> None:
    q, k, v = (normal(1, 512, 2, 64, dtype=torch.float32) for _ in range(3))
    exact = fastattn.attention(q.double(), k.double(), v.double(), backend="eager")
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = float((fastattn.attention(q, k, v, backend="triton") - exact).abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


def test_lengths_do_not_compile_again() -> None:
    from fastattn.backends.triton.forward import forward_kernel

    def kernels() -> int:
        return len(forward_kernel.device_caches[torch.cuda.current_device()][0])

    counts = []
    for s in (1, 2, 16, 17, 100, 128, 1024):
        q, k, v = (normal(2, 4, s, 64).transpose(1, 2) for _ in range(3))
        fastattn.attention(q, k, v, backend="triton")
        counts.append(kernels())
    assert counts[-1] == counts[0]


@pytest.mark.simulated
def test_the_self_check_passes() -> None:
    assert self_check("triton", "cuda") == []


@pytest.mark.simulated
def test_the_choice_is_explained() -> None:
    """Triton is chosen, or what speaks against it is said; without a check of its own it is never silent."""
    q, k, v = (x.detach() for x in qkv(1, 128, 2, 64))
    explanation = fastattn.explain(q, k, v)
    assert explanation.reasons["triton"] == []
    if os.environ.get("FASTATTN_SELF_CHECK") == "0" and ("triton", 90) not in evidence.RECORDS:
        assert "FASTATTN_SELF_CHECK=0" in explanation.passed_over["triton"][0]
    else:
        assert explanation.chosen in ("cuda", "triton"), str(explanation)
