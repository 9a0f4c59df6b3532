"""What is hidden: the known small cases, the proportions of the papers, and the same draws from the same seed."""

import numpy as np
import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.train.data import IGNORED, Batch, PackedRows
from fastattn.lm.train.objectives import corrupt_spans, mask_tokens, span_counts
from fastattn.lm.train.tasks import OBJECTIVES, find_objective, preset_for
from fastattn.lm.train.tokens import END, START, TokenFile

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


@pytest.fixture(scope="module")
def packed(corpus):
    return PackedRows(corpus.split("train"), 24, seed=3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_an_objective_are_a_function_of_seed_and_row(corpus, packed, name):
    rows = find_objective(name)(corpus.tokenizer(), 24).rows(packed)
    again = find_objective(name)(corpus.tokenizer(), 24).rows(packed)

    def labels(batch):
        return (batch.labels if isinstance(batch, Batch) else batch["labels"]).tolist()

    whole = labels(rows.batch(7, 4))
    assert whole == labels(again.batch(7, 4)) != labels(rows.batch(7 + packed.num_rows, 4))
    assert labels(rows.batch(14, 2)) + labels(rows.batch(15, 2)) == whole
    one, two = ([labels(batch) for batch in rows.sample(6, 4)] for _ in range(2))
    assert one == two and [len(part) for part in one] == [4, 2]


def test_a_row_is_hidden_anew_in_each_epoch(corpus):
    """A single row, so that both epochs have the same."""
    tokenizer = corpus.tokenizer()
    tokens = np.array([tokenizer.token_to_id(START), *range(10, 40), tokenizer.token_to_id(END)], np.uint16)
    file = TokenFile(tokens, np.array([0, len(tokens)]))
    rows = find_objective("masked")(tokenizer, 32).rows(PackedRows(file, 32, seed=0))
    seen = {tuple(rows.batch(step, 1).labels[0].tolist()) for step in range(20)}
    assert len(seen) > 15
    assert {label for row in seen for label in row} <= {IGNORED, *range(10, 40)}


def test_masked_rows_keep_what_is_not_hidden(corpus, packed):
    tokenizer = corpus.tokenizer()
    rows = find_objective("masked")(tokenizer, 24).rows(packed)
    plain, hidden = packed.batch(2, 8), rows.batch(2, 8)
    assert tokenizer.get_vocab_size() == corpus.facts.vocab_size + 1
    kept = hidden.labels == IGNORED
    assert torch.equal(hidden.tokens[kept], plain.tokens[kept])
    assert torch.equal(hidden.labels[~kept], plain.tokens[~kept])
    assert torch.equal(hidden.segment_ids, plain.segment_ids) and torch.equal(hidden.positions, plain.positions)


def test_padding_takes_no_part_in_spans(corpus):
    tokenizer = corpus.tokenizer()
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    file = TokenFile(np.array([start, *range(10, 20), end], np.uint16), np.array([0, 12]))
    (batch,) = find_objective("span")(tokenizer, 32).rows(PackedRows(file, 32)).sample(1, 1)
    hidden, spans = span_counts(12)
    assert batch["source"].shape == (1, 12 - hidden + spans) and batch["labels"].shape == (1, hidden + spans + 1)
    assert batch["target"][0, 0] == start and torch.equal(batch["target"][0, 1:], batch["labels"][0, :-1])


def test_presets_of_objectives():
    assert preset_for(["encoder"], "tiny") == "encoder-tiny" and preset_for(["decoder"], "tiny") == "tiny"
    assert preset_for(["encoder", "decoder"], "gpt2-124m") == "gpt2-124m"
    with pytest.raises(InputError, match="preset: got 't5-small'"):
        preset_for(["encoder"], "t5-small")
    with pytest.raises(InputError, match="objective: got 'denoise'; allowed: causal, masked, span"):
        find_objective("denoise")
