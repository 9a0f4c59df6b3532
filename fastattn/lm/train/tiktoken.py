"""Tokenizers from tiktoken files: the tokens of a byte-level BPE in base64 and their ranks, a pair in each line.

The rank of a token is both its id and its priority in merging, so the merges follow from the ranks. The pattern that
splits a text before merging is not in the file; the number of tokens, which no two families share, tells it.
"""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fastattn.errors import DataError
from fastattn.files import read_lines

END = "<|endoftext|>"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s+(?!\S)|\s+"
_NEWLINES = r"\s*[\r\n]+|" + _REST
# By the number of tokens: r50k and p50k (GPT-2's), cl100k, Llama 3's, Qwen's (one digit at a time), o200k.
_GPT2 = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_REST}"
_CL100K = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_NEWLINES}"
_QWEN = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES}"
)
_PATTERNS = {50256: _GPT2, 50280: _GPT2, 151643: _QWEN, 199998: _O200K}


def is_tiktoken(path: Path) -> bool:
    """Whether a file is one of tiktoken by its name: ``*.tiktoken``, or ``tokenizer.model`` as Llama 3 has it."""
    return path.suffix == ".tiktoken" or path.name == "tokenizer.model"


def load_tiktoken(path: Path) -> Tokenizer:
    """The tokenizer of a tiktoken file, with one more token, ``<|endoftext|>``, after the others.

    Args:
        path: of the file.

    Raises:
        DataError: it is not such a file, or lacks the token of a byte.
    """
    ranks = _read(path)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path} has no token for the byte {missing[0]}, so it is not a byte-level vocabulary.")
    spelled = _spelling()
    vocab = {_spell(token, spelled): rank for token, rank in ranks.items()}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    parts = (_parts(token, ranks) for token in by_rank if len(token) > 1)
    merges = [(_spell(first, spelled), _spell(second, spelled)) for first, second in filter(None, parts)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pattern = Regex(_PATTERNS.get(len(ranks), _CL100K))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _read(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    number = 0
    try:
        for line in read_lines(path):
            number += 1
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path}, line {number}: not tiktoken's 'token in base64, space, rank' ({error}).") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path} should have the ranks 0 ... {len(ranks) - 1}, each once.")
    return ranks


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merge into ``token``, left by the merges of lower ranks; None if they leave more."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spelling() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def _spell(token: bytes, spelled: list[str]) -> str:
    return "".join(spelled[byte] for byte in token)
