"""Global memory made of tensors, and the shared memory of a block, with checks of every access."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]
NOBODY, SEVERAL = -1, -2  # instead of a warp


class Fault(Exception):
    """What a GPU would not do, or do by chance only."""


class Global:
    """The memory of tensors at its own addresses. Whatever lies outside them is out of bounds."""

    def __init__(self, tensors: Iterable[torch.Tensor] = (), spans: Iterable[tuple[int, int]] = ()) -> None:
        """Of ``tensors``, and of ``spans``, the first address and the number of bytes of each."""
        storages = (x.untyped_storage() for x in tensors)
        joined: list[list[int]] = []
        for begin, size in sorted([*spans, *((x.data_ptr(), x.nbytes()) for x in storages)]):
            if size and joined and begin < joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], begin + size)
            elif size:
                joined.append([begin, begin + size])
        self.begins = np.array([begin for begin, _ in joined], dtype=np.int64)
        self.views = [_view(begin, end - begin) for begin, end in joined]

    def load(self, at: Addresses, size: int) -> Bytes:
        """``[threads, size]`` bytes."""
        found = np.empty((len(at), size), np.uint8)
        for view, who, offsets in self._located(at, size):
            found[who] = view[offsets[:, None] + np.arange(size)]
        return found

    def store(self, at: Addresses, data: Bytes) -> None:
        for view, who, offsets in self._located(at, data.shape[1]):
            view[offsets[:, None] + np.arange(data.shape[1])] = data[who]

    def add(self, at: Addresses, values: NDArray[np.float32]) -> None:
        """Atomic additions of fp32, in the order of threads."""
        for view, who, offsets in self._located(at, 4):
            np.add.at(view.view(np.float32) if len(view) % 4 == 0 else view[: len(view) // 4 * 4].view(np.float32),
                      offsets // 4, values[who])  # fmt: skip

    def _located(self, at: Addresses, size: int) -> Iterable[tuple[Bytes, NDArray[np.intp], Addresses]]:
        """For each tensor touched its bytes, which of the accesses touch it, and where."""
        if np.any(at % size):
            raise Fault(f"global memory: {size} bytes at an address that is no multiple of {size}")
        of = np.searchsorted(self.begins, at, side="right") - 1
        for index in np.unique(of).tolist():
            who = np.nonzero(of == index)[0]
            offsets = at[who] - self.begins[index] if index >= 0 else at[who]
            if index < 0 or np.any(offsets + size > len(self.views[index])):
                raise Fault("global memory: an access outside every tensor of the launch")
            yield self.views[index], who, offsets


def _view(begin: int, size: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))


class Shared:
    """Shared memory of one block. It finds accesses of different warps that no barrier separates, among them those of
    asynchronous copies and products, and reads of what was never written.

    ``epoch`` counts barriers. For each byte it knows the warp that last wrote and read it, and in which epoch; whether
    a copy is on its way there; and whether the asynchronous proxy has been told of the write.
    """

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.epoch = 0
        self.writer, self.reader = (np.full(size, NOBODY, np.int16) for _ in range(2))
        self.written, self.read = (np.full(size, -1, np.int32) for _ in range(2))
        self.is_expected = np.zeros(size, bool)
        self.is_generic = np.zeros(size, bool)  # written since the last fence for the asynchronous proxy
        self.products_reading = np.zeros(size, np.int16)

    def barrier(self) -> None:
        self.epoch += 1

    def fence_for_products(self) -> None:
        self.is_generic[:] = False

    def load(self, at: Addresses, size: int, warps: NDArray[np.int16]) -> Bytes:
        where = self._where(at, size)
        self._note_read(where, np.repeat(warps, size).reshape(where.shape))
        return self.data[where]

    def store(self, at: Addresses, data: Bytes, warps: NDArray[np.int16]) -> None:
        where = self._where(at, data.shape[1])
        if self.is_expected[where].any():
            raise Fault("shared memory: a store to bytes that a copy will write")
        self._write(where, data, np.repeat(warps, data.shape[1]).reshape(where.shape))

    def expect(self, at: Addresses, size: int, warps: NDArray[np.int16]) -> Addresses:
        """A copy to these bytes begins; ``arrive`` ends it."""
        where = self._where(at, size)
        self._check_write(where, np.repeat(warps, size).reshape(where.shape))
        self.is_expected[where] = True
        return where

    def arrive(self, where: Addresses, data: Bytes, warps: NDArray[np.int16]) -> None:
        self.is_expected[where] = False
        self._write(where, data, np.repeat(warps, data.shape[1]).reshape(where.shape))
        self.is_generic[where] = False  # Triton takes cp.async for a writer that needs no fence, see docs/measured.md

    def product_begins(self, of_groups: Addresses) -> None:
        """Asynchronous products read these bytes, ``[groups, ...]``, until ``product_ends``."""
        if self.is_generic[of_groups].any():
            raise Fault("wgmma reads bytes without fence.proxy.async since they were written")
        for where in of_groups:
            self.products_reading[np.unique(where)] += 1

    def product_ends(self, of_groups: Addresses) -> None:
        """Each group of four warps has waited for its product."""
        for group, where in enumerate(of_groups):
            self.products_reading[np.unique(where)] -= 1
            self._note_read(where, np.full(where.shape, SEVERAL, np.int16), set(range(4 * group, 4 * group + 4)))

    def _where(self, at: Addresses, size: int) -> Addresses:
        if np.any(at % size):
            raise Fault(f"shared memory: {size} bytes at an address that is no multiple of {size}")
        if len(at) and (at.min() < 0 or at.max() + size > len(self.data)):
            raise Fault(f"shared memory: an access outside its {len(self.data)} bytes")
        return at[:, None] + np.arange(size)

    def _note_read(self, where: Addresses, warps: NDArray[np.int16], mine: set[int] | None = None) -> None:
        if self.is_expected[where].any():
            raise Fault("shared memory: a read of bytes whose copy was not waited for")
        if (self.written[where] < 0).any():
            raise Fault("shared memory: a read of bytes that nothing wrote")
        others = self.writer[where] != warps if mine is None else ~np.isin(self.writer[where], list(mine))
        if (others & (self.written[where] == self.epoch)).any():
            raise Fault("shared memory: a read of what another warp wrote, without a barrier between")
        again = (self.read[where] == self.epoch) & (self.reader[where] != warps)
        readers = np.where(again, SEVERAL, warps)
        self.reader[where] = readers
        self.reader[where[self.reader[where] != readers]] = SEVERAL  # of this one instruction
        self.read[where] = self.epoch

    def _check_write(self, where: Addresses, warps: NDArray[np.int16]) -> None:
        if self.products_reading[where].any():
            raise Fault("shared memory: a write to bytes that a product may still read")
        if ((self.read[where] == self.epoch) & (self.reader[where] != warps)).any():
            raise Fault("shared memory: a write to what another warp reads, without a barrier between")

    def _write(self, where: Addresses, data: Bytes, warps: NDArray[np.int16]) -> None:
        self._check_write(where, warps)
        again = (self.written[where] == self.epoch) & (self.writer[where] != warps)
        if (again & (self.data[where] != data)).any():
            raise Fault("shared memory: two warps write different bytes to one place, without a barrier between")
        self.data[where] = data
        if (self.data[where] != data).any():
            raise Fault("shared memory: threads write different bytes to one place at a time")
        self.writer[where], self.written[where] = warps, self.epoch
        self.is_generic[where] = True
