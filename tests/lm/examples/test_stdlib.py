"""The data of the shipped examples, made from two small files instead of the whole standard library."""

import pytest

from fastattn.lm.examples import stdlib
from fastattn.lm.examples.stdlib import (
    docstrings,
    held_out_files,
    largest_packages,
    sentences,
    split_by_module,
    summaries,
    words,
)

ONE = '''
"""The first module, and what it is for in general."""

class Reader:
    """Reads the rows of a table from a file that was opened before."""

    @property
    def row_count(self, deep=False):
        """Return the number of rows.

        More about it.
        """
        return len(self.rows)  # all of them

    def same(self):
        """Return the number of rows."""
        return 1

    def again(self):
        """too short"""

    def example(self):
        """>>> an example of use, not a summary"""

    async def nothing(self):
        """Do nothing at all here."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of two packages."""
    for name, text in {"pack/one.py": ONE, "pack/two.py": ONE.replace("rows", "lines"), "alone.py": ONE}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "broken.py").write_text("def (")
    files = sorted(tmp_path.rglob("*.py"))
    monkeypatch.setattr(stdlib, "find_files", lambda: files)
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_words_takes_names_apart():
    assert words("get_fileName2(XMLReader)") == ("get", "file", "name", "2", "xml", "reader")


def test_docstrings_once_each(library):
    found = docstrings()
    texts = [item.text for item in found]
    assert len(texts) == len(set(texts)) and all(len(text) >= 40 for text in texts)
    assert {item.package for item in found} == {"alone", "pack"}
    assert sum("rows of a table" in text for text in texts) == 1


def test_summaries(library):
    found = summaries()
    assert [item.summary for item in found] == [
        "Return the number of rows.",
        "Do nothing at all here.",
        "Return the number of lines.",
    ]
    first, nothing = found[0], found[1]
    assert first.source == "def row_count(self, deep=False):\n    return len(self.rows)" and first.owner == "Reader"
    assert first.module == "alone.py" and first.package == "alone"
    assert nothing.source == "async def nothing(self):\n    pass"


def test_sentences_of_docstrings_and_comments(library):
    text = '''
"""What this is for: Reading rows
of tables. See also:

    >>> read(table, rows, columns)

Nothing else"""

# Rows are read one by one. They
# are kept as they were.
#
# too short
x = 1  # not alone on its line at all
y = {"a": 1}
# y = {"a": [1, 2], "b": (3, 4)}
# This sentence has far more words than it should have, so it is left out of what is learned from.
'''
    (library / "pack/one.py").write_text(text)
    (library / "pack/two.py").write_text(text)
    (library / "alone.py").write_text("")
    found = sentences()
    assert [item.text for item in found] == [
        "What this is for:", "Reading rows of tables.", "Rows are read one by one.", "They are kept as they were."
    ]  # fmt: skip
    assert {(item.module, item.package) for item in found} == {("pack/one.py", "pack")}


def item(module, number):
    return stdlib.Docstring(module, module.split("/")[0], f"text {number}")


def test_no_module_is_in_both_parts():
    items = [item(f"p/{module}.py", n) for module in "abcdefghij" for n in range(5)]
    items += [item("q/large.py", n) for n in range(20)]
    train, held_out = split_by_module(items, held_out=0.2)
    assert len(held_out) == 10 and len(train) == 60
    assert not {x.module for x in train} & {x.module for x in held_out}
    assert all(x.package == "p" for x in held_out), "a package of one module is not held out"
    assert split_by_module(items[::-1])[1] == held_out[::-1]


def test_largest_packages():
    items = [item(f"a/{n}.py", n) for n in range(6)] + [item("b/x.py", n) for n in range(9)]
    items += [item(f"c/{n % 3}.py", n) for n in range(9)]
    assert largest_packages(items, fewest_modules=3, fewest_items=5) == ["c", "a"]


def test_held_out_files_depend_on_names_alone(library):
    files = [library / f"m{n}.py" for n in range(40)]
    kept = held_out_files(files, 0.1)
    assert len(kept) == 4 and kept == held_out_files(files[::-1], 0.1)
