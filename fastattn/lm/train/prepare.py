"""From files to a corpus: clean documents, a tokenizer learned from them, token files. ``fastattn prepare`` calls it.

The sources are read once, in shards, and a run that was killed keeps those that it had finished. The documents that
are kept are spooled to the disk, so that memory does not depend on the size of the corpus. The folder appears when it
is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.files import new_folder, only_writer
from fastattn.lm.data import Cleaning, Document, Report, text_rank
from fastattn.lm.data.engines import Pool
from fastattn.lm.data.formats import LONGEST_PIECE, ReadOptions, pieces
from fastattn.lm.data.pipeline import VERSION, Examined, examined, keep_documents
from fastattn.lm.data.shards import Work, examined_shards, find_shards, first_documents, shard_folder, size_of
from fastattn.lm.data.sources import Skipped, Source, read_sources
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tiktoken import is_tiktoken, load_tiktoken
from fastattn.lm.train.tokens import (
    FORMAT,
    SPLITS,
    TOKENIZER_SAMPLE,
    Algorithm,
    Corpus,
    CorpusFacts,
    check_algorithm,
    check_held_out,
    load_tokenizer,
    token_dtype,
    train_tokenizer,
    vocabulary_size,
)  # fmt: skip

_BATCH = 1 << 20  # characters encoded at a time
_LARGEST_PART = 1 / 16  # a corpus in which a document is more than this is cut
_PIECES = 64  # into about this many parts
_SHORTEST_PIECE = 256
Stamp = tuple[int, int]  # size and time of a file


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of a corpus.

    Attributes:
        read: fields and encoding of the files.
        cleaning: what is done to documents; the default leaves them as they are.
        vocab_size: as in ``train_tokenizer``, which learns from training documents.
        algorithm: as in ``train_tokenizer``.
        tokenizer: a ``tokenizer.json`` of any origin, a folder with one, or a tiktoken file, instead of learning one.
        held_out: part of the documents that is held out, chosen by the hash of their text; at least one is.
        max_documents: stop after so many documents; None reads all.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    cleaning: Cleaning = field(default_factory=Cleaning.none)
    vocab_size: int = 4096
    algorithm: Algorithm = "bpe"
    tokenizer: Path | None = None
    held_out: float = 0.05
    max_documents: int | None = None

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        check_algorithm(self.algorithm)
        if self.max_documents is not None and self.max_documents < 2:
            raise input_error("max_documents", self.max_documents, "at least 2, or None", "One of them is held out.")

    def load_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        path = self.tokenizer
        if is_tiktoken(path):
            tokenizer = load_tiktoken(path)
        else:
            tokenizer = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
        SpecialTokens.of(tokenizer)  # says at once if it has none
        return tokenizer

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokenizer": None if self.tokenizer is None else str(self.tokenizer)}


def prepare(
    sources: Sequence[Source],
    folder: Path,
    *,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    held_out: float = 0.05,
    progress: bool = True,
) -> Corpus:
    """Tokenise documents without cleaning into a folder below ``folder``, or reuse the folder of an earlier run.

    Args:
        sources: from ``find_sources`` or ``find_files``.
        folder: where corpora are kept, each under the hash of its files and of the arguments.
        vocab_size: see ``PrepareConfig``.
        tokenizer: see there.
        held_out: see there.
        progress: show progress bars.

    Raises:
        DataError: no text, only one document, the disk is full, or another process is making this very corpus.
        InputError: ``vocab_size`` or ``held_out`` is out of range.
    """
    config = PrepareConfig(vocab_size=vocab_size, tokenizer=tokenizer, held_out=held_out)
    stamps = _stamps(sources)
    key = corpus_key(sources, config, progress=progress)
    path = folder / key[:16]
    return (
        Corpus.open(path)
        if path.exists()
        else _make(sources, stamps, path, config, key, pool=Pool(), progress=progress)
    )


def prepare_at(
    sources: Sequence[Source], path: Path, config: PrepareConfig, *, pool: Pool | None = None, progress: bool = True
) -> Corpus:
    """The corpus of ``sources`` in the folder ``path``, which is made unless it holds this very corpus already.

    Args:
        sources: from ``find_sources``.
        path: of the corpus.
        config: how it is made.
        pool: where documents are cleaned, from ``fastattn.lm.data.engines.started``; None is this process. It does not
            change the corpus.
        progress: show progress bars.

    Raises:
        DataError: ``path`` holds something else, another process is making it, and as in ``prepare``.
    """
    stamps = _stamps(sources)
    key = corpus_key(sources, config, progress=progress)
    if not path.exists():
        return _make(sources, stamps, path, config, key, pool=pool or Pool(), progress=progress)
    if (path / "corpus.json").is_file():
        corpus = Corpus.open(path)
        if corpus.facts.key == key:
            return corpus
        raise DataError(f"{str(path)!r} holds a corpus of other files or settings: remove it, or choose another --out.")
    raise DataError(f"{str(path)!r} exists and is not a corpus of fastattn: choose another --out.")


def corpus_key(sources: Sequence[Source], config: PrepareConfig, *, progress: bool = False) -> str:
    """A hash of the content of the files, of the names of data sets, and of all settings that affect the corpus."""
    tokenizer = config.load_tokenizer()
    here = dataclasses.replace(config, cleaning=config.cleaning.here()).to_dict()
    here["tokenizer"] = tokenizer.to_str() if tokenizer else None
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, here]).encode())
    with _bar("files", size_of(sources), progress) as bar:
        for source in sources:
            name = "".join(source.suffixes[-2:]) if isinstance(source, Path) else str(source)
            digest.update(f"\0{name}\0".encode())
            if isinstance(source, Path):
                with contextlib.suppress(OSError), source.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                    bar.update(file.tell())
    return digest.hexdigest()


def _bar(what: str, size: int, progress: bool) -> tqdm:
    return tqdm(total=size or None, unit="B", unit_scale=True, desc=what, disable=not progress)


@dataclass
class _Spool:
    """The documents that are kept, on the disk, and what is known of all of them together."""

    path: Path
    documents: int = 0
    characters: int = 0
    longest: int = 0
    fingerprint: str = ""

    def fill(self, documents: Iterable[Document]) -> None:
        digest = hashlib.sha256()
        with self.path.open("wb") as file:
            for document in documents:
                data = document.text.encode()
                record = len(data).to_bytes(8, "little") + data
                file.write(record)
                digest.update(record)
                self.documents += 1
                self.characters += len(document.text)
                self.longest = max(self.longest, len(document.text))
        self.fingerprint = digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """The documents; where one is much of the corpus, all are cut at line ends, so that a part can be held out."""
        longest = LONGEST_PIECE
        if self.longest > _LARGEST_PART * self.characters:
            longest = min(max(self.characters // _PIECES, _SHORTEST_PIECE), longest)
        with self.path.open("rb") as file:
            while length := file.read(8):
                text = file.read(int.from_bytes(length, "little")).decode()
                yield from pieces([text], longest)


def _make(
    sources: Sequence[Source],
    stamps: list[Stamp],
    path: Path,
    config: PrepareConfig,
    key: str,
    *,
    pool: Pool,
    progress: bool,
) -> Corpus:
    report = Report(settings=config.cleaning.here().to_dict())
    with only_writer(path), shard_folder(path, key) as shards, new_folder(path, alone=False) as folder:
        work = folder / "work"
        work.mkdir()
        spool = _Spool(work / "spool")
        with _bar("documents", size_of(sources), progress) as bar:
            found = first_documents(_examined(sources, config, shards, pool, bar.update), config.max_documents)
            spool.fill(keep_documents(found, report, work))
        if _stamps(sources) != stamps:
            raise DataError("The files changed while they were read: run again when nothing writes to them.")
        split = _Split.of_corpus(spool, report, config.held_out, len(sources))
        tokenizer = config.load_tokenizer() or train_tokenizer(
            _sample(spool, split), config.vocab_size, config.algorithm
        )
        facts = _write_tokens(folder, spool, tokenizer, split, progress)
        _write_json(folder / "corpus.json", asdict(CorpusFacts(key=key, skipped=_skipped(report), **facts)))
        _write_json(folder / "report.json", report.to_dict() | {"made": config.to_dict()})
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        shutil.rmtree(work)
    return Corpus.open(path)


def _examined(
    sources: Sequence[Source], config: PrepareConfig, folder: Path, pool: Pool, advance: Callable[[int], object]
) -> Iterator[Examined | Skipped]:
    """All documents, examined: shard by shard in ``folder``, or on the way if there is nothing to examine."""
    work = Work(Path.cwd(), config.read, config.cleaning.here(), config.max_documents)
    if config.cleaning == Cleaning.none():
        return examined(read_sources(sources, config.read, advance), work.cleaning)
    return examined_shards(find_shards(sources), work, folder, pool, advance)


def _stamps(sources: Iterable[Source]) -> list[Stamp]:
    """Size and time of modification, which tell that a file was written to."""
    stats = (path.stat() for path in sources if isinstance(path, Path) and path.is_file())
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _skipped(report: Report) -> list[dict[str, str]]:
    return [asdict(skip) for skip in report.skipped]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Split:
    """Documents of the rank ``threshold`` or a lower one are held out."""

    threshold: float

    @classmethod
    def of_corpus(cls, spool: _Spool, report: Report, held_out: float, files: int) -> _Split:
        """Hold out a part, and one document at least; raises DataError where nothing is left to train on."""
        ranks = [math.inf, -math.inf]
        for text in spool.texts():
            rank = text_rank(text)
            ranks = [min(ranks[0], rank), max(ranks[1], rank)]
        if not spool.documents:
            reasons = [f"{rule} dropped {count}" for rule, count in report.dropped.most_common(3)]
            reasons += [f"{skip.name}: {skip.reason}" for skip in report.skipped[:3]]
            what = f"of {report.read} documents none was kept" if report.read else f"none of {files} files holds text"
            hint = " Turn off a rule with --without." if report.dropped else ""
            raise DataError(f"The corpus is empty: {what} ({'; '.join(reasons)}).{hint}")
        split = cls(max(held_out, ranks[0]))
        if ranks[1] <= split.threshold:
            raise DataError(
                f"The corpus is too small: {spool.documents} document(s), {spool.characters} characters, "
                "of which one must be held out; give more text with --data."
            )
        return split

    def of(self, text: str) -> str:
        return "held_out" if text_rank(text) <= self.threshold else "train"


def _sample(spool: _Spool, split: _Split) -> Iterator[str]:
    """Training documents to learn the vocabulary from: all of them, or an even choice of about the sample's size."""
    part = min(1.0, TOKENIZER_SAMPLE / spool.characters)
    for text in spool.texts():
        rank = (text_rank(text) - split.threshold) / (1 - split.threshold)
        if 0 < rank <= part:
            yield text


