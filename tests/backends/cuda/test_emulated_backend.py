"""The whole cuda backend on CPU tensors: its own Python, structs, tensor maps and kernels, on the emulated machine.

Results are judged by the tolerance rule, also with the other pass on another backend.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator

import emulate
import pytest
import torch

from fastattn.backends import cuda, load
from fastattn.backends.cuda import backward, decode, library
from fastattn.kv_cache import CacheInputs, facts_of
from fastattn.problem import Problem
from fastattn.spec import AttentionSpec
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache
from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import Sample, make
from fastattn.testing.tolerance import assert_within, measure, run

MAX_HEAD_DIM = 64  # of the emulated library: its lines are those for 64
# Every feature, and what only Python decides: strides, padding, scales, empty sides.
CASES = [
    case
    for case in grid([torch.bfloat16])
    if case.intervals is None and max(case.D_qk, case.D_v) <= MAX_HEAD_DIM and not case.D_qk % 8
]
MORE = [
    Case("negative scale", scale=-0.3, dtype=torch.float16, right=0),
    Case("zero scale", scale=0.0, dtype=torch.bfloat16),
    Case("no key, sinks", S_q=9, S_kv=0, sinks=True, dlse=True, dtype=torch.float16),
    Case("no query", S_q=0, S_kv=9, dtype=torch.float16),
    Case("unused keys", S_q=20, S_kv=90, left=6, right=3, anchor="upper_left", nan_rows=True, dtype=torch.bfloat16),
    Case("sinks per sequence", sinks=True, per_sequence=True, H_q=4, H_kv=2, dtype=torch.bfloat16, dlse=True),
    Case("only dq", needs=("q",), dtype=torch.bfloat16),
    Case("only dv", needs=("v",), dtype=torch.bfloat16, right=0),
    Case("strided", memory="strided", dtype=torch.float16, right=0),
    Case(
        "every term",
        S_q=70,
        S_kv=150,
        segments=3,
        alibi=True,
        mask="padding",
        bias=(1, 4, 1, 150),
        softcap=9.0,
        right=0,
        dropout_p=0.3,
        nan_rows=True,
        dlse=True,
        sinks=True,
        H_q=4,
        H_kv=2,
        dtype=torch.bfloat16,
    ),
    Case(
        "window, mask, infinite bias",
        S_q=130,
        S_kv=200,
        left=40,
        right=10,
        mask="random",
        bias=(2, 1, 130, 1),
        bias_values="infinity",
        nan_rows=True,
        D_v=40,
        dtype=torch.float16,
    ),
    Case(
        "packed, alibi, dropout",
        lengths=((70, 70), (0, 9), (33, 80)),
        alibi=True,
        per_sequence=True,
        dropout_p=0.2,
        right=0,
        H_q=4,
        H_kv=2,
        dtype=torch.bfloat16,
    ),
    Case("several tiles", B=1, S_q=200, S_kv=330, D_qk=64, D_v=64, H_q=2, H_kv=1, right=0, dtype=torch.bfloat16),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulator")


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    """The backend's kernels come from a library on the emulated machine."""
    kernels = library.Library(emulate.kept_library(MAX_HEAD_DIM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_delivered", lambda: (kernels, "emulated"))
        patch.setattr(cuda, "_sees_gpu", lambda: True)
        yield


def served(case: Case) -> Sample:
    sample = make(case)
    facts = Problem.of(sample.inputs, sample.spec, needs_grad=True)
    reasons = [reason for reason in cuda.BACKEND.unsupported_reasons(facts) if not reason.startswith("device cpu")]
    if reasons:
        pytest.skip("; ".join(reasons))
    return sample


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.id)
def test_forward_and_backward(case: Case) -> None:
    assert_within(measure(cuda.BACKEND, served(case)))


@pytest.mark.parametrize("case", CASES[3:], ids=lambda case: case.id)
def test_without_atomics(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = served(case)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert_within(measure("eager", sample, cuda.BACKEND))


@pytest.mark.parametrize("has_atomics", [True, False])
def test_query_heads_apart(has_atomics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where multiprocessors would be idle, every query head has blocks of its own for dk and dv."""
    sample = served(Case("apart", B=2, S_q=400, S_kv=300, D_qk=64, D_v=40, H_q=4, H_kv=1, right=0, dtype=torch.float16))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: not has_atomics)
    assert backward.own_tensors(sample.inputs, sample.spec, ("q", "k", "v"), 132)["dk_parts"] is not None
    assert_within(measure(cuda.BACKEND, sample))


def test_same_bits_every_time_without_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = served(Case("bits", B=1, S_q=130, S_kv=130, dtype=torch.float16, right=0, sinks=True))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    first, second = (run(load("eager"), sample, cuda.BACKEND) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("others", ["portable", "eager"])
@pytest.mark.parametrize("direction", ["forward here", "backward here"])
def test_the_other_pass_elsewhere(direction: str, others: str) -> None:
    for changes in ({"right": 0, "S_q": 70, "sinks": True}, {"softcap": 5.0, "left": 9, "dlse": True, "H_q": 4}):
        sample = served(Case("cross", dtype=torch.bfloat16, **changes))
        forward, backward = (cuda.BACKEND, others) if direction == "forward here" else (others, cuda.BACKEND)
        assert_within(measure(forward, sample, backward))


# --- attention to a cache -----------------------------------------------------------------------------------------


def cache_cases() -> list[tuple[CacheCase, int]]:
    """What the kernels take of the grid with a q of 16 bits, with one split or several; and longer caches."""
    cases = [
        case
        for case in cache_grid((torch.float32,))
        if not (case.alibi or case.bias or any(size % (16 if case.fp8 else 8) for size in (case.D_qk, case.D_v)))
    ]
    long = CacheCase("long", before=(700, 0, 400), s_q=(2, 2, 2), sinks=True, D_qk=64, D_v=64)
    changes = (
        {"page_size": 1, "softcap": 3.0},
        {"page_size": 24, "softcap": 3.0},
        {"left": 300},
        {"packed": True, "s_q": (1, 7, 0)},
        {"page_size": 16, "fp8": "page", "new": 0},
        {"page_size": 2, "tree": "each", "s_q": (40, 40, 40), "left": 300},
    )
    cases += [dataclasses.replace(long, id=f"long, {change}", **change) for change in changes]
    wide = {"H_q": 140, "H_kv": 2, "D_qk": 64, "D_v": 40, "page_size": 16}
    cases.append(CacheCase("more heads in a group than rows in a tile", **wide))
    return [
        (dataclasses.replace(case, dtype=(torch.bfloat16, torch.float16)[i % 2]), 1 if i // 2 % 2 else 2 + i % 7)
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("case", "splits"), cache_cases(), ids=lambda x: getattr(x, "id", f"{x} splits"))
def test_attention_to_a_cache(case: CacheCase, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_cache_sample(case)
    problem = dataclasses.replace(facts_of(sample.inputs, sample.spec), device="cuda", arch=90)
    assert not cuda.BACKEND.unsupported_reasons(problem)
    monkeypatch.setattr(decode, "split_count", lambda *sizes: splits)
    assert_within(measure_cache(cuda.BACKEND, sample))


def test_a_sequence_has_the_same_bits_whatever_stands_beside_it() -> None:
    """Batch-invariant calls: alone and in other orders and pages, beside a longer cache."""
    draw = torch.Generator().manual_seed(0)
    lengths = (150, 700, 40)
    stores = [torch.randn(2, n, 2, 64, generator=draw).bfloat16() for n in lengths]
    queries = [torch.randn(2, 4, 64, generator=draw).bfloat16() for _ in lengths]

    def run(order: tuple[int, ...], page_size: int) -> list[torch.Tensor]:
        each = [-(-lengths[n] // page_size) for n in order]
        pages, begin = torch.randperm(sum(each), generator=draw), 0
        table = torch.full((len(order), max(each)), -1, dtype=torch.int32)
        caches = torch.full((2, sum(each), page_size, 2, 64), torch.nan, dtype=torch.bfloat16)
        for row, n, count in zip(table, order, each, strict=True):
            row[:count] = pages[begin : begin + count]
            begin += count
            room = torch.full((2, count * page_size, 2, 64), torch.nan, dtype=torch.bfloat16)
            room[:, : lengths[n]] = stores[n]
            caches[:, row[:count].long()] = room.unflatten(1, (count, page_size))
        have = torch.tensor([lengths[n] for n in order], dtype=torch.int32)
        q = torch.stack([queries[n] for n in order])
        inputs = CacheInputs(q, *caches, have, block_table=table, max_seqlen_q=2, batch_invariant=True)
        out, lse = cuda.BACKEND.attend_to_cache(inputs, AttentionSpec(0.125, right=0))
        return [torch.cat([out[row].float(), lse[row].T[..., None]], -1) for row in range(len(order))]

    alone = [run((n,), 16)[0] for n in range(3)]
    for order, page_size in (((2, 1, 0), 64), ((1, 0), 8)):
        for n, found in zip(order, run(order, page_size), strict=True):
            assert torch.equal(found, alone[n])
