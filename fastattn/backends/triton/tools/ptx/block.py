"""The threads of one block, which run in lockstep: each instruction for all of them before the next.

Branches must be the same for all threads, as those of Triton's kernels are. Lockstep hides no race: ``memory.Shared``
looks for accesses without a barrier between, and asynchronous copies and products take effect as late as they may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.triton.tools.ptx.memory import Addresses, Fault, Global, Shared
from fastattn.backends.triton.tools.ptx.operations import Bits
from fastattn.backends.triton.tools.ptx.text import Instruction, Number, Program, Symbol
from fastattn.backends.triton.tools.ptx.threads import Threads

FOREVER = 5_000_000  # instructions


@dataclass
class Copy:
    """An asynchronous copy on its way."""

    where: Addresses
    data: NDArray[np.uint8]
    warps: NDArray[np.int16]


class Block(Threads):
    """One block of a launch."""

    shared: Shared

    def __init__(
        self, program: Program, parameters: Sequence[Bits], memory: Global, shared: int, place: Sequence[int],
        grid: Sequence[int],
    ) -> None:  # fmt: skip
        lane = np.arange(program.threads, dtype=np.uint32)
        special = {"%tid.x": lane, "%laneid": lane % 32, "%ntid.x": np.full_like(lane, program.threads)}
        for axis, at, size in zip("xyz", place, grid, strict=True):
            special[f"%ctaid.{axis}"] = np.full_like(lane, at)
            special[f"%nctaid.{axis}"] = np.full_like(lane, size)
        given = {name: x for (_, name), x in zip(program.parameters, parameters, strict=True)}
        super().__init__(memory, Shared(shared), (lane // 32).astype(np.int16), special, {"global_smem": 0}, given)
        self.program = program
        self.open_copies: list[Copy] = []
        self.copies: list[list[Copy]] = []
        self.executed = 0

    def run(self) -> None:
        at, instructions = 0, self.program.instructions
        while at < len(instructions):
            instruction = instructions[at]
            self.executed += 1
            if self.executed > FOREVER:
                raise Fault(f"more than {FOREVER} instructions: a loop that does not end")
            try:
                target = self._step(instruction)
            except Fault as fault:
                raise Fault(f"{fault} ({self.program.name}: {instruction.text})") from None
            at = at + 1 if target is None else target
            if target == -1:
                break
        if any(self.copies) or self.open_copies or any(self.products) or self.open_products:
            raise Fault(f"{self.program.name} ends before its copies and products do")

    def _branch(self, it: Instruction, who: NDArray[np.bool_] | None) -> int | None:
        if who is not None and who.any() != who.all():
            raise Fault("threads of a block branch to different places")
        if who is not None and not who.any():
            return None
        if it.opcode[0] != "bra":
            return -1
        target = it.operands[0]
        assert isinstance(target, Symbol)
        return self.program.labels[target.name]

    def _atom(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        if "add" not in it.opcode or it.opcode[-1] != "f32" or not isinstance(it.operands[0], Symbol):
            raise Fault("an atomic operation that is not known here")
        everyone = np.arange(self.threads) if who is None else np.nonzero(who)[0]
        values = self.read(it.operands[2], 4).view(np.float32)
        self.memory.add(self._addresses(it.operands[1])[everyone], values[everyone])

    def _bar(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        if who is not None and not who.all():
            raise Fault("a barrier of some threads only")
        if "sync" in it.opcode and "warp" not in it.opcode:
            self.shared.barrier()

    _barrier = _bar

    def _fence(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        if it.opcode[1:3] == ("proxy", "async"):
            self.shared.fence_for_products()

    def _cp(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        """``cp.async``: it reads now and writes when it is waited for."""
        if "commit_group" in it.opcode:
            self.copies.append(self.open_copies)
            self.open_copies = []
        elif "wait_group" in it.opcode or "wait_all" in it.opcode:
            left = it.operands[0].bits if it.operands and isinstance(it.operands[0], Number) else 0
            while len(self.copies) > left:
                for copy in self.copies.pop(0):
                    self.shared.arrive(copy.where, copy.data, copy.warps)
        else:
            self._copy(it, who)

    def _copy(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        to, source, size, *given = it.operands
        assert isinstance(size, Number)
        everyone = np.arange(self.threads) if who is None else np.nonzero(who)[0]
        wanted = self.read(given[0], 4).astype(np.int64) if given else np.full(self.threads, size.bits)
        data = np.zeros((len(everyone), size.bits), np.uint8)
        reads = wanted[everyone] > 0
        if (reads & (wanted[everyone] != size.bits)).any():
            raise Fault("a copy of a part of its bytes")
        at = self._addresses(source)[everyone]
        data[reads] = self.memory.load(at[reads], size.bits)
        warps = self.warps[everyone]
        where = self.shared.expect(self._addresses(to)[everyone], size.bits, warps)
        self.open_copies.append(Copy(where, data, warps))
