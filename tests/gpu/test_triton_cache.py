"""The decoding kernels of the Triton backend on a GPU."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import testing
from fastattn.backends import load
from fastattn.testing import simulated

pytestmark = pytest.mark.gpu

CAPACITY = 4096 if torch.cuda.is_available() and not simulated.is_present() else 192  # the interpreter is slow
GRID = testing.cache_grid((torch.float32, torch.float16, torch.bfloat16))
GRID = [case for case in GRID if max(case.D_qk, case.D_v) <= load("triton").capabilities.max_head_dim]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_caches(case: testing.CacheCase) -> None:
    testing.assert_within(testing.measure_cache(load("triton"), testing.make_cache_sample(case, "cuda")))


def cache(batch: int, capacity: int, heads: int = 2, d: int = 128, page_size: int = 64) -> dict[str, torch.Tensor]:
    """Random pages, in random order, and a block table that has all of them."""
    pages = batch * capacity // page_size
    k, v = (torch.randn(pages, page_size, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(pages, device="cuda").int().view(batch, -1)
    return {"k_cache": k, "v_cache": v, "block_table": table}


def decode(q: torch.Tensor, lengths: torch.Tensor, paged: dict[str, torch.Tensor]) -> torch.Tensor:
    out = fastattn.attention_with_kv_cache(q, cache_lengths=lengths, **paged, backend="triton")
    assert isinstance(out, torch.Tensor)
    return out


LONG = {"page_size": 64, "D_qk": 128, "D_v": 128, "H_q": 8, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "case",
    [
        testing.CacheCase("one token", before=(1, 20000, 32767), **LONG),
        testing.CacheCase("tokens, window", before=(9000, 17), s_q=(100, 100), left=4096, **LONG),
        testing.CacheCase("ragged, e4m3", before=(30000, 0, 5), s_q=(1, 900, 64), packed=True, fp8="page", **LONG),
    ],
    ids=lambda case: case.id,
)
def test_long_caches(case: testing.CacheCase) -> None:
    """In many splits, and in blocks of many rows."""
    testing.assert_within(testing.measure_cache(load("triton"), testing.make_cache_sample(case, "cuda")))


@pytest.mark.simulated
def test_lengths_may_change_between_replays() -> None:
    """A graph captured at one length decodes at any other, and appends where that ends."""
    paged, q = cache(4, CAPACITY), torch.randn(4, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(4, 1, 2, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((4,), 10, device="cuda", dtype=torch.int32)

    def step() -> torch.Tensor:
        out = fastattn.attention_with_kv_cache(
            q, paged["k_cache"], paged["v_cache"], lengths, new, new, block_table=paged["block_table"], backend="triton"
        )
        lengths.add_(1)
        assert isinstance(out, torch.Tensor)
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in (0, CAPACITY // 5, CAPACITY - 96):
        lengths.fill_(length)
        graph.replay()
        assert lengths.tolist() == [length + 1] * 4
        assert torch.equal(captured, decode(q, lengths, paged))


@pytest.mark.simulated
def test_nothing_waits_for_the_device() -> None:
    paged, q = cache(2, 1024), torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([5, 900], device="cuda", dtype=torch.int32)
    decode(q, lengths, paged)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(q, lengths, paged)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ten_runs_give_the_same_bits() -> None:
    paged, q = cache(2, 16384), torch.randn(2, 3, 8, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([15000, 16000], device="cuda", dtype=torch.int32)
    runs = [decode(q, lengths, paged) for _ in range(10)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_caches_of_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sequence must not notice what lies before it."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    from fastattn.backends.triton import launch_decode

    monkeypatch.setattr(launch_decode, "splits", lambda *_: 8)
    k = torch.randn(5, 2**17, 32, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    q = torch.randn(5, 1, 32, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((5,), 2**17, device="cuda", dtype=torch.int32)
    out = decode(q, lengths, {"k_cache": k, "v_cache": k})
    assert torch.equal(out[-1:], decode(q[-1:], lengths[-1:], {"k_cache": k[-1:], "v_cache": k[-1:]}))
