"""The definition: its drawings, its integer functions against ``keep``, and its small derived numbers."""

import inspect
import itertools
import re

import pytest
import torch

import fastattn
from fastattn import spec as spec_module
from fastattn.arguments import band
from fastattn.spec import ANCHORS, AttentionSpec, distance, full_range, keep, kept_pairs, tile_range

SIZES = range(5)
SIDES = (None, 0, 1, 2, 5)
SPECS = [
    AttentionSpec(1.0, left=left, right=right, anchor=anchor)
    for left, right, anchor in itertools.product(SIDES, SIDES, ANCHORS)
]


def matrix(spec, s_q, s_kv):
    """``keep`` enumerated with plain ints."""
    return [[bool(keep(spec, i, j, s_q, s_kv)) for j in range(s_kv)] for i in range(s_q)]


def rows_of_digits(text):
    return [[digit == "1" for digit in row.split()] for row in re.findall(r"^[01](?: [01])*$", text, re.MULTILINE)]


def drawings_in_spec():
    """Each drawing: a line of parameters, then the rows."""
    text = inspect.cleandoc(spec_module.__doc__)
    text = re.sub(r"^ +", "", text, flags=re.MULTILINE)
    for found in re.finditer(r"^left=(\w+) right=(\w+) anchor=(\w+)\n((?:[01 ]+\n)+)", text, re.MULTILINE):
        left, right = (None if side == "None" else int(side) for side in found.group(1, 2))
        yield AttentionSpec(1.0, left=left, right=right, anchor=found.group(3)), rows_of_digits(found.group(4))


def drawing_after(function, lead):
    """The drawing that stands beside and below ``lead`` in a docstring."""
    text = function.__doc__
    block = text[text.index(lead) + len(lead) :].lstrip().split("\n\n", 1)[0]
    return rows_of_digits("\n".join(line.strip() for line in block.splitlines()))


def test_the_drawings_of_spec_are_what_keep_does():
    drawings = list(drawings_in_spec())
    assert len(drawings) == 5
    for spec, drawn in drawings:
        assert matrix(spec, len(drawn), len(drawn[0])) == drawn, spec


@pytest.mark.parametrize(
    ("function", "lead", "left_right", "anchor", "sizes"),
    [
        (fastattn.attention, "S_q = 2, S_kv = 5:", band(True, None), "lower_right", (2, 5)),
        (fastattn.attention, "S_q = S_kv = 4:", band(False, (1, 0)), "lower_right", (4, 4)),
        (fastattn.scaled_dot_product_attention, "``S = 5``:", band(True, None), "upper_left", (2, 5)),
    ],
)
def test_the_drawings_of_public_docstrings_are_what_keep_does(function, lead, left_right, anchor, sizes):
    drawn = drawing_after(function, lead)
    assert (len(drawn), len(drawn[0])) == sizes
    assert matrix(AttentionSpec(1.0, None, *left_right, anchor=anchor), *sizes) == drawn


by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.left}-{spec.right}-{spec.anchor}")


@by_spec
def test_kept_pairs_counts_what_keep_keeps(spec):
    for s_q, s_kv in itertools.product(SIZES, SIZES):
        assert kept_pairs(spec, s_q, s_kv) == sum(map(sum, matrix(spec, s_q, s_kv)))


@by_spec
def test_tile_range_is_the_smallest_and_full_range_the_largest(spec):
    for s_q, s_kv in itertools.product(SIZES, SIZES):
        kept = matrix(spec, s_q, s_kv)
        for i0, i1 in itertools.combinations_with_replacement(range(s_q + 1), 2):
            by_any = [j for j in range(s_kv) if any(kept[i][j] for i in range(i0, i1))]
            by_all = [j for j in range(s_kv) if i1 > i0 and all(kept[i][j] for i in range(i0, i1))]
            smallest = (by_any[0], by_any[-1] + 1) if by_any else (0, 0)
            assert tile_range(spec, i0, i1, s_q, s_kv) == smallest, (i0, i1, s_q, s_kv)
            assert list(range(*full_range(spec, i0, i1, s_q, s_kv))) == by_all, (i0, i1, s_q, s_kv)


@by_spec
def test_transposed_is_the_band_seen_from_the_keys(spec):
    for s_q, s_kv in itertools.product(SIZES, SIZES):
        kept = matrix(spec, s_q, s_kv)
        assert matrix(spec.transposed(), s_kv, s_q) == [[kept[i][j] for i in range(s_q)] for j in range(s_kv)]


def test_ints_and_tensors_agree():
    for spec in SPECS:
        i, j = torch.arange(4)[:, None], torch.arange(5)[None, :]
        assert keep(spec, i, j, 4, 5).tolist() == matrix(spec, 4, 5)
        assert distance(spec, i, j, 4, 5).tolist() == [[distance(spec, a, b, 4, 5) for b in range(5)] for a in range(4)]


def test_distance_is_zero_on_the_diagonal():
    lower, upper = (AttentionSpec(1.0, anchor=anchor) for anchor in ("lower_right", "upper_left"))
    assert [distance(lower, 3, j, 4, 6) for j in range(6)] == [5, 4, 3, 2, 1, 0]
    assert [distance(upper, 0, j, 4, 6) for j in range(6)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-16, 1.0])
def test_dropout_numbers_are_exact(p):
    spec = AttentionSpec(1.0, dropout_p=p)
    survivors = (1 << 16) - spec.dropout_threshold
    assert abs(spec.dropout_threshold / (1 << 16) - p) <= 2**-17
    assert spec.dropout_scale * survivors == ((1 << 16) if survivors else 0)
