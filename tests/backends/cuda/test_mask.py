"""csrc/common/mask.h, the C++ transcription of keep, tile_range and full_range, enumerated against the spec."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn.spec import ANCHORS, AttentionSpec, full_range, keep, tile_range

CSRC = Path(__file__).parents[3] / "csrc"
SIDES = (None, 0, 1, 3, 100)
LENGTHS = (0, 1, 2, 5)

SOURCE = """
#include "common/params.h"
#include "common/mask.h"

using namespace fa;
static Band band;
extern "C" {
void set_band(int left, int right, int lower_right, int s_q, int s_kv) {
  band = make_band(left < 0 ? kUnbounded : left, right < 0 ? kUnbounded : right, lower_right, s_q, s_kv);
}
int kept(int i, int j) { return keep(band, i, j); }
void transpose() { band = transposed(band); }
void tile(int i0, int i1, int* range) { Range r = tile_range(band, i0, i1); range[0] = r.begin; range[1] = r.end; }
void full(int i0, int i1, int* range) { Range r = full_range(band, i0, i1); range[0] = r.begin; range[1] = r.end; }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile csrc/common/mask.h")


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("mask")
    (folder / "mask.cpp").write_text(SOURCE)
    library = folder / "mask.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", "-o", library, folder / "mask.cpp"], check=True
    )
    return ctypes.CDLL(str(library))


def set_band(mask: ctypes.CDLL, spec: AttentionSpec, s_q: int, s_kv: int) -> None:
    left, right = (-1 if side is None else side for side in (spec.left, spec.right))
    mask.set_band(left, right, spec.anchor == "lower_right", s_q, s_kv)


def range_of(function: ctypes._NamedFuncPointer, i0: int, i1: int) -> tuple[int, int]:
    ends = (ctypes.c_int * 2)()
    function(i0, i1, ends)
    return ends[0], ends[1]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("right", SIDES)
def test_transcription_agrees_with_the_spec(mask: ctypes.CDLL, left: int, right: int, anchor: str) -> None:
    spec = AttentionSpec(scale=1.0, left=left, right=right, anchor=anchor)
    for s_q in LENGTHS:
        for s_kv in LENGTHS:
            set_band(mask, spec, s_q, s_kv)
            for i in range(-1, s_q + 2):
                kept = [bool(mask.kept(i, j)) for j in range(-1, s_kv + 2)]
                assert kept == [bool(keep(spec, i, j, s_q, s_kv)) for j in range(-1, s_kv + 2)], (s_q, s_kv, i)
            for i0 in range(s_q + 1):
                for i1 in range(i0, s_q + 1):
                    assert range_of(mask.tile, i0, i1) == tile_range(spec, i0, i1, s_q, s_kv), (s_q, s_kv, i0, i1)
                    assert range_of(mask.full, i0, i1) == full_range(spec, i0, i1, s_q, s_kv), (s_q, s_kv, i0, i1)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("right", SIDES)
def test_transposed_band_agrees_with_the_spec(mask: ctypes.CDLL, left: int, right: int, anchor: str) -> None:
    spec = AttentionSpec(scale=1.0, left=left, right=right, anchor=anchor)
    for s_q in LENGTHS:
        for s_kv in LENGTHS:
            set_band(mask, spec, s_q, s_kv)
            mask.transpose()
            for j in range(-1, s_kv + 2):
                kept = [bool(mask.kept(j, i)) for i in range(-1, s_q + 2)]
                assert kept == [bool(keep(spec, i, j, s_q, s_kv)) for i in range(-1, s_q + 2)], (s_q, s_kv, j)
            for j0 in range(s_kv + 1):
                for j1 in range(j0, s_kv + 1):
                    expected = tile_range(spec.transposed(), j0, j1, s_kv, s_q)
                    assert range_of(mask.tile, j0, j1) == expected, (s_q, s_kv, j0, j1)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_longest_sequences_do_not_overflow(mask: ctypes.CDLL, anchor: str) -> None:
    longest = (1 << 29) - 1
    for s_q, s_kv in ((longest, longest), (1, longest), (longest, 1)):
        for left, right in ((None, None), (None, 0), (1, None), (longest, longest)):
            spec = AttentionSpec(scale=1.0, left=left, right=right, anchor=anchor)
            set_band(mask, spec, s_q, s_kv)
            for i0 in (0, s_q // 2, s_q - 1):
                for i1 in (i0 + 1, s_q):
                    assert range_of(mask.tile, i0, i1) == tile_range(spec, i0, i1, s_q, s_kv)
                    assert range_of(mask.full, i0, i1) == full_range(spec, i0, i1, s_q, s_kv)
