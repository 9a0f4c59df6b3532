"""Entropy, perplexity and bits per byte against values known by hand; the loss curve is a picture."""

import math

import numpy as np
import pytest
import torch

from fastattn.train.metrics import (
    answer_scores,
    bits_per_byte,
    entities,
    entity_scores,
    is_bio,
    label_scores,
    peak_flops,
    perplexity,
    text_scores,
    unigram_entropy,
)
from fastattn.train.plots import plot_losses


def test_unigram_entropy():
    assert unigram_entropy(np.full(8, 3)) == pytest.approx(math.log(8))
    assert unigram_entropy(np.array([0, 7, 0])) == 0.0
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_perplexity_and_bits():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e9) < math.inf
    assert bits_per_byte(math.log(2), tokens=30, text_bytes=10) == pytest.approx(3.0)


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device("cpu")) is None


def test_the_loss_curve_is_a_png(tmp_path):
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "lr": 1.0}, {"step": 2, "held_out_loss": 4.5}]
    plot_losses(records, {"unigram entropy": 4.8}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_scores_of_labels_by_hand():
    # label 0: expected 2, found 1 of 1; label 1: expected 1, found 1 of 2; label 2: expected 1, found 1 of 1
    scores = label_scores([0, 1, 1, 2], [0, 1, 0, 2], num_labels=4)
    assert scores["accuracy"] == scores["F1 (micro)"] == pytest.approx(3 / 4)
    assert scores["precision (macro)"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert scores["recall (macro)"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["F1 (macro)"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert label_scores([0, 0], [0, 0], num_labels=1)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O O", set()),
        ("B-x I-x O B-y", {("x", 0, 2), ("y", 3, 4)}),
        ("B-x B-x I-x", {("x", 0, 1), ("x", 1, 3)}),
        ("I-x I-x O I-x", {("x", 0, 2), ("x", 3, 4)}),  # IOB1
        ("B-x I-y I-y", {("x", 0, 1), ("y", 1, 3)}),
        ("O I-x B-x I-x", {("x", 1, 2), ("x", 2, 4)}),
        ("B-a-b I-a-b I-a", {("a-b", 0, 2), ("a", 2, 3)}),
        ("B I O B", {("", 0, 2), ("", 3, 4)}),
        ("B-O I-O", {("O", 0, 2)}),
    ],
)
def test_entities_by_hand(labels, found):
    assert entities(labels.split()) == found


def test_scores_of_entities_by_hand():
    expected = [["B-per", "I-per", "O", "B-loc"], ["O", "B-org", "I-org", "I-org"], ["O", "O"]]
    # one right, one with the wrong kind; one that ends too early; one where none is
    predicted = [["B-per", "I-per", "O", "B-org"], ["O", "B-org", "I-org", "O"], ["O", "B-loc"]]
    scores = entity_scores(predicted, expected)
    assert scores["entity precision"] == pytest.approx(1 / 4)
    assert scores["entity recall"] == pytest.approx(1 / 3)
    assert scores["entity F1"] == pytest.approx(2 / 7)
    assert set(entity_scores(expected, expected).values()) == {1.0}
    assert set(entity_scores([["O"]], [["O"]]).values()) == {0.0}
    # the same span in another text is another entity
    assert entity_scores([["B-x"], ["O"]], [["O"], ["B-x"]])["entity F1"] == 0.0


def test_which_labels_mark_entities():
    assert is_bio(["B-x", "I-x", "O"]) and is_bio(["B", "I", "O"]) and is_bio(["I-x", "O"])
    assert not is_bio(["O"]) and not is_bio(["noun", "verb", "O"]) and not is_bio(["B-x", "I-x", "E-x", "S-x", "O"])
    assert not is_bio([])


def test_scores_of_text_by_hand():
    scores = text_scores(["the cat sat", "a b c d"], ["the cat ran", "a b c d "])
    assert scores["exact match"] == 0.5
    assert scores["ROUGE-1"] == pytest.approx(100 * (2 / 3 + 1) / 2, abs=1e-3)
    assert scores["ROUGE-2"] == pytest.approx(100 * (1 / 2 + 1) / 2, abs=1e-3)
    assert scores["ROUGE-L"] == pytest.approx(100 * (2 / 3 + 1) / 2, abs=1e-3)
    assert text_scores(["a b c d"], ["a b c d"])["BLEU"] == pytest.approx(100.0)
    # n-gram precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert text_scores(["a b c d e"], ["a b c d f"])["BLEU"] == pytest.approx(expected, abs=1e-6)
    assert text_scores(["abc"], ["abc"])["chrF"] == pytest.approx(100.0)
    assert text_scores([""], ["abc"])["chrF"] == 0.0


def test_scores_of_answers_by_hand():
    scores = answer_scores(["The cat!", "two big dogs"], ["cat", "dogs"])
    assert scores == {"exact match": 0.5, "F1": pytest.approx((1 + 2 * (1 / 3) / (4 / 3)) / 2)}
