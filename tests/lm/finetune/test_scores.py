"""Scores of predictions against values known by hand."""

import re

import pytest

from fastattn.lm.finetune.scores import (
    Baseline,
    answer_scores,
    entities,
    entity_scores,
    first_sentence,
    is_bio,
    label_scores,
    score_table,
    text_scores,
)


def test_scores_of_labels_by_hand():
    # label 0: expected 2, found 1 of 1; label 1: expected 1, found 1 of 2; label 2: expected 1, found 1 of 1
    scores = label_scores([0, 1, 1, 2], [0, 1, 0, 2], num_labels=4)
    assert scores["accuracy"] == pytest.approx(3 / 4)
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
    assert text_scores(["a b"], ["a b"])["BLEU"] == pytest.approx(100.0)
    assert text_scores(["abc"], ["abc"])["chrF"] == pytest.approx(100.0)
    assert text_scores([""], ["abc"])["chrF"] == 0.0


def test_scores_of_answers_by_hand():
    scores = answer_scores(["The cat!", "two big dogs"], [["dog", "cat"], ["dogs"]])
    assert scores == {"exact match": 0.5, "F1": pytest.approx((1 + 2 * (1 / 3) / (4 / 3)) / 2)}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("  It fell 3.5 % today.  Nobody knows why.", "It fell 3.5 % today."),
        ('He said "Stop!" Then he left.', 'He said "Stop!"'),
        ("今天下雨。明天也是。", "今天下雨。"),
        ("a title\nand a text. more", "a title"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_first_sentences(text, first):
    assert first_sentence(text) == first


def test_a_model_stands_beside_baselines():
    easy, harder = Baseline("the first word", {"BLEU": 1.0}), Baseline("the second", {"BLEU": 2.0, "chrF": 3.0})
    lines = score_table({"loss": 0.5, "BLEU": 4.0}, [easy, harder], ["BLEU"]).splitlines()
    assert lines[:2] == ["baseline 1: the first word", "baseline 2: the second"]
    rows = [re.split(" {2,}", line) for line in lines[3:]]
    assert rows[0] == ["score", "baseline 1", "baseline 2", "model"]
    assert rows[1:] == [["loss", "0.5000"], ["BLEU", "1.0000", "2.0000", "4.0000", "<- counts"]]