@dataclass
class _Output:
    """The token file of a split as it grows, and where its documents begin."""

    tokens: BinaryIO
    offsets: BinaryIO
    documents: int = 0
    length: int = 0
    text_bytes: int = 0

    def add(self, ids: np.ndarray, text: str) -> None:
        self.tokens.write(ids.tobytes())
        self.documents += 1
        self.length += len(ids)
        self.text_bytes += len(text.encode())
        self.offsets.write(np.int64(self.length).tobytes())


def _write_tokens(folder: Path, spool: _Spool, tokenizer: Tokenizer, split: _Split, progress: bool) -> dict[str, Any]:
    special, vocab_size = SpecialTokens.of(tokenizer), vocabulary_size(tokenizer)
    dtype = token_dtype(vocab_size)
    bar = tqdm(total=spool.characters, unit="char", unit_scale=True, desc="tokens", disable=not progress)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)

        def opened(name: str) -> BinaryIO:
            return stack.enter_context((folder / name).open("wb"))

        outputs = {name: _Output(opened(f"{name}.tokens"), opened(f"{name}.offsets")) for name in SPLITS}
        for output in outputs.values():
            output.offsets.write(np.int64(0).tobytes())
        for batch in _batches(spool.texts()):
            encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                outputs[split.of(text)].add(np.array([*special.opening(), *encoding.ids, special.end], dtype), text)
                bar.update(len(text))
    return {
        "fingerprint": spool.fingerprint,
        "vocab_size": vocab_size,
        "documents": {name: output.documents for name, output in outputs.items()},
        "tokens": {name: output.length for name, output in outputs.items()},
        "text_bytes": {name: output.text_bytes for name, output in outputs.items()},
    }


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about ``_BATCH`` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
