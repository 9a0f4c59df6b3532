"""Random problems of attention to a cache: pages, e4m3, rotary positions, ragged batches and trees of new tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch

from fastattn.testing.caches import CacheCase

_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
_BEFORE = (0, 1, 3, 7, 8, 13, 30, 40, 70)
_ROWS, _IN_PACKS = (1, 1, 1, 2, 3, 5, 9, 17, 40), (0, 1, 1, 2, 4, 9, 21)
_HEAD_DIMS = (2, 8, 16, 24, 32, 40, 64, 128)
# Fields that are reset to their defaults one by one before the sizes are reduced.
_FEATURES = (
    "dtype", "fp8", "scale", "softcap", "left", "right", "bias", "alibi", "sinks", "per_sequence", "rotary", "strided",
    "tree", "page_size", "batch_invariant",
)  # fmt: skip


def random_cache_case(draw: random.Random) -> CacheCase:
    """A random problem with few features at once."""

    def sometimes(value: Any, otherwise: Any = None, chance: float = 0.25) -> Any:
        return value if draw.random() < chance else otherwise

    count, heads_kv, d_qk = draw.choice((1, 1, 2, 3, 5)), draw.choice((1, 1, 2, 3)), draw.choice(_HEAD_DIMS)
    packed, tree = draw.random() < 0.3, sometimes(draw.choice(("shared", "each")), chance=0.3)
    s_q = tuple(draw.choice(_IN_PACKS) for _ in range(count)) if packed else (draw.choice(_ROWS),) * count
    return CacheCase(
        id="fuzz",
        before=tuple(draw.choice(_BEFORE) for _ in s_q),
        s_q=s_q if any(s_q) else (1,) * count,
        new="queries" if tree else sometimes(0 if packed else draw.randrange(4), "queries"),
        packed=packed,
        page_size=draw.choice((None, 1, 8, 16, 64)),
        dtype=draw.choice(_DTYPES),
        fp8=sometimes(draw.choice(("head", "page"))),
        H_q=heads_kv * draw.choice((1, 1, 2, 3)),
        H_kv=heads_kv,
        D_qk=d_qk,
        D_v=sometimes(draw.choice(_HEAD_DIMS), d_qk),
        scale=sometimes(draw.uniform(-1, 1), chance=0.1),
        softcap=sometimes(draw.uniform(0.5, 30), chance=0.2),
        left=sometimes(draw.randrange(70)),
        right=0 if tree else draw.choice((0, 0, 0, None, draw.randrange(9))),
        bias=not packed and draw.random() < 0.25,
        alibi=draw.random() < 0.25,
        sinks=draw.random() < 0.25,
        per_sequence=draw.random() < 0.5,
        rotary=sometimes(draw.choice(("halves", "interleaved"))),
        strided=draw.random() < 0.25,
        tree="each" if tree and packed else tree,
    )


def simpler_cache_cases(case: CacheCase) -> Iterator[CacheCase]:
    """Cases that are one step simpler: a feature turned off, a sequence left out, or a size reduced."""
    plain = CacheCase(id="fuzz")
    for name in _FEATURES:
        if getattr(case, name) != getattr(plain, name):
            yield dataclasses.replace(case, **{name: getattr(plain, name)})
    for n in range(len(case.s_q) if len(case.s_q) > 1 else 0):
        before, s_q = (x[:n] + x[n + 1 :] for x in (case.before, case.s_q))
        if any(s_q):
            yield dataclasses.replace(case, before=before, s_q=s_q)
    for have in {0, *(n // 2 for n in case.before)} if any(case.before) else ():
        yield dataclasses.replace(case, before=tuple(min(n, have) for n in case.before))
    most = max(case.s_q)
    if most > 1:
        yield dataclasses.replace(case, s_q=tuple(min(n, most // 2) for n in case.s_q))
    for heads in {(1, 1), (case.H_kv, case.H_kv)} - {(case.H_q, case.H_kv)}:
        yield dataclasses.replace(case, H_q=heads[0], H_kv=heads[1])
    for name in ("D_qk", "D_v"):
        if getattr(case, name) > 2:
            yield dataclasses.replace(case, **{name: getattr(case, name) // 2})
