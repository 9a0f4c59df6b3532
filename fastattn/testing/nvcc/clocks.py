"""Shared memory of a block whose warps run apart, and its barriers: what happens before what, by vector clocks.

Each warp counts what it releases. A barrier carries the counts of those that arrive to those that wait. An access is a
race if an earlier one, by another warp and one of the two a write, is not among what its warp knows of. Copies by TMA
are ordered by the phase of the mbarrier that they complete, which therefore counts as an agent of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.triton.tools.ptx.memory import Addresses, Bytes, Fault

GRAIN = 4  # bytes
BASE = 1024  # address of the first byte, so that address 0 is a fault
Clock = NDArray[np.int32]
MOST_BYTES = (1 << 20) - 1  # that an mbarrier can wait for


class Phases:
    """An mbarrier, or one of the barriers with a number: phases that end, each with what those who arrived knew."""

    def __init__(self, agents: int) -> None:
        self.coming, self.known = np.zeros(agents, np.int32), np.zeros(agents, np.int32)
        self.ended = 0  # phases

    def end(self) -> None:
        self.known = np.maximum(self.known, self.coming)
        self.coming = np.zeros_like(self.coming)
        self.ended += 1


class Mbarrier(Phases):
    """``agent`` is its place in clocks, ``count`` the arrivals of a phase."""

    def __init__(self, agents: int, agent: int, count: int) -> None:
        super().__init__(agents)
        self.agent, self.count, self.left, self.bytes = agent, count, count, 0

    def arrive(self, knows: Clock | None, expected: int = 0) -> None:
        """``expected`` bytes more belong to this phase."""
        if not self.left:
            raise Fault(f"an mbarrier of {self.count} arrivals has more in a phase")
        if knows is not None:
            self.coming = np.maximum(self.coming, knows)
        self.left -= 1
        self.bytes += expected
        self._end_if_complete()

    def receive(self, size: int) -> None:
        """Bytes of a copy have arrived."""
        self.bytes -= size
        self.coming[self.agent] = self.ended + 1
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if abs(self.bytes) > MOST_BYTES:
            raise Fault("an mbarrier is to wait for more bytes than it can count")
        if not self.left and not self.bytes:
            self.end()
            self.left = self.count

    def is_done(self, parity: int) -> bool:
        """Whether the phase of this parity is complete: the one before the current one, or it is the current one."""
        return self.ended % 2 != parity


class Named(Phases):
    """One of the 16 barriers of ``bar.sync``, where warps arrive; one may arrive for others before it waits itself."""

    def __init__(self, agents: int) -> None:
        super().__init__(agents)
        self.threads = self.arrived = 0

    def arrive(self, knows: Clock, threads: int) -> None:
        if self.arrived and threads != self.threads:
            raise Fault(f"a barrier of {self.threads} threads is used with {threads}")
        self.threads, self.arrived = threads, self.arrived + 32
        self.coming = np.maximum(self.coming, knows)
        if self.arrived > threads:
            raise Fault(f"a barrier of {threads} threads has more")
        if self.arrived == threads:
            self.arrived = 0
            self.end()


class Ordered:
    """Shared memory of ``size`` bytes from ``BASE`` on, for ``warps`` warps."""

    def __init__(self, size: int, warps: int, mbarriers: int = 64) -> None:
        grains = (BASE + size) // GRAIN
        self.data = np.zeros(BASE + size, np.uint8)
        self.warps, self.agents = warps, warps + mbarriers
        self.knows = np.zeros((warps, self.agents), np.int32)
        self.knows[np.arange(warps), np.arange(warps)] = 1
        self.writer, self.written = np.zeros(grains, np.int16), np.zeros(grains, np.int32)  # written 0: never
        self.read = np.zeros((warps, grains), np.int32)
        self.is_taken = np.zeros(grains, bool)  # a copy will write it, or it is an mbarrier
        self.is_generic = np.zeros(grains, bool)  # written by threads, and no fence for the asynchronous proxy since
        self.async_reads = np.zeros(grains, np.int16)  # products and copies that read it and have not ended
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named = [Named(self.agents) for _ in range(16)]

    # --- the order of events

    def released(self, warp: int) -> Clock:
        """What a warp passes on now; what it does later is not among it."""
        found = self.knows[warp].copy()
        self.knows[warp, warp] += 1
        return found

    def acquire(self, warps: NDArray[np.intp], of: Phases) -> None:
        self.knows[warps] = np.maximum(self.knows[warps], of.known)

    def init_mbarrier(self, at: int, count: int) -> None:
        if at % 8 or at in self.mbarriers or not 0 < count < 1 << 20:
            raise Fault("an mbarrier has 8 bytes at a multiple of 8, at least one arrival, and is made once")
        self._grains(np.array([at]), 8)
        self.is_taken[at // GRAIN : at // GRAIN + 2] = True
        self.mbarriers[at] = Mbarrier(self.agents, self.warps + len(self.mbarriers), count)

    def mbarrier(self, at: int) -> Mbarrier:
        if at not in self.mbarriers:
            raise Fault(f"there is no mbarrier at {at}")
        return self.mbarriers[at]

    # --- accesses of threads

    def load(self, at: Addresses, size: int, warps: NDArray[np.int16]) -> Bytes:
        grains = self._grains(at, size)
        by = np.broadcast_to(warps[:, None], grains.shape)
        self._check_read(grains, by)
        self.read[by, grains] = self.knows[by, by]
        return self.data[at[:, None] + np.arange(size)]

    def store(self, at: Addresses, data: Bytes, warps: NDArray[np.int16]) -> None:
        size = data.shape[1]
        grains, where = self._grains(at, size), at[:, None] + np.arange(size)
        by = np.broadcast_to(warps[:, None], grains.shape)
        self.check_write(grains, by)
        self.data[where] = data
        self.writer[grains], self.written[grains] = by, self.knows[by, by]
        if (self.data[where] != data).any() or (self.writer[grains] != by).any():
            raise Fault("shared memory: threads write to one place at a time")
        self.is_generic[grains] = True

    def _grains(self, at: Addresses, size: int) -> Addresses:
        if size % GRAIN or np.any(at % size):
            raise Fault(f"shared memory: {size} bytes at an address that is no multiple of them, or not {GRAIN} bytes")
        if len(at) and (at.min() < BASE or at.max() + size > len(self.data)):
            raise Fault(f"shared memory: an access outside its {len(self.data) - BASE} bytes")
        return at[:, None] // GRAIN + np.arange(size // GRAIN)

    def _check_read(self, grains: Addresses, by: NDArray[np.int16]) -> None:
        if self.is_taken[grains].any():
            raise Fault("shared memory: a read of bytes whose copy has not arrived, or of an mbarrier")
        if (self.written[grains] == 0).any():
            raise Fault("shared memory: a read of bytes that nothing wrote")
        if (self.knows[by, self.writer[grains]] < self.written[grains]).any():
            raise Fault("shared memory: a read of what another warp or a copy wrote, which no barrier orders")

    def check_write(self, grains: Addresses, by: NDArray[np.int16]) -> None:
        """A write to ``grains``, each by a warp, begins."""
        if self.is_taken[grains].any():
            raise Fault("shared memory: a write to bytes that a copy will write, or to an mbarrier")
        if self.async_reads[grains].any():
            raise Fault("shared memory: a write to bytes that a product or a copy may still read")
        if (self.knows[by, self.writer[grains]] < self.written[grains]).any():
            raise Fault("shared memory: two writes to one place, which no barrier orders")
        known = np.moveaxis(self.knows[by, : self.warps], -1, 0)
        if (self.read[:, grains] > known).any():
            raise Fault("shared memory: a write to what another warp reads, which no barrier orders")

    # --- the asynchronous proxy

    def fence(self, warps: NDArray[np.intp]) -> None:
        """What these warps wrote, and what they know was written, is visible to copies and products."""
        at = np.nonzero(self.is_generic)[0]
        seen = (self.knows[warps][:, self.writer[at]] >= self.written[at]).any(0)
        self.is_generic[at[seen]] = False

    def async_read_begins(self, where: Addresses, warps: NDArray[np.int16]) -> Addresses:
        """A product or a copy begins that reads the bytes ``where``; what ``async_read_ends`` takes."""
        flat = np.unique(where // GRAIN)
        if flat[0] < BASE // GRAIN or flat[-1] >= len(self.written):
            raise Fault("shared memory: a product or copy reads outside it")
        for warp in warps:
            self._check_read(flat, np.full(flat.shape, warp, np.int16))
        if self.is_generic[flat].any():
            raise Fault("a product or copy reads bytes without fence.proxy.async since they were written")
        self.async_reads[flat] += 1
        return flat

    def async_read_ends(self, flat: Addresses, warps: NDArray[np.int16]) -> None:
        self.async_reads[flat] -= 1
        for warp in warps:
            self.read[warp, flat] = self.knows[warp, warp]

    def copy_begins(self, where: Addresses, warp: int) -> Addresses:
        """A copy will write the bytes ``where``; what ``copy_arrives`` takes."""
        flat = np.unique(where // GRAIN)
        if flat[0] < BASE // GRAIN or flat[-1] >= len(self.written):
            raise Fault("shared memory: a copy writes outside it")
        self.check_write(flat, np.full(flat.shape, warp, np.int16))
        self.is_taken[flat] = True
        return flat

    def copy_arrives(self, flat: Addresses, where: Addresses, data: Bytes, barrier: Mbarrier) -> None:
        self.is_taken[flat] = False
        self.data[where[:, None] + np.arange(data.shape[1])] = data
        self.writer[flat], self.written[flat], self.is_generic[flat] = barrier.agent, barrier.ended + 1, False
        barrier.receive(data.size)
