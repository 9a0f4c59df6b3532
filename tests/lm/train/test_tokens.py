"""Tokenising: round trips, the split, the cache by content, damage, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastattn.errors import DataError, InputError
from fastattn.lm.data import find_files, read_documents
from fastattn.lm.data.formats import pieces
from fastattn.lm.train import prepare as prepare_module
from fastattn.lm.train.prepare import prepare
from fastattn.lm.train.tokens import END, START, Corpus, load_tokenizer, token_dtype, train_tokenizer, vocabulary_size


def documents_of(corpus, split):
    """The texts that a split holds, decoded."""
    tokenizer, file = corpus.tokenizer(), corpus.split(split)
    found = []
    for begin, end in zip(file.offsets[:-1], file.offsets[1:], strict=True):
        ids = file.tokens[begin:end].tolist()
        assert (tokenizer.id_to_token(ids[0]), tokenizer.id_to_token(ids[-1])) == (START, END)
        found.append(tokenizer.decode(ids[1:-1], skip_special_tokens=False))
    return found


def test_every_document_is_there_once(corpus, texts):
    documents = [document.text for document in read_documents(find_files([str(texts)]), [])]
    written = sorted(piece for text in documents for piece in pieces([text], max(256, sum(map(len, documents)) // 64)))
    train, held_out = documents_of(corpus, "train"), documents_of(corpus, "held_out")
    assert sorted(train + held_out) == written
    assert train and held_out and not set(train) & set(held_out)
    facts = corpus.facts
    assert facts.text_bytes["train"] == sum(len(text.encode()) for text in train)
    assert facts.documents == {"train": len(train), "held_out": len(held_out)}


def test_special_tokens_in_the_text_are_ordinary_characters(corpus):
    tokenizer = corpus.tokenizer()
    ids = tokenizer.encode(f"a{END}b").ids
    assert tokenizer.token_to_id(END) not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{END}b"


def test_any_text_comes_back(corpus):
    tokenizer = corpus.tokenizer()
    text = "".join(map(chr, range(1, 300))) + "𝔘 🎉\r\n\t end"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_training_a_tokenizer_is_deterministic(texts):
    words = [document.text for document in read_documents(find_files([str(texts)]), [])]
    assert train_tokenizer(words, 290).to_str() == train_tokenizer(words, 290).to_str()


def test_the_cache_goes_by_content(texts, tmp_path, monkeypatch):
    files = find_files([str(texts)])
    first = prepare(files, tmp_path, vocab_size=280, progress=False)
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert prepare(files, tmp_path, vocab_size=280, progress=False) == first
    monkeypatch.undo()
    assert prepare(files, tmp_path, vocab_size=281, progress=False).folder != first.folder
    copy = tmp_path / "copy"
    shutil.copytree(texts, copy)
    (copy / "file01.txt").write_text("other text")
    assert prepare(find_files([str(copy)]), tmp_path, vocab_size=280, progress=False).folder != first.folder


def test_a_single_file_is_split_too(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {number}\n" for number in range(5000)))
    corpus = prepare([path], tmp_path / "corpora", vocab_size=300, progress=False)
    assert corpus.facts.documents["held_out"] >= 1
    assert corpus.facts.tokens["held_out"] < 0.3 * corpus.facts.tokens["train"]


def test_skipped_files_are_in_the_facts(texts, tmp_path):
    (tmp_path / "bad").write_bytes(b"\0")
    corpus = prepare([*find_files([str(texts)]), tmp_path / "bad"], tmp_path / "c", vocab_size=280, progress=False)
    assert corpus.facts.skipped == [{"name": str(tmp_path / "bad"), "reason": "binary (it holds zero bytes)"}]


def test_large_vocabularies_get_wide_tokens():
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32


def test_an_empty_corpus(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(DataError, match="The corpus is empty: none of 1 files holds text"):
        prepare([tmp_path / "a"], tmp_path / "c", vocab_size=300, progress=False)


def test_a_corpus_of_one_document(tmp_path):
    (tmp_path / "a").write_text("hello")
    with pytest.raises(DataError, match=r"too small: 1 document\(s\), 5 characters"):
        prepare([tmp_path / "a"], tmp_path / "c", vocab_size=300, progress=False)
    assert not list((tmp_path / "c").glob("*/*"))


def test_unigram_decodes_to_the_text_too():
    code = Path(json.__file__).read_text()
    tokenizer = train_tokenizer([code], 400, "unigram")
    assert tokenizer.get_vocab_size() == 400 and tokenizer.token_to_id(START) == 0
    text = code + " 日本 never seen \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(code).ids) < 0.6 * len(code)
    with pytest.raises(InputError, match="algorithm: got 'wordpiece'; allowed: bpe, unigram"):
        train_tokenizer([code], 400, "wordpiece")


def test_files_that_change_while_they_are_read(texts, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(texts, copy)
    real = prepare_module.corpus_key

    def change(*args, **options):
        found = real(*args, **options)
        (copy / "file01.txt").write_text("changed in between")
        return found

    monkeypatch.setattr(prepare_module, "corpus_key", change)
    with pytest.raises(DataError, match="changed while they were read"):
        prepare(find_files([str(copy)]), tmp_path / "c", vocab_size=300, progress=False)
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize(("options", "words"), [({"vocab_size": 257}, "vocab_size: got 257; allowed: at least 258"),
                                                ({"held_out": 1.0}, "held_out: got 1.0")])  # fmt: skip
def test_refusals(texts, tmp_path, options, words):
    with pytest.raises(InputError) as error:
        prepare(find_files([str(texts)]), tmp_path, **({"vocab_size": 300, "progress": False} | options))
    assert words in str(error.value)


@pytest.mark.parametrize("damage", ["truncate", "remove tokens", "no facts", "other format"])
def test_damage_is_named(corpus, tmp_path, damage):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    if damage == "truncate":
        with (folder / "train.tokens").open("r+b") as file:
            file.truncate(10)
    elif damage == "remove tokens":
        (folder / "train.tokens").unlink()
    elif damage == "no facts":
        (folder / "corpus.json").write_text("{")
    else:
        facts = json.loads((folder / "corpus.json").read_text())
        (folder / "corpus.json").write_text(json.dumps(facts | {"format": "other"}))
    with pytest.raises(DataError, match="run again"):
        Corpus.open(folder).split("train")


def test_a_foreign_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_tokenizer(path)
    from tokenizers import Tokenizer, models

    foreign = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    foreign.enable_truncation(3)
    foreign.enable_padding(length=9)
    path.write_text(foreign.to_str())
    loaded = load_tokenizer(path)
    assert loaded.truncation is None and loaded.padding is None and loaded.encode_special_tokens
    assert vocabulary_size(loaded) == 8 > loaded.get_vocab_size()
    assert vocabulary_size(Tokenizer(models.BPE())) == 0
