"""Each rule drops what it was made for, and only by its own name; good prose and good code pass."""

import inspect

import pytest

import fastattn.functional
from fastattn.lm.data.quality import PROSE, RULES, SOURCE_CODE, Lengths, Text, broken_rule, is_code

GOOD = (
    "The attention mechanism lets a model look at all of the words that have come before, and weigh them by how well "
    "they match what it is looking for. With a softmax the weights sum to one, so that the result is a mean.\n\n"
    "In practice one head is not enough: several of them run side by side, each with its own projection, and their "
    "results are joined again at the end of the layer. This costs about as much as a single head of full width."
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(count, every=lambda n: ""):
    """Different words of three letters, some of English between them."""
    return " ".join(
        f"the of {LETTERS[n % 26]}{LETTERS[n // 26 % 26]}{LETTERS[n // 676 % 26]}{every(n)}" for n in range(count)
    )


BAD = {
    "too-short": "The end of it and that.",
    "too-long": words(34_000),
    "word-length": " ".join(f"the of {LETTERS[n % 26] * 3}{'incomprehensibilities' * 2}" for n in range(60)),
    "symbols": words(60, lambda n: " #" if n % 2 else ""),
    "bullets": "\n".join(f"- {line}" for line in GOOD.replace(". ", ".\n").replace(", ", ",\n").split("\n") if line),
    "ellipses": "\n".join(line + "..." for line in GOOD.split("\n\n")),
    "alphabetic-words": words(60, lambda n: f" {n}{n}{n} {n}12"),
    "stop-words": " ".join(f"la {LETTERS[n % 26]}{LETTERS[n // 26]}palabra" for n in range(60)),
    "repeated-lines": (GOOD.split("\n\n")[0] + "\n") * 3,
    "repeated-paragraphs": "\n\n".join([GOOD.replace("\n\n", "\n")] * 2),
    "frequent-run": words(40) + " " + " ".join(f"every single day {LETTERS[n]}{LETTERS[n]}" for n in range(26)),
    "repeated-runs": GOOD.replace("\n\n", " ") + " So: " + GOOD[:250],
}
BAD_CODE = {
    "too-long": "x = 1\n" * 40_000,
    "long-lines": "a = 1\n" * 50 + "data = '" + "ab" * 600 + "'\n",
    "mean-line-length": ("x = " + "a + " * 40 + "a\n") * 5,
    "alphanumeric": "# ======== ++++++++ -------- ********\n" * 5,
}


def broken(text, code=False, without=frozenset()):
    return broken_rule(text, code, Lengths(), without)


def test_good_text_passes():
    assert broken(GOOD) is None
    assert broken(inspect.getsource(fastattn.functional), code=True) is None


@pytest.mark.parametrize(("rule", "code"), [*((r, False) for r in PROSE), *((r, True) for r in SOURCE_CODE)])
def test_each_rule_has_its_case_and_can_be_turned_off(rule, code):
    text = (BAD_CODE if code else BAD)[rule]
    assert (SOURCE_CODE if code else PROSE)[rule](Text(text), Lengths())
    others = frozenset(RULES) - {rule}
    assert broken(text, code, others) == rule
    assert broken(text, code, frozenset(RULES)) is None
    assert rule not in BAD or code or broken(text) is not None


def test_every_rule_has_a_case():
    assert set(BAD) == set(PROSE) and set(BAD_CODE) == set(SOURCE_CODE)


def test_repeated_runs_by_hand():
    text = Text("a b c d a b c e")
    assert text.repeats(2, 0.49) and not text.repeats(2, 0.5)  # "a b" twice, 4 of 8; "b c" ties with it
    assert text.covered_by_repeats(3) == pytest.approx(3 / 8)  # the second "a b c"
    assert text.covered_by_repeats(2) == pytest.approx(3 / 8)  # "a b" and "b c", the b once
    long = Text("x xxxx " * 2 + "a bb " * 3 + "end")  # fewer long runs than short ones
    assert long.repeats(2, 8.9 / 22) and not long.repeats(2, 9.1 / 22)
    assert not Text("a b x b a").repeats(2, 0.0) and Text("a b x b a").covered_by_repeats(2) == 0.0  # order counts
    assert not Text("a b c").repeats(2, 0.0) and Text("").covered_by_repeats(5) == 0.0


def test_lengths_are_given():
    assert broken_rule("The first half of it.", False, Lengths(min_words=5)) is None
    assert broken_rule("The first half of it.", False, Lengths(1, 3)) == "too-long"


@pytest.mark.parametrize("name", ["a/b.PY", "x.c.gz", "Makefile"])
def test_code_is_told_by_its_suffix(name):
    assert is_code(name)


@pytest.mark.parametrize("name", ["b.txt", "notes", "c4.json.gz", "hf:imdb:train"])
def test_the_rest_is_prose(name):
    assert not is_code(name)
