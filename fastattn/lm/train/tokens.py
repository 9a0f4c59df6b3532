"""The tokenizer and the memory-mapped token files of a corpus; ``prepare.py`` makes them.

A corpus is a folder: ``tokenizer.json``, ``corpus.json`` and for each of the splits "train" and "held_out" the tokens
end to end (``.tokens``, uint16 or uint32) and where each document begins and the last one ends (``.offsets``, int64).
A document is ``<|start|> text <|end|>``; a tokenizer from elsewhere has other names for these two
(``special_tokens.py``). Special tokens in the text itself are encoded as ordinary characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastattn.errors import DataError, input_error
from fastattn.files import read_limited

START, END = "<|start|>", "<|end|>"
SPLITS = ("train", "held_out")
FORMAT = "fastattn-corpus-2"
Algorithm = Literal["bpe", "unigram"]
TOKENIZER_SAMPLE = 1 << 26  # characters from which the vocabulary is learned


@dataclass(frozen=True)
class CorpusFacts:
    """The content of ``corpus.json``.

    Attributes:
        key: of the files and the settings it was made from.
        fingerprint: of the documents in it.
        vocab_size: of its tokenizer.
        documents: in each split, as are the next two.
        tokens: with the special tokens around documents.
        text_bytes: in UTF-8.
        skipped: files that could not be used.
        format: of the folder.
    """

    key: str
    fingerprint: str
    vocab_size: int
    documents: dict[str, int]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    skipped: list[dict[str, str]]
    format: str = FORMAT


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk."""

    folder: Path
    facts: CorpusFacts

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open a corpus folder; raises DataError if it is not one or is damaged."""
        try:
            content = json.loads(read_limited(folder / "corpus.json"))
            if content["format"] != FORMAT:
                raise DataError(f"{folder} has format {content['format']!r}, not {FORMAT!r}: remove it and run again.")
            facts = CorpusFacts(**content)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{folder} is not a corpus of fastattn ({error}): remove it and run again.") from error
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
        """Number of occurrences of each token."""
        total = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            total += np.bincount(self.tokens[start : start + (1 << 24)], minlength=vocab_size)
        return total


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` of any origin, to encode whole texts, special tokens in them as ordinary characters.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        tokenizer = Tokenizer.from_str(read_limited(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a readable tokenizer ({error}).") from error
    tokenizer.no_truncation()  # which files from elsewhere may ask for
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is what a model needs, even where some ids below it are not used."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_held_out(part: float) -> None:
    """Raise InputError unless ``part`` of the data can be held out."""
    if not 0.0 < part < 1.0:
        raise input_error("held_out", part, "a fraction between 0 and 1", "0.05 holds out one document in twenty.")


def check_vocabulary_size(size: int) -> None:
    """Raise InputError if ``size`` does not hold every byte and two special tokens."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len((START, END))
    if size < smallest:
        raise input_error("vocab_size", size, f"at least {smallest}", "It holds every byte and two special tokens.")


def check_algorithm(name: str) -> None:
    """Raise InputError unless ``train_tokenizer`` knows the algorithm."""
    if name not in get_args(Algorithm):
        raise input_error("algorithm", repr(name), ", ".join(get_args(Algorithm)), "bpe is that of GPT-2 and Llama 3.")


def train_tokenizer(texts: Iterable[str], vocab_size: int, algorithm: Algorithm = "bpe") -> Tokenizer:
    """Learn a vocabulary over bytes: every text can be encoded, and decodes to itself.

    Args:
        texts: to learn from; the first 64 Mi characters are used.
        vocab_size: wanted size, at least 258: the bytes and two special tokens. A small text may give fewer.
        algorithm: "bpe" merges frequent pairs; "unigram" keeps the pieces that make the text likeliest, as
            SentencePiece does.

    Raises:
        InputError: ``vocab_size`` is too small, or ``algorithm`` unknown.

    Source:
        Sennrich et al., "Neural machine translation of rare words with subword units", 2016; bytes as in GPT-2. Kudo,
        "Subword regularization", 2018.
    """
    check_vocabulary_size(vocab_size)
    check_algorithm(algorithm)
    options: dict[str, Any] = {
        "vocab_size": vocab_size, "special_tokens": [START, END], "show_progress": False,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    }  # fmt: skip
    trainer: trainers.BpeTrainer | trainers.UnigramTrainer
    if algorithm == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
    else:
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_first_characters(texts, TOKENIZER_SAMPLE), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
