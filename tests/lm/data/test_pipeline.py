"""The way of a document: what is dropped by which rule, in which order, counted by file; lazily, in any
number of processes."""

import random
import re
from collections import Counter

import pytest

from fastattn.errors import InputError
from fastattn.lm.data import Cleaning, Document, Report, clean_documents

WORDS = ["river", "stone", "bridge", "water", "market", "village", "garden", "window", "letter", "music", "winter"]
WORDS += ["summer", "paper", "table", "kitchen", "doctor", "teacher", "engine", "railway", "picture", "machine"]


def prose(seed, extra=""):
    """A hundred words that pass every rule, different for each seed."""
    source = random.Random(seed)
    lines = (" ".join(source.choices([*WORDS, "the", "and", "with", "of"], k=12)).capitalize() for _ in range(8))
    return ".\n".join(lines) + f". {extra}That was the story of {seed}."


CODE = "# by ann@example.org\n" + "".join(f"def f{n}(x):\n    return x + {n} * 4111111111111111\n" for n in range(9))


def cleaned(documents, tmp_path, workers=1, **changes):
    report = Report()
    kept = list(clean_documents(documents, Cleaning(**changes), report, tmp_path, workers=workers))
    return kept, report


def document(name, text, source="a.txt"):
    return Document(name, text, source)


def corpus():
    songs = prose("songs")
    return [
        document("1", prose("rivers", "Write to bo@example.org or call 555-123-4567. ")),
        document("2", songs),
        document("3", songs),
        document("4", songs.replace("the", "THE").replace("with", "with,"), "b.txt"),
        document("5", "Too short.", "b.txt"),
        document("6", prose("engines").replace("\n", "\r\n"), "b.txt"),
        document("7", CODE, "c.py"),
        document("8", "\x00\ufeff", "c.py"),
    ]


def test_what_is_kept_and_what_is_dropped_by_which_rule(tmp_path):
    kept, report = cleaned(corpus(), tmp_path)
    assert [document.name for document in kept] == ["1", "2", "6", "7"]
    assert "Write to <EMAIL> or call <PHONE>." in kept[0].text
    assert kept[1].text == prose("songs") and "\r" not in kept[2].text
    assert "# by <EMAIL>" in kept[3].text and "4111111111111111" in kept[3].text  # numbers of code stay
    assert report.dropped == {"exact-duplicate": 1, "near-duplicate": 1, "too-short": 1, "empty": 1}
    assert report.masked == {"email": 2, "phone": 1} and report.changed == {"line-ends": 1}
    assert (report.read, report.kept) == (8, 4)
    files = {name: (counts.read, counts.kept, dict(counts.dropped)) for name, counts in report.files.items()}
    assert files["b.txt"] == (3, 1, {"near-duplicate": 1, "too-short": 1})
    assert report.characters == sum(len(document.text) for document in kept)
    assert report.examples["too-short"] == ["5"]


def test_everything_can_be_turned_off(tmp_path):
    documents = corpus()
    for number, (changes, names) in enumerate([
        ({"duplicates": "exact"}, "12467"),
        ({"duplicates": "keep"}, "123467"),
        ({"without": ("too-short", "word-length")}, "125670"),
        ({"quality": False}, "12567"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        kept, _ = cleaned(documents, folder, **changes)
        if "without" in changes:  # the next rule drops it
            assert [d.name for d in kept] == ["1", "2", "6", "7"]
        else:
            assert "".join(document.name for document in kept) == names
    (tmp_path / "none").mkdir()
    report = Report()
    kept = list(clean_documents(documents[:-1], Cleaning.none(), report, tmp_path / "none"))
    assert kept == [Document(d.name, d.text, d.source) for d in documents[:-1]] and not report.dropped


@pytest.mark.parametrize(("personal", "expected"), [("all", (0, 0)), ("none", (1, 9)), ("auto", (0, 9))])
def test_masking_in_code(tmp_path, personal, expected):
    (kept,), _ = cleaned([document("1", CODE, "c.py")], tmp_path, personal=personal)
    assert (kept.text.count("ann@example.org"), kept.text.count("4111111111111111")) == expected


def test_processes_change_nothing(tmp_path):
    documents = [document(f"{n}", prose(n % 40, "Again. " if n % 3 else "")) for n in range(300)]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    alone, first = cleaned(documents, tmp_path / "a")
    together, second = cleaned(documents, tmp_path / "b", workers=2)
    assert alone == together and first == second and 40 <= len(alone) < 100


@pytest.mark.parametrize(("workers", "most"), [(1, 1), (2, 5 * 64)])
def test_no_more_is_read_than_is_needed(tmp_path, workers, most):
    read = Counter()

    def endless():
        while True:
            read["documents"] += 1
            yield document(str(read["documents"]), prose(read["documents"]))

    found = clean_documents(endless(), Cleaning(duplicates="exact"), Report(), tmp_path, workers=workers)
    for count in range(1, 4):
        next(found)
        assert read["documents"] <= count + most
    found.close()


def test_the_report_as_a_table_and_back(tmp_path):
    _, report = cleaned(corpus(), tmp_path)
    text = report.table()
    for line in (
        r"documents read +8\b",
        r"dropped: too-short +1 +12.5%",
        r"masked: email +2\b",
        r"b.txt: 2 of 3 \(near",
    ):
        assert re.search(line, text), line
    assert Report.from_dict(report.to_dict() | {"more": 1}) == report


def test_a_rule_that_drops_most_is_pointed_out(tmp_path):
    _, report = cleaned([document(str(n), f"Short text {n}.") for n in range(5)], tmp_path)
    assert report.table().endswith("if it does not suit this text, --without too-short.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "song"}, "kind: got 'song'; allowed: auto, prose, code"),
        ({"duplicates": "some"}, "duplicates: got 'some'"),
        ({"personal": "few"}, "personal: got 'few'"),
        ({"without": ("too-nice",)}, "without: got 'too-nice'; allowed: too-short, too-long"),
        ({"min_words": 9, "max_words": 8}, "min_words and max_words: got 9 and 8"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(InputError, match=words):
        Cleaning(**changes)
