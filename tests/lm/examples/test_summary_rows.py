"""The rows that the example ``summarise`` learns from."""

from fastattn.lm.examples.stdlib import Sentence, Summary
from fastattn.lm.examples.summary_rows import copied_rows, first_line, first_words, sentence_rows, summary_rows

SOURCE = "async def get_rowCount(self, deep=False):\n    return len(self.rows)"
ITEM = Summary("pack/table.py", "pack", "TableReader", SOURCE, "Return the number of rows.")


def test_a_function_is_its_first_words_and_its_place():
    words = "get row count self deep false return len self rows"
    assert summary_rows([ITEM]) == [{"source": f"{words} in table reader pack table", "target": ITEM.summary}]
    assert first_words(ITEM, 3) == "get row count" and first_line(ITEM) == "get row count self deep false"
    long = Summary("a.py", "a", "", f"def f(): {'x ' * 50}", "Do it.")
    assert summary_rows([long])[0]["source"] == "f" + " x" * 15 + " in a"


def test_variants_keep_the_name_and_the_order():
    rows = summary_rows([ITEM], variants=30)
    whole = rows[0]["source"].split()
    assert len({row["source"] for row in rows}) > 10
    for row in rows:
        words = row["source"].split()
        assert words[:3] == ["get", "row", "count"] and words[-5:] == whole[-5:] and row["target"] == ITEM.summary
        left = iter(whole)
        assert all(word in left for word in words)  # a part of them, in their order


def test_pieces_are_repeated():
    text = "one two three four five six seven eight nine ten eleven twelve"
    rows = copied_rows([text, "a b"] * 20)
    assert all(row["source"] == row["target"] for row in rows)
    assert all(row["source"] in text and 3 <= len(row["source"].split()) <= 10 for row in rows[::2])
    assert {row["source"] for row in rows[1::2]} == {"a b"}
    assert len({row["source"] for row in rows}) > 10


def test_sentences_are_made_from_their_rarer_words():
    letters = "abcdefghijklmnopqrst"
    frequent = " ".join(f"common{a}{b}" for a in "ab" for b in letters)
    rare = "The zebra crosses commonaa streets."
    texts = [Sentence("b.py", "b", frequent)] * 50 + [Sentence("pack/a.py", "pack", rare)] * 40
    rows = sentence_rows(texts, [ITEM])[50:]
    assert {row["target"] for row in rows} == {rare}
    sources = [row["source"] for row in rows]
    assert all(source.endswith(" in pack a") and "common" not in source for source in sources)
    assert any(source.startswith("the zebra crosses streets") for source in sources)  # nothing was left out
    assert any("zebra" not in source for source in sources)  # something was
    assert any("row count" in source for source in sources)
