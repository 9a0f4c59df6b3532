"""The decoding kernels through Triton's interpreter: the grid of caches against fp64, whole and in splits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastattn.backends import load  # noqa: E402
from fastattn.backends.triton import launch, launch_decode  # noqa: E402
from fastattn.backends.triton.pages import from_e4m3, to_e4m3  # noqa: E402
from fastattn.decoding import explain_with_kv_cache  # noqa: E402
from fastattn.kv_cache import FP8, CacheInputs  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402
from fastattn.testing import CacheCase, assert_within, cache_grid, make_cache_sample, measure_cache  # noqa: E402

GRID = cache_grid((torch.float32, torch.float16, torch.bfloat16))
GRID = [case for case in GRID if max(case.D_qk, case.D_v) <= load("triton").capabilities.max_head_dim]
# Kernels of contiguous caches differ in where a row lies and in nothing else.
CONTIGUOUS = ("one token", "strided", "window", "ragged, everything", "everything", "e4m3", "tree, window")
WALKED = [case for case in GRID if case.page_size or case.id.startswith(CONTIGUOUS)]
FP32_PAGES = [case for case in GRID if case.page_size and case.dtype == torch.float32]
IN_PARTS = ("some tokens", "window of tokens", "sinks", "ragged", "everything", "e4m3", "an empty", "pages of 16")


@pytest.mark.parametrize("case", WALKED, ids=lambda case: case.id)
def test_caches(case: CacheCase) -> None:
    assert_within(measure_cache(load("triton"), make_cache_sample(case)))


@pytest.mark.parametrize("case", [c for c in FP32_PAGES if c.id.startswith(IN_PARTS)], ids=lambda case: case.id)
def test_caches_in_parts(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than some rows have tiles, so that there are empty ones."""
    monkeypatch.setattr(launch_decode, "splits", lambda *_: 3)
    assert_within(measure_cache(load("triton"), make_cache_sample(case)))


def test_more_parts_than_one_step_combines(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in GRID if case.id == "one token [pages of 8, float32]")
    monkeypatch.setattr(launch_decode, "splits", lambda *_: 7)
    monkeypatch.setattr(launch_decode, "COMBINED_SPLITS", 4)
    assert_within(measure_cache(load("triton"), make_cache_sample(case)))


