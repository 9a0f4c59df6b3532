"""Exact and near duplicates, in one pass and in a table on disk, so that memory does not grow with the corpus.

Two documents are near duplicates when they share most runs of five words, or of five characters in scripts without
spaces; case and punctuation do not count. MinHash estimates the share: the part of equal minima of random hash
functions over the runs is the Jaccard similarity s of the sets (Broder, "On the resemblance and containment of
documents", 1997). With 14 bands of 8 minima two documents meet in a band with probability ``1 - (1 - s^8)^14``: 0.04 at
s = 0.5, 0.56 at 0.7, 0.92 at 0.8 (Penedo et al., "FineWeb", 2024).
"""

from __future__ import annotations

import hashlib
import re
import threading
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastattn.lm.data.scripts import words

Keys = NDArray[np.uint64]

BANDS, ROWS, RUN = 14, 8, 5
_RANDOM = np.random.default_rng(20210109)
_FACTORS = _RANDOM.integers(0, 2**31, (BANDS * ROWS, 1), np.uint32) * np.uint32(2) + np.uint32(1)
_TERMS = _RANDOM.integers(0, 2**32, (BANDS * ROWS, 1), np.uint32)
_MIX = _RANDOM.integers(0, 2**63, ROWS + RUN, np.uint64) * np.uint64(2) + np.uint64(1)
_CHUNK = 1024  # runs hashed at a time
_REMEMBERED = 1 << 20  # words
_LETTERS = re.compile(r"\w+")


class _Buffers(threading.local):
    """Memory of each thread for the hashes of a chunk; fresh memory takes longer to get than they take."""

    def __init__(self) -> None:
        self.products = np.empty((BANDS * ROWS, _CHUNK), np.uint32)


_BUFFERS = _Buffers()


def exact_key(text: str) -> Keys:
    """One 64-bit hash of the text, as a table takes it."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64)


class _Numbers(dict[str, int]):
    """A 32-bit number for each word without its case and punctuation, the same in every process; 0 for nothing else.

    Those of frequent words are remembered.
    """

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        number = self[word] = zlib.crc32("".join(_LETTERS.findall(word.lower())).encode())
        return number


_NUMBERS = _Numbers()


def near_keys(text: str) -> Keys:
    """A hash for each band: documents that share one are near duplicates."""
    found = words(text)
    numbers = np.fromiter(map(_NUMBERS.__getitem__, found), np.uint64, len(found))
    numbers = numbers[numbers != 0] if numbers.any() else exact_key(text)
    count = max(len(numbers) - RUN + 1, 1)
    runs = np.zeros(count, np.uint64)
    for i in range(min(RUN, len(numbers))):
        runs = (runs ^ numbers[i : i + count]) * _MIX[ROWS + i]
        runs ^= runs >> np.uint64(29)
    hashed = (runs >> np.uint64(32)).astype(np.uint32)  # twice as many at a time, and few runs of a text collide
    smallest = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    for start in range(0, count, _CHUNK):
        part = hashed[start : start + _CHUNK]
        products = np.multiply(_FACTORS, part, out=_BUFFERS.products[:, : len(part)])
        products += _TERMS
        smallest = np.minimum(smallest, products.min(axis=1))
    smallest >>= np.uint32(8)  # multiply-shift: universal; it keeps the order, so the minimum may come first
    bands = (smallest.reshape(BANDS, ROWS) * _MIX[:ROWS]).sum(axis=1, dtype=np.uint64)
    return bands * _MIX[0] + np.arange(1, BANDS + 1, dtype=np.uint64)  # the same minima in two bands are no match


class Table:
    """A set of 64-bit keys in a memory-mapped file: 8 bytes a slot, at most half of them taken.

    Args:
        path: of the file, which must not exist; whoever made the folder removes it.
        slots: a power of two; the table doubles when it is half full.
    """

    def __init__(self, path: Path, slots: int = 1 << 16) -> None:
        self.path, self.slots, self.taken = path, slots, 0
        self._keys = _mapped(path, slots)

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Add keys; which of them were there before."""
        if 2 * (self.taken + len(keys)) > self.slots:
            self._grow()
        known = np.zeros(len(keys), bool)
        for number, key in enumerate(map(int, keys)):
            known[number] = self._add(key or 1)  # 0 is an empty slot
        return known

    def _add(self, key: int) -> bool:
        slot = key & (self.slots - 1)
        while (found := int(self._keys[slot])) != key:
            if not found:
                self._keys[slot] = key
                self.taken += 1
                return False
            slot = (slot + 1) & (self.slots - 1)
        return True

    def _grow(self) -> None:
        old, before = self._keys, self.path
        self.slots *= 2
        self.path = before.with_name(f"{before.name.split('.')[0]}.{self.slots}")
        self._keys = _mapped(self.path, self.slots)
        self.taken = 0
        for start in range(0, len(old), _CHUNK):
            for key in old[start : start + _CHUNK][old[start : start + _CHUNK] != 0].tolist():
                self._add(key)
        before.unlink()


def _mapped(path: Path, slots: int) -> Keys:
    """A new file of zeros as an array; a plain one, as the class of numpy's maps slows down each access."""
    return np.memmap(path, np.uint64, "w+", shape=(slots,)).view(np.ndarray)
