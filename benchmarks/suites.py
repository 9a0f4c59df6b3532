"""The named suites, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastattn.measure.workload import Workload


@dataclass(frozen=True)
class Suite:
    """Cases under a name.

    Attributes:
        wall: time launches and device work together by the wall clock, for problems bound by launches.
    """

    name: str
    about: str
    cases: tuple[Workload, ...]
    wall: bool = False

    def quick(self) -> Suite:
        """The same suite on problems 16 times shorter (at least 64 tokens), to see that everything works."""
        cases = {case.id: case for case in map(_shorter, self.cases)}
        return dataclasses.replace(self, cases=tuple(cases.values()))


def _shorter(case: Workload) -> Workload:
    if case.spread is not None:
        return case

    def less(n: int) -> int:
        return n if n < 64 else max(64, n // 16)

    grid = case.grid and (case.grid[0] // 4, case.grid[1] // 4, max(1, case.grid[2] // 4))
    window = case.window and (less(case.window[0]), less(case.window[1]))
    return dataclasses.replace(
        case,
        batch=min(case.batch, 2),
        s_q=less(case.s_q),
        s_kv=less(case.s_kv),
        heads_q=min(case.heads_q, 8),
        heads_kv=min(case.heads_kv, 8),
        window=window,
        grid=grid,
    )


def _case(s: int, heads: int, d: int, heads_kv: int = 0, **rest: Any) -> Workload:
    """Self-attention over ``s`` tokens."""
    return Workload(s_q=s, s_kv=s, heads_q=heads, heads_kv=heads_kv or heads, d_qk=d, d_v=rest.pop("d_v", d), **rest)


def _paper() -> Iterator[Workload]:
    """The grid of the FlashAttention papers: width 2048, and 16k tokens in total at every length."""
    for d in (128, 64, 256):
        for causal in (True, False):
            for s in (512, 1024, 2048, 4096, 8192, 16384, 32768):
                yield _case(s, 2048 // d, d, batch=max(1, 16384 // s), causal=causal)


def _llm() -> Iterator[Workload]:
    yield _case(8192, 32, 128, 8, causal=True, label="Llama-3-8B")
    yield _case(8192, 64, 128, 8, causal=True, label="Llama-3-70B")
    yield _case(8192, 32, 128, 4, causal=True, label="Qwen3-30B-A3B")
    yield _case(8192, 16, 256, 8, causal=True, softcap=50.0, label="Gemma-2-9B")
    yield _case(8192, 16, 256, 8, causal=True, softcap=50.0, window=(4095, 0), label="Gemma-2-9B")
    yield _case(8192, 64, 64, 8, causal=True, sinks=True, label="GPT-OSS-20B")
    yield _case(8192, 64, 64, 8, causal=True, sinks=True, window=(127, 0), label="GPT-OSS-20B")
    yield _case(4096, 128, 192, d_v=128, causal=True, label="DeepSeek-V3")
    decode = Workload(s_q=1, s_kv=8192, heads_q=32, heads_kv=8, d_qk=128, d_v=128, batch=16)
    yield dataclasses.replace(decode, causal=True, passes=("forward",), label="Llama-3-8B decode")


def _features() -> Iterator[Workload]:
    """One feature at a time on one shape; the first case has none."""
    shape = {"batch": 4, "causal": True}
    yield _case(4096, 16, 128, **shape)
    yield _case(4096, 16, 128, window=(255, 0), **shape)
    yield _case(4096, 16, 128, softcap=50.0, **shape)
    yield _case(4096, 16, 128, alibi=True, **shape)
    yield _case(4096, 16, 128, sinks=True, **shape)
    yield _case(4096, 16, 128, bias=True, **shape)
    yield _case(4096, 16, 128, documents=8, **shape)
    yield _case(16384, 16, 128, documents=8, packed=True, causal=True)
    yield _case(4096, 16, 128, 4, **shape)
    yield _case(4096, 16, 128, dropout_p=0.1, **shape)


def _small() -> Iterator[Workload]:
    for s in (64, 256, 1024):
        for batch in (1, 8):
            yield _case(s, 8, 64, batch=batch, causal=True, passes=("forward", "both"))
    yield Workload(s_q=1, s_kv=512, heads_q=8, heads_kv=8, d_qk=64, d_v=64, causal=True, passes=("forward",))


def _cpu() -> Iterator[Workload]:
    passes = ("forward", "both")
    shapes = ((128, 12, 8), (512, 8, 1), (1024, 8, 1), (2048, 4, 1), (4096, 2, 1))  # tokens, heads, batch
    for s, heads, batch in shapes:
        for dtype in ("fp32", "bf16"):
            for d in (64,) if s == 128 else (64, 128):
                for causal in (False, True):
                    memory = s in (1024, 4096) and d == 64 and dtype == "fp32" and not causal
                    yield _case(s, heads, d, batch=batch, dtype=dtype, causal=causal, passes=passes, memory=memory)
    for dtype in ("fp32", "bf16"):
        one: dict[str, Any] = {"dtype": dtype, "passes": passes}
        yield _case(1024, 1, 64, **one)
        yield _case(1024, 1, 64, causal=True, **one)
        yield _case(4096, 1, 64, **one)
        yield _case(4096, 2, 64, causal=True, window=(255, 0), **one)
        yield _case(4096, 2, 64, causal=True, documents=8, **one)
        yield _case(4096, 2, 64, documents=8, **one)
        yield _case(4096, 2, 64, documents=8, intervals=True, **one)
        yield _case(4096, 2, 64, grid=(64, 64, 13), **one)
        yield _case(4096, 2, 64, mask=True, **one)
        yield _case(4096, 2, 64, mask=True, scattered=True, **one)
        yield _case(4096, 2, 64, bias=True, bias_grad=False, **one)
        yield _case(4096, 2, 64, bias=True, **one)
        yield _case(4096, 2, 64, softcap=30.0, **one)
        yield _case(4096, 2, 64, dropout_p=0.1, **one)
        yield _case(746, 8, 64, documents=64, packed=True, spread=(5, 19), **one)
    yield _case(16384, 8, 64, dtype="fp32", passes=(), memory=True)


def _first() -> Iterator[Workload]:
    """One small case for each kind of kernel, to run before long suites."""
    for d in (64, 128, 256):
        yield _case(512, 4, d, causal=True)
    yield _case(512, 4, 128)
    yield _case(512, 4, 128, dtype="fp16", causal=True)
    yield _case(512, 4, 128, 2, causal=True, window=(63, 0), softcap=30.0, sinks=True)
    yield _case(512, 4, 64, documents=8, packed=True, causal=True)
    yield _case(256, 4, 64, bias=True)
    yield Workload(s_q=1, s_kv=512, heads_q=8, heads_kv=2, d_qk=128, d_v=128, causal=True, passes=("forward",))


def _telling() -> Iterator[Workload]:
    """The most common call, which a first run on a GPU measures first."""
    yield _case(4096, 16, 128, batch=4, causal=True, passes=("forward", "both"))


def _cells() -> Iterator[Workload]:
    """Representative cells of the grid of the papers."""
    return (w for w in _paper() if w.d_qk in (64, 128) and w.s_q in (2048, 8192, 16384))


SUITES = {
    suite.name: suite
    for suite in (
        Suite("paper", "width 2048, 16k tokens, D 64/128/256, the grid of the FlashAttention papers", tuple(_paper())),
        Suite("llm", "shapes of language models: GQA, softcap, sinks, windows, two head dims", tuple(_llm())),
        Suite("features", "the cost of each feature on one shape", tuple(_features())),
        Suite("small", "problems bound by launches, by the wall clock", tuple(_small()), wall=True),
        Suite("telling", "causal, D 128, 4k tokens: the most common call", tuple(_telling())),
        Suite("cells", "six cells of the papers' grid, causal and not", tuple(_cells())),
        Suite("first", "one small case for each kind of kernel", tuple(_first())),
        Suite("cpu", "2 threads: dense, causal, each feature, packed documents, few heads, memory", tuple(_cpu())),
    )
}
