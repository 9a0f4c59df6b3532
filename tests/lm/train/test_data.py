"""Packing, as properties: every token once, no label across documents, positions restart, batches by step alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.errors import DataError, InputError
from fastattn.lm.train.data import IGNORED, PackedRows
from fastattn.lm.train.tokens import TokenFile


def make_file(lengths):
    """A token file in which each token is unique: 1, 2, 3, ..."""
    offsets = np.cumsum([0, *lengths])
    return TokenFile(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets)


def epoch_of(rows, epoch=0):
    return rows.batch(epoch, rows.num_rows)  # as many rows as an epoch has


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.one_of(st.none(), st.integers(0, 5)), st.integers(0, 2))
def test_packing_properties(lengths, length, seed, epoch):
    file = make_file(lengths)
    rows = PackedRows(file, length, seed)
    batch = epoch_of(rows, epoch)
    tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
    used = tokens[tokens > 0]
    assert sorted(used.tolist()) == file.tokens.tolist()  # every token is an input once, the rest is padding
    firsts = set(file.tokens[file.offsets[:-1]].tolist())
    assert sorted(labels[labels != IGNORED].tolist()) == [t for t in file.tokens.tolist() if t not in firsts]
    labelled = labels != IGNORED
    assert (labels[labelled] == tokens[labelled] + 1).all()  # a label is the next token of the same document
    document_of = np.searchsorted(file.offsets[1:], np.arange(len(file.tokens)), side="right")
    for row in range(len(batch.tokens)):
        check_row(batch, row, document_of)


def check_row(batch, row, document_of):
    """Segments are the documents of the row, and positions count from the start of each."""
    tokens, segments, positions = batch.tokens[row], batch.segment_ids[row], batch.positions[row]
    for segment in range(int(segments[0]), int(segments[-1]) + 1):
        inside = segments == segment
        assert positions[inside].tolist() == list(range(int(inside.sum())))
        ids = tokens[inside]
        assert (ids == 0).all() or len({int(document_of[i - 1]) for i in ids.tolist()}) == 1
        assert (ids == 0).all() or (ids.diff() == 1).all()
    assert (segments.diff() >= 0).all() and int(segments[0]) == 0


def test_types_and_shapes():
    batch = PackedRows(make_file([5, 9]), 4, seed=0).batch(0, 3)
    shapes = {x.shape for x in (batch.tokens, batch.labels, batch.positions, batch.segment_ids)}
    assert shapes == {(3, 4)}
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.segment_ids.dtype == torch.int32


def same(one, two):
    return torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)


def test_a_batch_is_a_function_of_seed_and_step():
    file = make_file(range(3, 40))
    straight = [PackedRows(file, 8, seed=4).batch(step, 6) for step in range(40)]  # several epochs
    rows = PackedRows(file, 8, seed=4)
    backwards = [rows.batch(step, 6) for step in reversed(range(40))][::-1]
    assert all(same(a, b) for a, b in zip(straight, backwards, strict=True))
    assert not same(straight[0], PackedRows(file, 8, seed=5).batch(0, 6))


def test_epochs_differ_and_batches_cross_them():
    file = make_file(range(3, 40))
    rows = PackedRows(file, 8, seed=0)
    assert not same(epoch_of(rows, 0), epoch_of(rows, 1))
    fives = torch.cat([rows.batch(step, 5).tokens for step in range(rows.num_rows)])  # five epochs
    whole = torch.cat([epoch_of(rows, epoch).tokens for epoch in range(5)])
    assert torch.equal(fives, whole)


def test_samples_are_evenly_spaced_over_the_file():
    rows = PackedRows(make_file([100]), 5)
    starts = [int(start) for batch in rows.sample(4, 3) for start in batch.tokens[:, 0]]
    assert starts == [1, 26, 51, 76]
    assert sum(len(batch.tokens) for batch in rows.sample(1000, 7)) == rows.num_rows == 20


def test_parts_of_a_batch_make_it_up():
    batch = PackedRows(make_file([50]), 5).batch(0, 7)
    parts = list(batch.split(3))
    assert [len(part.tokens) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert sum(part.num_labels() for part in parts) == batch.num_labels()


def test_refusals():
    with pytest.raises(InputError, match="length: got 0"):
        PackedRows(make_file([3]), 0)
    with pytest.raises(DataError, match="token file is empty"):
        PackedRows(make_file([0]), 4)
