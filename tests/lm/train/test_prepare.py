"""From raw files to a corpus: the report beside it, the cache, what is refused, and the command itself."""

import json
import random
import re
import subprocess
import sys
import tracemalloc

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastattn.cli import main
from fastattn.errors import DataError, InputError
from fastattn.lm.data import Cleaning, find_sources, formats
from fastattn.lm.data.formats import ReadOptions
from fastattn.lm.train import prepare as module
from fastattn.lm.train.prepare import PrepareConfig, prepare_at
from fastattn.lm.train.tokens import Corpus

WORDS = ["river", "stone", "bridge", "water", "market", "village", "garden", "window", "letter", "music", "winter"]
WORDS += ["summer", "paper", "table", "kitchen", "doctor", "teacher", "engine", "railway", "picture", "machine"]


def record(number):
    """Prose of a hundred words, different for each number."""
    source = random.Random(number)
    lines = (" ".join(source.choices([*WORDS, "the", "and", "with", "of"], k=12)).capitalize() for _ in range(8))
    return f"Story number {number} of them. " + ". ".join(lines)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [{"body": record(n)} for n in range(60)] + [{"body": "short"}, {"body": record(3)}]
    lines[5]["body"] += " Write to bo@example.org."
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"bod')
    (folder / "b.csv").write_bytes(b"\x00\x01")
    return folder


CONFIG = PrepareConfig(ReadOptions(("body",)), Cleaning(), vocab_size=320, held_out=0.1)


def prepared(raw, out, config=CONFIG, **options):
    return prepare_at(find_sources([str(raw)]), out, config, progress=False, **options)


def test_a_corpus_and_its_report(raw, tmp_path):
    corpus = prepared(raw, tmp_path / "corpus")
    assert sum(corpus.facts.documents.values()) == 60
    tokenizer, file = corpus.tokenizer(), corpus.split("train")
    texts = [tokenizer.decode(file.tokens[a:b].tolist()) for a, b in zip(file.offsets, file.offsets[1:], strict=False)]
    texts.append(tokenizer.decode(corpus.split("held_out").tokens.tolist()))
    assert sum(text.count("Write to <EMAIL>.") for text in texts) == 1 and not any("bo@" in text for text in texts)
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert report["dropped"] == {"too-short": 1, "exact-duplicate": 1} and report["masked"] == {"email": 1}
    assert report["made"]["held_out"] == 0.1 and report["settings"]["duplicates"] == "near"
    skipped = {skip["name"].rpartition("/")[2]: skip["reason"] for skip in corpus.facts.skipped}
    assert skipped["a.jsonl"].startswith("1 records, the first at line 63: not JSON") and "b.csv" in skipped
    assert {path.name for path in corpus.folder.iterdir()} == {
        "corpus.json", "report.json", "tokenizer.json", "train.tokens", "train.offsets", "held_out.tokens",
        "held_out.offsets",
    }  # fmt: skip