PROMPTS = ("some tokens", "window of tokens", "odd head dims", "ragged, everything", "everything", "e4m3, ragged")
LONG = [case for case in GRID if case.dtype == torch.float16 and case.id.startswith(PROMPTS)]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_prompts(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many new rows, which the forward kernel serves: it reads caches, pages and e4m3 as the decoding kernel does."""
    taken = []
    attend = launch_decode.attend_as_prompt
    monkeypatch.setattr(launch_decode, "is_prompt", lambda inputs: True)
    monkeypatch.setattr(launch_decode, "attend_as_prompt", lambda *args: taken.append(attend(*args)))
    assert_within(measure_cache(load("triton"), make_cache_sample(case)))
    assert taken


def test_rows_that_fill_tiles_and_the_device_are_a_prompt() -> None:
    def of(s_q: int, **terms: object) -> bool:
        q = torch.empty(2, s_q, 16, 64, dtype=torch.bfloat16, device="meta")
        cache = torch.empty(2, 4096, 4, 64, dtype=torch.bfloat16, device="meta")
        lengths = torch.empty(2, dtype=torch.int32, device="meta")
        return launch_decode.is_prompt(CacheInputs(q, cache, cache, lengths, max_seqlen_q=s_q).replace(**terms))

    assert launch.processors(torch.device("meta")) == 128 and of(512) and not of(511) and not of(1)
    assert not of(512, batch_invariant=True) and not of(512, tree_mask=torch.empty(1, 512, 16, device="meta"))


def test_new_rows_beyond_the_cache_are_dropped() -> None:
    """Lengths on a GPU are the caller's duty; wrong ones must not write into other memory."""
    (case,) = (case for case in GRID if case.id == "some tokens [pages of 8, float32]")
    inputs = make_cache_sample(case).inputs
    assert inputs.k is not None and inputs.block_table is not None
    lengths = torch.full_like(inputs.cache_lengths, inputs.capacity - 2)
    table = torch.arange(inputs.block_table.numel(), dtype=torch.int32).view(inputs.block_table.shape)
    inputs = inputs.replace(cache_lengths=lengths, block_table=table)
    before = inputs.k_cache.clone()
    load("triton").attend_to_cache(inputs, make_cache_sample(case).spec)
    last = table[:, -1].long()
    assert torch.equal(inputs.k_cache[last, -2:], inputs.k[:, :2])
    before[last, -2:] = inputs.k[:, :2]
    assert torch.equal(inputs.k_cache.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("page", [-1, 2**20, -(2**31)])
def test_pages_that_the_cache_does_not_have_are_never_followed(page: int) -> None:
    """A table on a GPU is not checked. The caches lie between NaN, which no read sees and no new row replaces."""
    (case,) = (case for case in GRID if case.id == "some tokens [pages of 8, float32]")
    sample = make_cache_sample(case)
    inputs = sample.inputs
    assert inputs.block_table is not None
    around = [torch.full((x.shape[0] + 2, *x.shape[1:]), torch.nan) for x in (inputs.k_cache, inputs.v_cache)]
    caches = [x[1:-1] for x in around]
    for x in caches:
        x.zero_()
    table = torch.full_like(inputs.block_table, page)
    if page > 0:
        table[:, ::2] = inputs.k_cache.shape[0]  # the NaN right behind
    hostile = inputs.replace(k_cache=caches[0], v_cache=caches[1], block_table=table)
    out, _ = load("triton").attend_to_cache(hostile, sample.spec)
    assert bool(out.isfinite().all())
    assert all(bool(x[[0, -1]].isnan().all()) and not x[1:-1].any() for x in around)


def test_one_tensor_may_be_queries_keys_and_values() -> None:
    """What is done to each follows from its place, not from which tensor it is: values are never turned."""
    (case,) = (case for case in GRID if case.id == "rotary [pages of 8, float32]")
    case = dataclasses.replace(case, H_q=2)
    sample = make_cache_sample(case)
    x = sample.inputs.q
    one = dataclasses.replace(sample, inputs=sample.inputs.replace(k=x, v=x))
    assert_within(measure_cache(load("triton"), one))


def test_parts_fill_the_device_and_no_more() -> None:
    assert launch_decode.splits(programs=1, reach=1 << 20, block_n=64, on=132) == 264
    assert launch_decode.splits(programs=8, reach=1 << 17, block_n=64, on=132) == 33
    assert launch_decode.splits(programs=264, reach=1 << 17, block_n=64, on=132) == 1
    assert launch_decode.splits(programs=1000, reach=1 << 17, block_n=64, on=132) == 1
    assert launch_decode.splits(programs=8, reach=512, block_n=64, on=132) == 2
    assert launch_decode.splits(programs=8, reach=100, block_n=64, on=132) == 1


def test_a_window_bounds_the_parts() -> None:
    (case,) = (case for case in GRID if case.id == "pages of 16")
    sample = make_cache_sample(case)
    assert launch_decode._reach(sample.inputs, sample.spec) == 2 + 70
    assert launch_decode._reach(sample.inputs, dataclasses.replace(sample.spec, left=None)) == sample.inputs.capacity


@triton.jit
def e4m3_kernel(byte, meaning, x, rounded):
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(meaning + at, from_e4m3(tl.load(byte + at)))
    tl.store(rounded + at, to_e4m3(tl.load(x + at)))


def test_e4m3_is_that_of_torch() -> None:
    """Every byte; as numbers to round every e4m3 number, what lies half-way between two, and what is next to that."""
    byte = torch.arange(256, dtype=torch.uint8)
    numbers = byte.view(FP8).float()
    finite = numbers[numbers.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, far)) for far in (-1e9, 1e9)]
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-30, -1e-30, 460.0, 1e30])
    x = torch.cat([numbers, middles, *beside, odd])
    x = torch.cat([x, torch.zeros(-len(x) % 256)])
    repeated = byte.repeat(len(x) // 256)
    meaning, rounded = torch.empty(len(x)), torch.empty(len(x), dtype=torch.uint8)
    e4m3_kernel[(len(x) // 256,)](repeated, meaning, x, rounded)
    torch.testing.assert_close(meaning, repeated.view(FP8).float(), rtol=0, atol=0, equal_nan=True)
    expected = x.clamp(-448, 448).to(FP8)
    is_number = ~x.isnan()
    assert torch.equal(rounded[is_number], expected.view(torch.uint8)[is_number])
    assert bool(rounded[~is_number].view(FP8).float().isnan().all())


def test_it_says_what_it_can() -> None:
    q, cache, lengths = torch.randn(1, 1, 2, 64), torch.randn(1, 8, 2, 64), torch.ones(1, dtype=torch.int32)
    found = explain_with_kv_cache(q, cache, cache, lengths)
    assert found.reasons["triton"] == [] and found.passed_over["triton"], "it is never chosen unasked without evidence"
    wide = [x.repeat(1, 1, 1, 9) for x in (q, cache)]
    (reason,) = explain_with_kv_cache(wide[0], wide[1], wide[1], lengths).reasons["triton"]
    assert reason == "head dim 576/576 (at most 512)"


def test_a_sequence_has_the_same_bits_whatever_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch-invariant calls: alone, in other orders and pages, in chunks, with a window, and beside a longer cache."""
    monkeypatch.setattr(launch_decode, "FIXED_KEYS", 64)
    draw = torch.Generator().manual_seed(0)
    lengths = (150, 20, 97)
    stores = [torch.randn(2, length, 2, 16, generator=draw) for length in lengths]
    queries = [torch.randn(3, 4, 16, generator=draw) for _ in lengths]
    spec = AttentionSpec(0.25, left=90, right=0)

    def run(
        order: tuple[int, ...], page_size: int, more_pages: int = 0, rows: slice = slice(0, 3)
    ) -> list[torch.Tensor]:
        each = [-(-lengths[n] // page_size) for n in order]
        pages = torch.randperm(sum(each), generator=draw)
        table = torch.full((len(order), max(each) + more_pages), -1, dtype=torch.int32)
        caches = torch.full((2, sum(each), page_size, 2, 16), torch.nan)
        begin = 0
        for row, n, count in zip(table, order, each, strict=True):
            row[:count] = pages[begin : begin + count]
            begin += count
            room = torch.full((2, count * page_size, 2, 16), torch.nan)
            room[:, : lengths[n]] = stores[n]
            caches[:, row[:count].long()] = room.unflatten(1, (count, page_size))
        q = torch.stack([queries[n][rows] for n in order])
        have = torch.tensor([lengths[n] - 3 + rows.stop for n in order], dtype=torch.int32)
        inputs = CacheInputs(
            q, caches[0], caches[1], have, block_table=table, max_seqlen_q=q.shape[1], batch_invariant=True
        )
        out, lse = load("triton").attend_to_cache(inputs, spec)
        return [torch.cat([out[row], lse[row].T[..., None]], -1) for row in range(len(order))]

    alone = [run((n,), 256)[0] for n in range(3)]
    for order, options in (((2, 0, 1), {"page_size": 16}), ((0, 2), {"page_size": 8, "more_pages": 40})):
        for n, found in zip(order, run(order, **options), strict=True):
            assert torch.equal(found, alone[n])
    chunks = [run((0,), 32, rows=slice(a, b))[0] for a, b in ((0, 1), (1, 3))]
    assert torch.equal(torch.cat(chunks), alone[0])
