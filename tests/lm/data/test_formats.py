"""Every format and compression gives the same documents; damage is named and what came before it is used."""

import csv
import gzip
import json
import sys
import types

import pytest
import zstandard

from fastattn.errors import DataError, InputError
from fastattn.lm.data import find_sources, read_documents
from fastattn.lm.data.formats import ReadOptions
from fastattn.lm.data.sources import HubData

TEXTS = ['first, with "quotes"', "second\nof two lines", "naïve → 日本"]


def read(paths, **options):
    """The texts in ``paths``, and the reasons for what was skipped."""
    skipped = []
    documents = list(read_documents(paths, skipped, ReadOptions(**options)))
    return [document.text for document in documents], [skip.reason for skip in skipped]


def json_lines(texts):
    return "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)).encode()


def table(texts, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    return path


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_formats_and_compressions(tmp_path, suffix, compression):
    data = table(TEXTS, tmp_path / "table").read_bytes() if suffix == ".csv" else json_lines(TEXTS)
    expected = TEXTS
    if suffix == ".txt":
        data, expected = "\n".join(TEXTS).encode(), ["\n".join(TEXTS)]
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](data))
    assert read([path]) == (expected, [])


def test_frames_and_members_one_after_another(tmp_path):
    for suffix, compress in list(COMPRESSIONS.items())[1:]:
        path = tmp_path / f"data.jsonl{suffix}"
        path.write_bytes(compress(json_lines(TEXTS[:1])) + compress(json_lines(TEXTS[1:])))
        assert read([path]) == (TEXTS, [])


def test_json_that_is_an_array_and_json_that_is_text(tmp_path):
    array, other = tmp_path / "array.json", tmp_path / "other.json"
    array.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    other.write_text('{\n "name": "fastattn"\n}')
    assert read([array, other]) == ([*TEXTS, '{\n "name": "fastattn"\n}'], [])


def test_tables_of_glue(tmp_path):
    """TSV has no quotes; CoLA's has no header, QQP's text stands in two columns."""
    path = tmp_path / "dev.tsv"
    path.write_text('gj04\t1\t\tThe "sailors rode.\ngj05\t0\t\tHe runned.\n')
    assert read([path], fields=("4",)) == (['The "sailors rode.', "He runned."], [])
    path.write_text("id\tquestion1\tquestion2\n7\tWhy?\tHow?\n8\tWhen?\n")
    texts, reasons = read([path], fields=("question1", "question2"))
    assert texts == ["Why?\nHow?"]
    assert reasons == ["1 records, the first at row 3: 2 columns where the header has 3"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": \n[1]\n{"body": 1}\n', "3 records, the first at line 2: not JSON"),
        ("b.jsonl", b'{"body": "x", "id": 1}\n', "no field 'text' among body, id; choose with --field"),
        ("c.csv", b"a,b\n1,2\n", "no field 'text' among a, b"),
        ("d.gz", gzip.compress(b"x" * 9999, mtime=0)[:-20], "damaged"),
        ("e.gz", b"no gzip at all", "damaged"),
        ("f.zst", zstandard.ZstdCompressor().compress(b"x" * 9999)[:-3], "damaged.*ends before the end"),
        ("g.zst", b"no zstd at all", "damaged.*not Zstandard"),
        ("h.txt", b"text\x00text", "binary"),
        ("i.txt", "текст на русском".encode("koi8-r"), "neither UTF-8 nor Windows-1252; name its encoding"),
        ("j.txt", b"\xff\xfeodd", "not in the encoding of its byte order mark"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 8 else "",
)
def test_damage_is_named_and_never_fatal(tmp_path, name, content, words):
    import re

    path, good = tmp_path / name, tmp_path / "z.txt"
    path.write_bytes(content)
    good.write_text("good")
    texts, reasons = read([path, good])
    assert texts[-1] == "good" and len(reasons) == 1 and re.search(words, reasons[0]), reasons


def test_what_comes_before_the_damage_is_used(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(str(n) * 400_000 for n in range(1, 4)))[:-40])
    texts, (reason,) = read([path])
    assert len(texts) == 2 and reason.endswith("; the 2 documents before that are used")


def test_an_encoding_that_python_does_not_know():
    with pytest.raises(InputError, match="encoding: got 'klingon'; allowed: an encoding that Python knows"):
        ReadOptions(encoding="klingon")


def test_encodings(tmp_path):
    text = "Überall ist es naïv, und das ist gut so."
    for number, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")):
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    assert read(find_sources([str(tmp_path)])) == ([text] * 5, [])
    (tmp_path / "0.txt").write_bytes("текст".encode("koi8-r"))
    assert read([tmp_path / "0.txt"], encoding="koi8-r") == (["текст"], [])
    assert "not ascii" in read([tmp_path / "1.txt"], encoding="ascii")[1][0]


def test_memory_does_not_grow_with_a_file(tmp_path):
    """A file of 16 MB, read with less than half of that held at any time."""
    import tracemalloc

    path = tmp_path / "large.jsonl.gz"
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(16):
            file.write(line * 1000)
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path], []))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 16_000 and peak < 8e6


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package ``datasets``; returns the arguments it was called with."""
    calls = []

    def load_dataset(name, config=None, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "broken":
            raise ConnectionError("no network")
        return iter([{"text": text, "label": 0} for text in TEXTS])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_data_sets_of_the_hub(hub, tmp_path):
    (tmp_path / "own.txt").write_text("own")
    sources = find_sources(["hf:allenai/c4:en", str(tmp_path), "hf:nyu-mll/glue:sst2:validation", "hf:imdb:test"])
    texts, reasons = read(sources)
    assert texts == ["own", *TEXTS, *TEXTS, *TEXTS] and not reasons
    assert hub == [("allenai/c4", "en", "train", True), ("nyu-mll/glue", "sst2", "validation", True),
                   ("imdb", None, "test", True)]  # fmt: skip
    assert "no field 'sentence' among text, label" in read([HubData("imdb")], fields=("sentence",))[1][0]
    with pytest.raises(DataError, match="hf:broken:train cannot be read: ConnectionError: no network"):
        read([HubData("broken")])


def test_a_hub_that_is_not_installed_and_names_that_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets': pip install datasets"):
        read([HubData("imdb")])
    for name in ("hf:", "hf:a::b", "hf:a:b:c:d"):
        with pytest.raises(DataError, match="names no data set: write hf:NAME"):
            find_sources([name])


def test_zstandard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    assert read([tmp_path / "a.zst"]) == ([], ["needs the package 'zstandard': pip install zstandard"])