def test_it_is_made_once(raw, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    first = prepared(raw, out)
    monkeypatch.setattr(module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert prepared(raw, out) == first
    changed = PrepareConfig(CONFIG.read, Cleaning(duplicates="exact"), vocab_size=320, held_out=0.1)
    with pytest.raises(DataError, match="holds a corpus of other files or settings: remove it, or choose another"):
        prepared(raw, out, changed)
    with pytest.raises(DataError, match="exists and is not a corpus of fastattn"):
        prepared(raw, raw)


def test_a_failure_leaves_nothing_and_touches_nobody(raw, tmp_path, monkeypatch):
    other = tmp_path / ".unfinished-other-1234"
    other.mkdir()
    monkeypatch.setattr(module, "train_tokenizer", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(DataError, match="the disk is full"):
        prepared(raw, tmp_path / "corpus")
    assert {path.name for path in tmp_path.iterdir()} == {"raw", other.name}


LOCKED = """
import sys, time
from pathlib import Path
from fastattn.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(raw, tmp_path):
    out = tmp_path / "corpus"
    leftover = tmp_path / ".unfinished-corpus-00000000"  # what the other process has written so far
    leftover.mkdir()
    other = subprocess.Popen([sys.executable, "-c", LOCKED, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(DataError, match=r"Another process is writing .*corpus: wait until it is done, or choose"):
            prepared(raw, out)
        assert leftover.exists() and not out.exists()
        prepared(raw, tmp_path / "elsewhere")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    prepared(raw, out)
    assert Corpus.open(out).facts.documents["train"] > 0
    assert not leftover.exists()


def test_a_tokenizer_of_another_corpus(raw, tmp_path):
    first = prepared(raw, tmp_path / "first")
    for given in (tmp_path / "first", tmp_path / "first" / "tokenizer.json"):
        config = PrepareConfig(CONFIG.read, Cleaning(), tokenizer=given, max_documents=20)
        corpus = prepared(raw, tmp_path / f"by-{given.name}", config)
        assert corpus.tokenizer().to_str() == first.tokenizer().to_str()
        assert sum(corpus.facts.documents.values()) == 20
    with pytest.raises(DataError, match="not a readable tokenizer"):
        prepared(raw, tmp_path / "x", PrepareConfig(tokenizer=raw))


def test_the_vocabulary_is_learned_from_all_over_a_large_corpus(raw, tmp_path, monkeypatch):
    seen = []
    real = module.train_tokenizer

    def train(texts, *options):
        seen.extend(texts)
        return real(seen, *options)

    monkeypatch.setattr(module, "train_tokenizer", train)
    monkeypatch.setattr(module, "TOKENIZER_SAMPLE", 60 * 400 // 4)
    prepared(raw, tmp_path / "corpus")
    numbers = [int(re.search(r"number (\d+)", text)[1]) for text in seen]
    assert 4 <= len(seen) <= 32 and min(numbers) < 20 and max(numbers) > 40


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """Python's own memory at its peak is the same for a corpus of six times the size."""
    monkeypatch.setattr(module, "_BATCH", 1 << 15)
    monkeypatch.setattr(formats, "_CHUNK", 1 << 14)
    (tmp_path / "words.txt").write_text("some words " * 99)
    tokenizer = prepared(tmp_path / "words.txt", tmp_path / "words", PrepareConfig(vocab_size=300)).folder
    peaks = []
    for documents in (120, 720):
        path = tmp_path / f"{documents}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{n} " + "word " * 400}) + "\n" for n in range(documents)))
        tracemalloc.start()
        prepared(path, tmp_path / str(documents), PrepareConfig(tokenizer=tokenizer))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_refusals(raw, tmp_path):
    with pytest.raises(DataError, match=r"of 62 documents none was kept \(.*too-short dropped 62.*--without"):
        prepared(raw, tmp_path / "a", PrepareConfig(CONFIG.read, Cleaning(min_words=5000)))
    with pytest.raises(
        DataError, match=r"none of 2 files holds text \(.*a.jsonl: 63 records.*no field 'text' among body"
    ):
        prepared(raw, tmp_path / "b", PrepareConfig(cleaning=Cleaning()))
    (tmp_path / "one.txt").write_text(record(1)[:250])
    with pytest.raises(DataError, match="too small: 1 document"):
        prepared(tmp_path / "one.txt", tmp_path / "c", PrepareConfig())
    with pytest.raises(InputError, match="max_documents: got 1"):
        PrepareConfig(max_documents=1)


def test_copies_alone_cannot_be_split(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "the same\n" * 9)
    with pytest.raises(DataError, match="too small: 9 document"):
        prepared(tmp_path / "a.csv", tmp_path / "c", PrepareConfig())


