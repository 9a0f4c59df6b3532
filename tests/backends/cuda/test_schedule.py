"""The kernels' own schedulers (csrc/sm90/schedule.h, backward.h): every tile once, and no block with much more work."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from fastattn.backends.cuda.backward import ends_earlier_with_parts
from fastattn.backends.cuda.tools.makespan import Shape, Share, Work, shares
from fastattn.spec import AttentionSpec

# (length, heads, batch): the causal shapes of a language model
CAUSAL = [
    (1024, 16, 16), (2048, 16, 8), (4096, 16, 4), (8192, 16, 2), (16384, 16, 1), (4096, 32, 1), (8192, 32, 1),
    (16384, 32, 1), (2048, 32, 4),
]  # fmt: skip
ODD = [(2048, 24, 3), (4096, 12, 2), (1536, 20, 6)]
TILES = {
    (64, 64): (192, 128),
    (96, 96): (128, 128),
    (128, 128): (128, 128),
    (192, 128): (128, 128),
    (256, 256): (128, 80),
}
# Lengths of packed sequences: equal, spread, many short ones, a long one at either end.
RAGGED = {
    "equal": [2048] * 8,
    "long": [4096] * 8,
    "spread": [100 + 3900 * (7 * n % 16) // 15 for n in range(16)],
    "short": [10 + 990 * (29 * n % 64) // 63 for n in range(64)],
    "very short": [1 + 511 * (93 * n % 256) // 255 for n in range(256)],
    "one long": [200] * 20 + [8192] + [300] * 10,
    "long last": [200] * 30 + [8192],
    "long first": [8192] + [200] * 30,
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the schedulers")


def causal(s: int, heads: int, batch: int, d_qk: int, d_v: int) -> Work:
    return Work("forward", Shape(batch, s, s, heads, heads, d_qk, d_v, right=0), *TILES[d_qk, d_v])


def packed(lengths: list[int], right: int | None) -> Work:
    pairs = tuple((n, n) for n in lengths)
    return Work(
        "forward", Shape(len(pairs), sum(lengths), sum(lengths), 16, 16, 128, 128, None, right, False, pairs), 128, 128
    )


def all_right(works: list[Work]) -> list[Share]:
    """Their shares, after a look whether every tile is taken once."""
    found = shares(works)
    for work, share in zip(works, found, strict=True):
        size = work.keys if work.kernel == "dkdv" else work.rows
        heads = work.shape.heads_kv if work.kernel == "dkdv" and not work.parts else work.shape.heads_q
        rows = [pair[work.kernel == "dkdv"] for pair in work.shape.pairs]
        assert (share.tiles, share.most_taken) == (heads * sum(-(-n // size) for n in rows), 1), work
    return found


def test_causal_work_is_balanced() -> None:
    """At head dim 128 in the shapes of language models, nearly as well elsewhere, where a pass may have few tiles."""
    works = {causal(*sizes, *dims): 1.03 if dims == (128, 128) else 1.04 for dims in TILES for sizes in CAUSAL}
    works |= {causal(*sizes, *dims): 1.04 for dims in TILES for sizes in ODD}
    for (work, limit), share in zip(works.items(), all_right(list(works)), strict=True):
        assert share.makespan <= limit * share.ideal, (work, share)


def test_packed_work_is_balanced() -> None:
    works = [packed(lengths, 0) for lengths in RAGGED.values()]
    works += [packed(RAGGED[name], None) for name in ("spread", "short", "very short")]
    for work, share in zip(works, all_right(works), strict=True):
        assert share.makespan <= 1.03 * share.ideal, (work, share)


def test_every_tile_is_taken_once() -> None:
    """By as many blocks as there may be, of few tiles or many, with the last pass narrower than the others."""
    bands = [(None, None), (None, 0), (100, 0), (200, 30), (None, 7)]
    sizes = [(1, 1, 1, 1), (300, 300, 5, 3), (700, 200, 7, 1), (200, 700, 3, 2), (16384, 16384, 3, 1)]
    works = [
        Work(kernel, Shape(batch, s_q, s_kv, heads, heads, 128, 128, *band), 128, 128, blocks)
        for band in bands for s_q, s_kv, heads, batch in sizes for blocks in (1, 2, 3, 7, 131, 132, 400)
        for kernel in ("forward", "dkdv", "dq")
    ]  # fmt: skip
    all_right(works)
    all_right([dataclasses.replace(packed(lengths, 0), blocks=3) for lengths in ([0, 5, 0, 700], [1], [130, 0])])
    (even,) = all_right([Work("forward", Shape(1, 1280, 1280, 66, 66, 128, 128), 128, 128)])
    assert even.makespan == even.mean, "tiles of one length are shared out evenly"


def test_backward_work_is_balanced_where_key_heads_are_few() -> None:
    """By blocks that work on one query head each, where the choice by makespan asks for them."""
    causal = AttentionSpec(1.0, right=0)
    assert ends_earlier_with_parts(causal, (2048, 2048, 8, 4), 64, 128, 132)
    assert not ends_earlier_with_parts(causal, (16384, 16384, 8, 4), 64, 128, 132), "there are blocks enough"
    assert not ends_earlier_with_parts(AttentionSpec(1.0), (2048, 2048, 8, 4), 64, 128, 132), "one round in any case"
    shape = Shape(1, 2048, 2048, 32, 8, 128, 128, right=0)
    together, apart = all_right([Work("dkdv", shape, 64, 128, parts=parts) for parts in (False, True)])
    assert apart.imbalance <= 1.1 and together.imbalance > 1.5
