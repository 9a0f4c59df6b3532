"""The problems of the self-check: small ones with the most common head dims and features, and one with everything."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastattn.testing.caches import CacheCase, cache_grid
from fastattn.testing.cases import Case, grid

_GROUPED: dict[str, Any] = {"B": 1, "S_q": 140, "S_kv": 140, "H_q": 2, "H_kv": 1}
_D128: dict[str, Any] = {"D_qk": 128, "D_v": 128}
_D64: dict[str, Any] = {"D_qk": 64, "D_v": 64}
_DECODE: dict[str, Any] = {"page_size": 16, "before": (40, 200), "H_q": 8, "H_kv": 2}
_EVERYTHING = next(case for case in grid((torch.bfloat16,)) if case.id.startswith("everything ["))
_EVERY_CACHE = next(case for case in cache_grid((torch.bfloat16,)) if case.id.startswith("e4m3, ragged [pages"))
CASES = (
    Case("causal, D 128", right=0, **_GROUPED, **_D128),
    Case("causal, D 64", right=0, **_GROUPED, **_D64),
    Case("packed, D 128", right=0, **_GROUPED, **_D128, lengths=((70, 70), (1, 1), (9, 20))),
    dataclasses.replace(_EVERYTHING, id="everything, D 64", **_D64),
)
DERIVED = CASES[1]  # of which derivatives and statistics are checked, too
CACHE_CASES = (
    CacheCase("one token, D 128", s_q=(1, 1), **_DECODE, **_D128),
    CacheCase("some tokens, D 64", s_q=(9, 9), **_DECODE, **_D64),
    dataclasses.replace(_EVERY_CACHE, id="everything, e4m3, D 64", **_D64),
)
