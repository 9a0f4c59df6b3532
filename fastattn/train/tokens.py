"""From documents to a tokenizer and memory-mapped token files, cached by the content of the text.

A corpus is a folder: ``tokenizer.json``, ``corpus.json`` and for each of the splits "train" and "held_out" the tokens
end to end (``.tokens``, uint16 or uint32) and where each document begins and the last one ends (``.offsets``, int64).
A document is ``<|start|> text <|end|>``. Special tokens in the text itself are encoded as ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.files import new_folder
from fastattn.train.text import Document, Skipped, read_documents, text_rank

START, END = "<|start|>", "<|end|>"
SPLITS = ("train", "held_out")
_FORMAT = "fastattn-corpus-1"
_BATCH = 1 << 20  # characters encoded at a time
_TOKENIZER_SAMPLE = 1 << 26  # characters from which the vocabulary is learned


@dataclass(frozen=True)
class CorpusFacts:
    """What ``corpus.json`` says."""

    fingerprint: str
    vocab_size: int
    documents: dict[str, int]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    skipped: list[dict[str, str]]
    format: str = _FORMAT


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk."""

    folder: Path
    facts: CorpusFacts

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open a corpus folder; raises DataError if it is not one or is damaged."""
        try:
            facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder} is not a corpus of fastattn ({error}): remove it and run again.") from error
        if facts.format != _FORMAT:
            raise DataError(f"{folder} has format {facts.format!r}, not {_FORMAT!r}: remove it and run again.")
        return cls(folder, facts)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    def split(self, name: str) -> TokenFile:
        """The tokens of "train" or "held_out"."""
        return TokenFile.open(self.folder, name, self.facts)


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split, memory-mapped; document ``d`` is ``tokens[offsets[d] : offsets[d + 1]]``."""

    tokens: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, name: str, facts: CorpusFacts) -> TokenFile:
        dtype = token_dtype(facts.vocab_size)
        path = folder / f"{name}.tokens"
        try:
            tokens = np.memmap(path, dtype=dtype, mode="r")
            offsets = np.fromfile(folder / f"{name}.offsets", dtype=np.int64)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): remove {folder} and run again.") from error
        if len(tokens) != facts.tokens[name] or len(offsets) != facts.documents[name] + 1 or offsets[-1] != len(tokens):
            raise DataError(f"{path} is truncated: remove {folder} and run again.")
        return cls(tokens, offsets)

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs."""
        total = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            total += np.bincount(self.tokens[start : start + (1 << 24)], minlength=vocab_size)
        return total


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def read_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json`` of any origin; raises DataError if it is missing or damaged."""
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a readable tokenizer ({error}).") from error


