"""What is hidden: the known small cases, the proportions of the papers, and the same draws from the same seed."""

import numpy as np
import pytest

from fastattn.errors import InputError
from fastattn.train.data import IGNORED
from fastattn.train.objectives import corrupt_spans, mask_tokens, span_counts

MASK, SPECIAL, VOCAB = 500, (0, 1), 500
ROW = np.random.default_rng(1).integers(2, VOCAB, 200_000)


def masked(row=ROW, seed=0, rate=0.15):
    return mask_tokens(row, np.random.default_rng(seed), mask=MASK, vocab_size=VOCAB, special=SPECIAL, rate=rate)


def spans(row, seed=0):
    return corrupt_spans(row, np.random.default_rng(seed), sentinels=range(1000, 1400), end=1)


def test_masking_has_the_proportions_of_bert():
    tokens, labels = masked()
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.003)
    assert (tokens[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (tokens[chosen] == ROW[chosen]).mean() == pytest.approx(0.1, abs=0.01)  # and one in 498 by chance
    assert (tokens[~chosen] == ROW[~chosen]).all() and (labels[chosen] == ROW[chosen]).all()


def test_special_tokens_are_neither_hidden_nor_drawn():
    row = np.where(np.arange(len(ROW)) % 3 == 0, 0, ROW)
    tokens, labels = masked(row, rate=0.9)
    assert (labels[::3] == IGNORED).all() and (tokens[::3] == 0).all()
    assert not np.isin(tokens[row != 0], SPECIAL).any()


def test_the_same_seed_hides_the_same():
    for hide in (masked, spans):
        for one, two, other in zip(hide(ROW[:500]), hide(ROW[:500]), hide(ROW[:500], seed=1), strict=True):
            assert (one == two).all() and not np.array_equal(one, other)


def restored(found, sentinels):
    """The row that source and target were made of."""
    spans, current = {}, None
    for token in found.target[:-1].tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [x for token in found.source.tolist() for x in (spans[token] if token in sentinels else [token])]


@pytest.mark.parametrize("length", [2, 3, 7, 20, 128, 513])
def test_spans_put_back_give_the_row(length):
    found = spans(ROW[:length])
    hidden, count = span_counts(length)
    assert restored(found, range(1000, 1400)) == ROW[:length].tolist()
    assert len(found.source) == length - hidden + count and len(found.target) == hidden + count + 1
    assert found.target[-1] == 1 and found.target[0] == 1000
    assert (
        [t for t in found.source if t >= 1000] == [t for t in found.target if t >= 1000] == [*range(1000, 1000 + count)]
    )


def test_spans_have_the_proportions_of_t5():
    hidden, count = span_counts(512)
    assert hidden / 512 == pytest.approx(0.15, abs=0.002) and hidden / count == pytest.approx(3.0, abs=0.1)
    lengths = [np.diff(np.flatnonzero(spans(ROW[:512], seed).target >= 1000)) - 1 for seed in range(200)]
    assert 2.8 < np.concatenate(lengths).mean() < 3.2 and np.concatenate(lengths).max() > 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masked(rate=0.0), "rate: got 0.0"),
        (lambda: mask_tokens(ROW, np.random.default_rng(), mask=2, vocab_size=2, special=SPECIAL), "vocab_size: got 2"),
        (lambda: spans(ROW[:1]), "tokens: got 1 of them"),
        (lambda: corrupt_spans(ROW[:99], np.random.default_rng(), sentinels=[5], end=1), "sentinels: got 1 of them"),
        (
            lambda: corrupt_spans(ROW[:9], np.random.default_rng(), sentinels=[5], end=1, mean_span=0.5),
            "mean_span: got 0.5",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()
