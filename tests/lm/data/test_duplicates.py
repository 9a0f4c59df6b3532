"""Duplicates: exact by hash, near by the share of common runs, and a table that holds what was put into it."""

import random

import numpy as np
import pytest

from fastattn.lm.data.duplicates import BANDS, ROWS, RUN, Table, near_keys


def text_of(seed, count=400):
    source = random.Random(seed)
    return [f"word{source.randrange(5000)}" for _ in range(count)]


def similarity(a, b):
    runs = [{tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)} for words in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def meet(a, b):
    return bool((near_keys(" ".join(a)) == near_keys(" ".join(b))).any())


def changed(words, count, seed):
    """A copy with ``count`` words replaced, at random places."""
    source, copy = random.Random(seed), list(words)
    for place in source.sample(range(len(words)), count):
        copy[place] = f"other{source.randrange(10**6)}"
    return copy


@pytest.mark.parametrize(("count", "least", "most"), [(4, 0.95, 1.0), (12, 0.4, 0.95), (60, 0.0, 0.1)])
def test_the_chance_of_meeting_is_that_of_the_formula(count, least, most):
    met, expected = [], []
    for seed in range(60):
        words = text_of(seed)
        copy = changed(words, count, seed)
        met.append(meet(words, copy))
        expected.append(1 - (1 - similarity(words, copy) ** ROWS) ** BANDS)
    assert least <= np.mean(met) <= most
    assert abs(np.mean(met) - np.mean(expected)) < 0.15


def test_case_and_punctuation_do_not_count_and_other_texts_do_not_meet():
    words = text_of(1)
    assert meet(words, [word.upper() + "," for word in words])
    assert not any(meet(text_of(seed), text_of(seed + 1)) for seed in range(100, 160))


@pytest.mark.parametrize("text", ["", "one", "one two three", "... !!!"])
def test_short_texts_have_keys_of_their_own(text):
    assert len(near_keys(text)) == BANDS
    assert (near_keys(text) == near_keys(text)).all()
    assert not (near_keys(text) == near_keys(text + " more?!")).any()


def test_a_table_that_grows(tmp_path):
    table = Table(tmp_path / "keys", slots=16)
    keys = np.random.default_rng(0).integers(0, 2**64, 3000, np.uint64)
    keys[5] = 0
    for start in range(0, 3000, 7):
        assert not table.add(keys[start : start + 7]).any()
    assert table.add(keys).all()
    assert table.taken == 3000 and 2 * table.taken <= table.slots
    assert [path.name for path in tmp_path.iterdir()] == [f"keys.{table.slots}"]


def test_a_table_tells_repeats_within_one_call(tmp_path):
    keys = np.array([7, 8, 7], np.uint64)
    assert Table(tmp_path / "keys").add(keys).tolist() == [False, False, True]