def load_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``; raises DataError if it is missing, damaged or not one of fastattn's."""
    tokenizer = read_tokenizer(path)
    if any(tokenizer.token_to_id(token) is None for token in (START, END)):
        raise DataError(f"{path} has no {START} and {END} tokens: it was not made by fastattn train.")
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary: every text can be encoded, and decodes to itself.

    Args:
        texts: to learn from; the first 64 Mi characters are used.
        vocab_size: wanted size, at least 258: the bytes and two special tokens. A small text may give fewer.

    Raises:
        InputError: ``vocab_size`` is too small.

    Source:
        Sennrich et al., "Neural machine translation of rare words with subword units", 2016; bytes as in GPT-2.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len((START, END))
    if vocab_size < smallest:
        raise input_error("vocab_size", vocab_size, f"at least {smallest}", "It holds every byte and two marks.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first_characters(texts, _TOKENIZER_SAMPLE), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


@dataclass
class Survey:
    """What a first pass over the documents found."""

    fingerprint: str
    documents: int
    characters: int
    lowest_rank: float
    skipped: list[Skipped]


def survey(files: Sequence[Path]) -> Survey:
    """Read every document once; raises DataError if none holds text."""
    skipped: list[Skipped] = []
    found = Survey("", 0, 0, 1.0, skipped)
    digest = hashlib.sha256()
    for document in read_documents(files, skipped):
        found.documents += 1
        found.characters += len(document.text)
        found.lowest_rank = min(found.lowest_rank, text_rank(document.text))
        _add(digest, document)
    if not found.documents:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise DataError(f"The corpus is empty: none of {len(files)} files holds text ({reasons}).")
    found.fingerprint = digest.hexdigest()
    return found


def _add(digest: hashlib._Hash, document: Document) -> None:
    data = document.text.encode()
    digest.update(len(data).to_bytes(8, "little") + data)


def prepare(
    files: Sequence[Path], folder: Path, *, vocab_size: int, held_out: float = 0.05, progress: bool = True
) -> Corpus:
    """Tokenise the text of ``files`` into a folder below ``folder``, or find it there from an earlier run.

    Args:
        files: from ``find_files``.
        folder: where corpora are kept, each under the hash of its text and of the arguments.
        vocab_size: as in ``train_tokenizer``, which learns from the training documents.
        held_out: part of the documents that is held out, chosen by the hash of their text; at least one is.
        progress: show a progress bar.

    Raises:
        DataError: no text, only one document, or the disk is full.
        InputError: ``vocab_size`` or ``held_out`` is out of range.
    """
    if not 0.0 < held_out < 1.0:
        raise input_error("held_out", held_out, "a fraction between 0 and 1", "0.05 holds out one document in twenty.")
    found = survey(files)
    key = json.dumps([_FORMAT, found.fingerprint, vocab_size, held_out])
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if path.exists():
        return Corpus.open(path)
    writer = _Writer(files, found, max(held_out, found.lowest_rank), progress)
    tokenizer = train_tokenizer(writer.training_texts(), vocab_size)
    with new_folder(path) as unfinished:
        writer.write(unfinished, tokenizer)
    return Corpus.open(path)


@dataclass
class _Writer:
    """Encodes the documents of a survey."""

    files: Sequence[Path]
    survey: Survey
    threshold: float  # documents of this rank or a lower one are held out
    progress: bool
    offsets: dict[str, list[int]] = field(default_factory=lambda: {name: [0] for name in SPLITS})
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def training_texts(self) -> Iterator[str]:
        is_empty = True
        for document in read_documents(self.files, []):
            if self._split(document) == "train":
                is_empty = False
                yield document.text
        if is_empty:
            raise DataError(
                f"The corpus is too small: {self.survey.documents} document(s), {self.survey.characters} characters, "
                "of which one must be held out; give more text with --data."
            )

    def _split(self, document: Document) -> str:
        return "held_out" if text_rank(document.text) <= self.threshold else "train"

    def write(self, folder: Path, tokenizer: Tokenizer) -> None:
        vocab_size = tokenizer.get_vocab_size()
        digest = hashlib.sha256()
        bar = tqdm(total=self.survey.characters, unit="char", unit_scale=True, desc="tokens", disable=not self.progress)
        with bar, (folder / "train.tokens").open("wb") as train, (folder / "held_out.tokens").open("wb") as held_out:
            outputs = {"train": train, "held_out": held_out}
            for batch in _batches(read_documents(self.files, [])):
                self._encode(batch, tokenizer, outputs)
                for document in batch:
                    _add(digest, document)
                    bar.update(len(document.text))
        if digest.hexdigest() != self.survey.fingerprint:
            raise DataError("The files changed while they were read: run again when nothing writes to them.")
        for name in SPLITS:
            np.array(self.offsets[name], np.int64).tofile(folder / f"{name}.offsets")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        facts = CorpusFacts(
            fingerprint=self.survey.fingerprint,
            vocab_size=vocab_size,
            documents={name: len(self.offsets[name]) - 1 for name in SPLITS},
            tokens={name: self.offsets[name][-1] for name in SPLITS},
            text_bytes=self.text_bytes,
            skipped=[asdict(skip) for skip in self.survey.skipped],
        )
        (folder / "corpus.json").write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")

    def _encode(self, batch: list[Document], tokenizer: Tokenizer, outputs: Mapping[str, BinaryIO]) -> None:
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        dtype = token_dtype(tokenizer.get_vocab_size())
        encodings = tokenizer.encode_batch([document.text for document in batch])
        for document, encoding in zip(batch, encodings, strict=True):
            split = self._split(document)
            ids = np.array([start, *encoding.ids, end], dtype)
            outputs[split].write(ids.tobytes())
            self.offsets[split].append(self.offsets[split][-1] + len(ids))
            self.text_bytes[split] += len(document.text.encode())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about ``_BATCH`` characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
