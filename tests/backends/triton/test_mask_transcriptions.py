"""The Triton transcription of keep, tile_range and full_range, enumerated against spec.py on small and huge lengths."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastattn import spec as definition  # noqa: E402
from fastattn.backends.triton.arguments import UNBOUNDED, Flags, Sizes, coded  # noqa: E402
from fastattn.backends.triton.tile import full_range, keep, open_band, tile_range, transposed  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402

SIZE = 8  # lengths 0 .. 7 and positions 0 .. 7: every combination of four
BANDS = [
    AttentionSpec(1.0, left=left, right=right, anchor=anchor)
    for left, right, anchor in itertools.product((None, 0, 1, 3), (None, 0, 2), definition.ANCHORS)
]


@triton.jit
def transcriptions(
    kept, ranges, s_q0, s_kv0, left, right, lower_right, first, F: tl.constexpr, TRANSPOSED: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Of lengths from ``s_q0`` and ``s_kv0`` on, LENGTHS each: keep at 8 x 8 positions, ranges between these."""
    a, b = tl.arange(0, LENGTHS)[:, None, None, None], tl.arange(0, LENGTHS)[None, :, None, None]
    x, y = tl.arange(0, 8)[None, None, :, None], tl.arange(0, 8)[None, None, None, :]
    sizes = Sizes(2 * (s_q0 + a) + 3, 2 * (s_kv0 + b) + 3, 5, 5, left, right, lower_right, 3, 1.0, 1.0, 1.0)
    _begin_q, _begin_kv, band = open_band(s_q0 + a, None, sizes, F)
    LEFT: tl.constexpr = F.right if TRANSPOSED else F.left
    RIGHT: tl.constexpr = F.left if TRANSPOSED else F.right
    if TRANSPOSED:
        band = transposed(band)
    at = (a * LENGTHS + b) * 64 + x * 8 + y
    i, j = first + x, first + y
    tl.store(kept + at, keep(i, j, band, LEFT, RIGHT).to(tl.int8))
    begin, end = tile_range(i, j, band, LEFT, RIGHT)
    full_begin, full_end = full_range(i, j, band, LEFT, RIGHT)
    tl.store(ranges + at * 4, begin)
    tl.store(ranges + at * 4 + 1, end)
    tl.store(ranges + at * 4 + 2, full_begin)
    tl.store(ranges + at * 4 + 3, full_end)


def transcribed(
    spec: AttentionSpec, s_q: int, s_kv: int, lengths: int, first: int, is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.empty(lengths, lengths, 8, 8, dtype=torch.int8)
    ranges = torch.empty(lengths, lengths, 8, 8, 4, dtype=torch.int32)
    left, right = (coded(UNBOUNDED if side is None else side) for side in (spec.left, spec.right))
    lower_right = coded(int(spec.anchor == "lower_right"))
    flags = Flags(16, 16, 16, 16, left=spec.left is not None, right=spec.right is not None)
    transcriptions[(1,)](
        kept, ranges, s_q, s_kv, left, right, lower_right, first, F=flags, TRANSPOSED=is_transposed, LENGTHS=lengths
    )
    return kept, ranges


def seen_from_keys(spec: AttentionSpec, is_transposed: bool) -> AttentionSpec:
    return spec.transposed() if is_transposed else spec


@pytest.fixture(autouse=True)
def _overflow_is_an_error(overflow_is_an_error: None) -> None: ...


@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by keys"])
def test_every_small_problem(is_transposed: bool) -> None:
    for spec in BANDS:
        kept, ranges = transcribed(spec, 0, 0, SIZE, 0, is_transposed)
        meaning = seen_from_keys(spec, is_transposed)
        for a, b in itertools.product(range(SIZE), repeat=2):
            s_rows, s_columns = (b, a) if is_transposed else (a, b)
            for x, y in itertools.product(range(8), repeat=2):
                where = (spec, a, b, x, y)
                assert bool(kept[a, b, x, y]) == bool(definition.keep(meaning, x, y, s_rows, s_columns)), where
                if x < y <= s_rows:
                    expected = (
                        *definition.tile_range(meaning, x, y, s_rows, s_columns),
                        *definition.full_range(meaning, x, y, s_rows, s_columns),
                    )
                    assert tuple(ranges[a, b, x, y].tolist()) == expected, where


@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by keys"])
@pytest.mark.parametrize("spec", [*BANDS[:8], AttentionSpec(1.0, left=UNBOUNDED, right=UNBOUNDED)], ids=str)
def test_the_longest_sequences_do_not_overflow(spec: AttentionSpec, is_transposed: bool) -> None:
    longest = UNBOUNDED - 1
    for first in (0, longest - 8):
        kept, ranges = transcribed(spec, longest, longest, 1, first, is_transposed)
        meaning = seen_from_keys(spec, is_transposed)
        for x, y in itertools.product(range(8), repeat=2):
            i, j = first + x, first + y
            assert bool(kept[0, 0, x, y]) == bool(definition.keep(meaning, i, j, longest, longest))
            if i < j:
                expected = (
                    *definition.tile_range(meaning, i, j, longest, longest),
                    *definition.full_range(meaning, i, j, longest, longest),
                )
                assert tuple(ranges[0, 0, x, y].tolist()) == expected


def test_a_wrong_transcription_is_found() -> None:
    """The enumeration can fail: with the band off by one it does."""
    right = AttentionSpec(1.0, left=None, right=0)
    kept, _ = transcribed(AttentionSpec(1.0, left=None, right=1), 0, 0, SIZE, 0, False)
    a, b, x, y = torch.meshgrid(*(torch.arange(n) for n in kept.shape), indexing="ij")
    assert not torch.equal(kept.bool(), definition.keep(right, x, y, a, b))