def test_the_command_and_training_on_what_it_made(raw, tmp_path, capsys):
    out = tmp_path / "corpus"
    command = ["prepare", "--data", str(raw), "--out", str(out), "--field", "body", "--vocab-size", "320", "--quiet"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for words in (
        r"documents read +62",
        r"dropped: too-short +1 ",
        r"masked: email +1",
        r"b\.csv: ",
        r"vocabulary: 320",
    ):
        assert re.search(words, text), words
    assert main(command) == 0 and capsys.readouterr().out == text
    run = ["train", "--out", str(tmp_path / "run"), "--quiet", "--device", "cpu"]
    small = ["--batch", "2", "--length", "16", "--eval-rows", "2", "--log-every", "1"]
    assert main([*run, "--corpus", str(out), "--steps", "2", *small]) == 0
    assert main([*run, "--resume", "--steps", "3"]) == 0
    assert not (tmp_path / "run" / "corpus").exists()
    capsys.readouterr()
    assert main([*run, "--corpus", str(out), "--vocab-size", "300"]) == 2
    assert "--corpus: got together with --vocab-size" in capsys.readouterr().err


def test_pieces_and_a_small_vocabulary_are_told(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("".join(record(n) + "\n" for n in range(9)))
    command = ["prepare", "--data", str(tmp_path / "one.txt"), "--out", str(tmp_path / "corpus"), "--raw", "--quiet"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"long documents were cut at line ends: 1 kept are (\d\d) pieces", text)
    assert re.search(r"vocabulary: \d{3} of 4,096, as the text has no more pieces that occur twice", text)


def t5_like(texts):
    """Pieces with their spaces; nothing begins a text."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return found


def bert_like(texts):
    """Lower case, and marks that the tokenizer itself would add."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=marks))
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found.enable_truncation(8)
    return found


@pytest.mark.parametrize(("make", "begin", "end"), [(t5_like, [], 1), (bert_like, [2], 3)])
def test_everything_with_a_tokenizer_from_elsewhere(make, begin, end, raw, tmp_path, capsys):
    tokenizer = make([record(n) for n in range(60)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = prepared(raw, tmp_path / "corpus", PrepareConfig(CONFIG.read, tokenizer=tmp_path / "tokenizer.json"))
    tokens, offsets = (getattr(corpus.split("train"), name) for name in ("tokens", "offsets"))
    first = tokens[offsets[0] : offsets[1]].tolist()
    assert first[: len(begin)] == begin and first[-1] == end and first.count(end) == 1 and len(first) > 100
    text = tokenizer.decode(first)
    assert text.lower().startswith("story number")
    run, quick = str(tmp_path / "run"), ["--quiet", "--device", "cpu", "--batch", "2", "--eval-rows", "2"]
    command = ["train", "--out", run, "--corpus", str(corpus.folder), "--steps", "2", "--length", "64", *quick]
    assert main(command) == 0
    prompt = "the river" if make is bert_like else "The river"
    generating = ["generate", "--checkpoint", run, "--prompt", prompt, "--temperature", "0", "--device", "cpu"]
    capsys.readouterr()
    assert main([*generating, "--tokens", "5"]) == 0
    told = capsys.readouterr().out.removesuffix("\n")
    assert told.startswith(prompt)
    examples = [{"words": ["the", "\u200b", "river"], "labels": ["O", "O", "B-x"]}, {"words": ["a"], "labels": ["O"]}]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples * 4))
    tuning = ["finetune", "--task", "tag", "--data", str(tmp_path / "tags.jsonl"), "--checkpoint", run, "--steps", "2"]
    assert main([*tuning, "--eval", str(tmp_path / "tags.jsonl"), "--out", str(tmp_path / "tags"), *quick]) == 0
    assert "held-out entity F1" in capsys.readouterr().out


def test_a_tokenizer_without_an_end_is_refused(raw, tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no token that ends a text: it should have .*</s>"):
        prepared(raw, tmp_path / "x", PrepareConfig(CONFIG.read, tokenizer=tmp_path / "tokenizer.json"))
    assert not (tmp_path / "x").exists()


def test_a_missing_ftfy_is_said(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    command = ["prepare", "--data", str(raw), "--out", str(tmp_path / "corpus"), "--field", "body", "--quiet"]
    assert main([*command, "--vocab-size", "300"]) == 0
    assert "mojibake was not repaired: the package 'ftfy' is missing" in capsys.readouterr().out


def test_settings_from_a_file(raw, tmp_path, capsys):
    path = tmp_path / "prepare.toml"
    path.write_text(
        f'data = ["{raw}"]\nout = "{tmp_path / "corpus"}"\nfield = ["body"]\nquality = false\nvocab-size = 300\n'
        'without = ["stop-words"]\nduplicates = "exact"\nmask-personal-data = "none"\nquiet = true\n'
    )
    assert main(["prepare", "--config", str(path), "--vocab-size", "310"]) == 0
    assert "vocabulary: 310" in capsys.readouterr().out
    assert sum(Corpus.open(tmp_path / "corpus").facts.documents.values()) == 61


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--raw", "--duplicates", "exact"], "--raw: got together with --duplicates"),
        (["--raw", "--without", "symbols"], "--raw: got together with --without"),
        (["--workers", "0"], "workers: got 0"),
        (["--without", "nice"], "without: got 'nice'; allowed: too-short"),
        (["--data", "hf:"], "names no data set"),
    ],
)
def test_bad_values(raw, tmp_path, capsys, flags, words):
    assert main(["prepare", "--data", str(raw), "--out", str(tmp_path / "corpus"), "--quiet", *flags]) == 2
    assert re.search(words, capsys.readouterr().err)
