"""Tensor maps: boxes of a tensor, and where their elements lie in shared memory under the 128-byte swizzle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastattn.backends.cuda.nvrtc import View
from fastattn.backends.triton.tools.ptx.memory import Addresses, Bytes, Fault, Global

BOX_COLUMNS, ELEMENT, ROW_BYTES = 64, 2, 128
MOST_ROWS = 256  # of a box


@dataclass(frozen=True)
class TensorMap:
    """What the host encodes for a ``View`` that begins at ``address``."""

    address: int
    view: View

    def __post_init__(self) -> None:
        used = [step for step, size in zip(self.view.strides, self.view.sizes[1:], strict=True) if size > 1]
        if self.address % 16 or any(step % 16 or step <= 0 for step in used):
            raise Fault(f"a tensor map of {self.view.name}: address and strides are multiples of 16 bytes")
        if not 0 < self.view.box_rows <= MOST_ROWS or min(self.view.sizes) < 1:
            raise Fault(f"a tensor map of {self.view.name}: boxes of 1 to {MOST_ROWS} rows of a tensor with elements")

    @property
    def box_bytes(self) -> int:
        return self.view.box_rows * ROW_BYTES

    def in_shared(self, begin: int) -> Addresses:
        """The address of each element of a box that begins there, ``[rows * 64]``, by rows.

        Pieces of 16 bytes change places inside 128 bytes, by the three bits of the address above them (PTX ISA,
        "Swizzling modes").
        """
        if begin % 128:
            raise Fault("a box in shared memory begins at a multiple of 128 bytes")
        linear = begin + np.arange(0, self.box_bytes, ELEMENT)
        return linear ^ ((linear >> 7 & 7) << 4)

    def in_global(self, coordinates: Sequence[int]) -> tuple[Addresses, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """The address of each element of the box at (column, row, head, batch), and which lie inside the tensor."""
        column, row, head, batch = coordinates
        columns, rows, heads, batches = self.view.sizes
        by_row, by_head, by_batch = self.view.strides
        r, c = row + np.arange(self.view.box_rows)[:, None], column + np.arange(BOX_COLUMNS)[None, :]
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        inside &= 0 <= head < heads and 0 <= batch < batches
        at = self.address + c * ELEMENT + r * by_row + head * by_head + batch * by_batch
        return at.reshape(-1), inside.reshape(-1)

    def load(self, memory: Global, coordinates: Sequence[int]) -> Bytes:
        """``[elements, 2]`` bytes of a box; zeros outside the tensor."""
        at, inside = self.in_global(coordinates)
        found = np.zeros((len(at), ELEMENT), np.uint8)
        found[inside] = memory.load(at[inside], ELEMENT)
        return found

    def store(self, memory: Global, coordinates: Sequence[int], data: Bytes) -> None:
        """Writes the part of a box that lies inside the tensor."""
        at, inside = self.in_global(coordinates)
        memory.store(at[inside], data[inside])
