"""Finding and reading text: order, what is skipped and why, pieces of long files, refusals."""

import os

import pytest

from fastattn.errors import DataError
from fastattn.lm.data import find_files, read_documents, text_rank
from fastattn.lm.data.formats import pieces


def names(files):
    return [file.name for file in files]


def test_folders_files_and_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.py", ".hidden/d.txt", "deep/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names(find_files([str(tmp_path)])) == ["a.txt", "b.txt", "c.py"]
    assert names(find_files([str(tmp_path / "**" / "*.py")])) == ["c.py"]
    assert names(find_files([str(tmp_path / "b.txt"), str(tmp_path)])) == ["b.txt", "a.txt", "c.py"]  # each once


def test_the_default_is_the_standard_library_without_its_tests():
    files = find_files()
    assert {"argparse.py", "textwrap.py"} <= set(names(files))
    assert not any({"test", "site-packages", "idle_test", "encodings"} & set(file.parts) for file in files)
    assert files == find_files()


def test_unusable_files_are_skipped_and_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x00\x01text")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("né".encode("latin-1"))
    (tmp_path / "marked").write_bytes("good".encode("utf-8-sig"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    skipped = []
    files = [tmp_path / name for name in ("binary", "empty", "latin", "marked", "gone")]
    documents = list(read_documents(files, skipped))
    assert [document.text for document in documents] == ["good"]
    assert [(os.path.basename(skip.name), skip.reason) for skip in skipped] == [
        ("binary", "binary (it holds zero bytes)"),
        ("empty", "empty"),
        ("latin", "neither UTF-8 nor Windows-1252; name its encoding with fastattn prepare --encoding"),
        ("gone", "cannot be read (No such file or directory)"),
    ]


def test_a_very_long_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    lines = [f"line {number} " + "x" * (number % 70) + "\n" for number in range(20_000)]
    path = tmp_path / "long.txt"
    path.write_text("".join(lines))
    documents = list(read_documents([path], []))
    assert len(documents) == 1 + sum(map(len, lines)) // 2**18
    assert "".join(document.text for document in documents) == "".join(lines)
    assert all(document.text.endswith("\n") and len(document.text) <= 2**18 for document in documents)
    assert len({document.name for document in documents}) == len(documents)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_pieces(chunk):
    text = "a line\n" * 20 + "y" * 50 + "\nend"
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    found = list(pieces(chunks, 16))
    assert found == [*["a line\na line\n"] * 10, *["y" * 16] * 3, "yy\nend"] and "".join(found) == text


def test_ranks_depend_on_the_text_alone_and_are_spread():
    ranks = [text_rank(str(number)) for number in range(2000)]
    assert text_rank("7") == ranks[7]
    assert abs(sum(rank < 0.1 for rank in ranks) / 2000 - 0.1) < 0.03
    assert all(0 <= rank < 1 for rank in ranks)


@pytest.mark.parametrize(("path", "words"), [("nowhere", "does not exist"), ("*.none", "matches no file")])
def test_missing_paths(tmp_path, path, words):
    with pytest.raises(DataError, match=words):
        find_files([str(tmp_path / path)])


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="No files were found"):
        find_files([str(tmp_path)])
