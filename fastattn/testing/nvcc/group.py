"""A warpgroup: 128 threads that branch apart, wait at barriers, and start copies and products.

Threads at the same instruction take it together, those furthest behind first, so that paths meet again where the
program's do. A path that waits lets the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.triton.tools.ptx.memory import Addresses, Bytes, Fault, Global
from fastattn.backends.triton.tools.ptx.operations import UNSIGNED, WIDTHS, Bits
from fastattn.backends.triton.tools.ptx.text import (
    Address,
    Instruction,
    Number,
    Operand,
    Place,
    Program,
    Register,
    Symbol,
)
from fastattn.backends.triton.tools.ptx.threads import UNKNOWN, Threads
from fastattn.testing.nvcc.clocks import BASE, Mbarrier, Ordered
from fastattn.testing.nvcc.maps import TensorMap

SIZE = 128  # threads
PARAMETERS = 1 << 40  # address of the kernel's parameter
Who = NDArray[np.bool_]


@dataclass(eq=False)
class Path:
    """Threads at one instruction; they go on when ``waits`` says true, once ``then`` has been called."""

    at: int
    who: Who
    waits: Callable[[], bool] | None = None
    then: Callable[[], None] = lambda: None
    why: str = ""


@dataclass
class Launch:
    """A kernel with its argument: the bytes of it, and the tensor maps by their offsets there."""

    program: Program
    argument: bytes
    maps: dict[int, TensorMap]
    memory: Global
    shared_bytes: int
    grid: int


@dataclass
class Load:
    """A copy to shared memory on its way."""

    flat: Addresses
    where: Addresses
    data: Callable[[], Bytes]
    barrier: Mbarrier


@dataclass
class Copies:
    """Copies of a thread or a warp, each ended by a call: those not yet committed, and groups in order."""

    open: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int) -> None:
        """End the oldest groups but ``left``."""
        while len(self.groups) > left:
            for end in self.groups.pop(0):
                end()

    def __bool__(self) -> bool:
        return bool(self.open) or any(self.groups)


class SharedOfGroup:
    """Shared memory as the instructions of a group's products see it."""

    def __init__(self, shared: Ordered, warps: NDArray[np.int16]) -> None:
        self.data, self.load, self.store = shared.data, shared.load, shared.store
        self._shared, self._warps = shared, warps
        self._reading: dict[int, Addresses] = {}

    def product_begins(self, of_groups: Addresses) -> None:
        self._reading[id(of_groups)] = self._shared.async_read_begins(of_groups, self._warps)

    def product_ends(self, of_groups: Addresses) -> None:
        self._shared.async_read_ends(self._reading.pop(id(of_groups)), self._warps)


class Group(Threads):
    """Warpgroup ``number`` of a block; ``loads`` are the block's copies on their way."""

    def __init__(self, launch: Launch, shared: Ordered, loads: list[Load], number: int, block: int) -> None:
        lane = np.arange(SIZE, dtype=np.uint32)
        self.numbers = np.arange(4 * number, 4 * number + 4)  # of its warps
        special = {
            "%tid.x": lane + np.uint32(SIZE * number),
            "%laneid": lane % 32,
            "%ntid.x": np.full_like(lane, launch.program.threads),
            "%ctaid.x": np.full_like(lane, block),
            "%nctaid.x": np.full_like(lane, launch.grid),
        }
        ((_, parameter),) = launch.program.parameters
        symbols = {"_ZN2fa4sm9013shared_memoryE": BASE, parameter: PARAMETERS}
        of_threads = (4 * number + lane // 32).astype(np.int16)
        super().__init__(
            launch.memory, SharedOfGroup(shared, self.numbers.astype(np.int16)), of_threads, special, symbols, {}
        )
        self.launch, self.ordered, self.loads = launch, shared, loads
        self.paths = [Path(0, np.ones(SIZE, bool))]
        self.path = self.paths[0]
        self.is_whole = True  # the path has all threads
        self.stores: dict[int, Copies] = {}  # by TMA from shared memory, by thread
        self.copies: dict[int, Copies] = {}  # by threads to shared memory, by warp
        self.changed: set[str] = set()  # registers written since the last wgmma.fence
        self.is_fenced = False  # by a first one
        self.executed = 0

    # --- paths

    def ready(self) -> list[Path]:
        """The paths that can go on."""
        for path in self.paths:
            if path.waits is not None and path.waits():
                path.waits = None
                path.then()
        return [path for path in self.paths if path.waits is None]

    def advance(self, budget: int) -> None:
        """Execute instructions of the path furthest behind until it waits or meets another, at most ``budget``."""
        ready = self.ready()
        self.path = min(ready, key=lambda path: path.at)
        for other in [path for path in ready if path.at == self.path.at and path is not self.path]:
            self.path.who = self.path.who | other.who
            self.paths.remove(other)
        self.is_whole = bool(self.path.who.all())
        others = [path.at for path in ready if path.at > self.path.at]
        meets = min(others) if others else len(self.launch.program.instructions)
        instructions = self.launch.program.instructions
        for _ in range(budget):
            it, begun = instructions[self.path.at], len(self.paths)
            try:
                target = self._step(it)
            except Fault as fault:
                raise Fault(f"{fault} (warpgroup {self.numbers[0] // 4}, {it.text[:120]})") from None
            self.executed += 1
            if target == -1:
                return
            if self.path.waits is None or self.path.why == "barrier":
                self.path.at = self.path.at + 1 if target is None else target
            if self.path.waits is not None or len(self.paths) != begun or self.path.at >= meets:
                return

    def _guard(self, it: Instruction) -> Who | None:
        among = super()._guard(it)
        if self.is_whole:
            return among
        return self.path.who if among is None else among & self.path.who

    def _branch(self, it: Instruction, who: Who | None) -> int | None:
        taken = self.path.who if who is None else who
        if it.opcode[0] != "bra":
            return self._end(taken)
        target = it.operands[0]
        assert isinstance(target, Symbol)
        stays = self.path.who & ~taken
        if not taken.any():
            return None
        if stays.any():
            self.paths.append(Path(self.path.at + 1, stays))
            self.path.who, self.is_whole = taken, False
        return self.launch.program.labels[target.name]

    def _end(self, who: Who) -> int | None:
        if not who.any():
            return None
        if any(self.stores.get(thread) for thread in np.nonzero(who)[0].tolist()):
            raise Fault("a thread ends before its copies from shared memory do")
        if any(self.copies.get(warp) for warp in self.warps[who].tolist()):
            raise Fault("a thread ends before its copies to shared memory do")
        if self.products or self.open_products:
            raise Fault("a warpgroup ends before its products do")
        self.path.who = self.path.who & ~who
        self.is_whole = False
        if self.path.who.any():
            return None
        self.paths.remove(self.path)
        return -1

    def _warps_of(self, who: Who | None) -> NDArray[np.intp]:
        """The numbers of the warps that take an instruction for whole warps."""
        active = (np.ones(SIZE, bool) if who is None else who).reshape(4, 32)
        if (active.any(1) != active.all(1)).any():
            raise Fault("an instruction for whole warps is taken by a part of one")
        return self.numbers[active.all(1)]

    def _one(self, operand: Operand, width: int, who: Who | None) -> int:
        """A value that is the same for all threads."""
        found = self.read(operand, width) if who is None else self.read(operand, width)[who]
        if (found != found[0]).any():
            raise Fault("the threads of a path have different operands")
        return int(found[0])

    # --- registers and addresses

    def write(self, operand: Operand, bits: Bits, who: Who | None) -> None:
        super().write(operand, bits, who)
        if isinstance(operand, Register):
            self.changed.add(operand.name)

    def _mov(self, it: Instruction, who: Who | None) -> None:
        """nvcc also moves registers without a value: sums that a first product will not add to.

        It moves such sums after wgmma.fence, too, and leaves it to ptxas to use one register for both; ``csrc/sass.py``
        checks that. So a copy counts as written since the fence if what it copies does.
        """
        target, source = it.operands
        if isinstance(source, Register) and source.name not in self.registers and WIDTHS.get(it.opcode[-1]) == 4:
            self.registers[source.name] = np.full(SIZE, UNKNOWN)
        super()._mov(it, who)
        if isinstance(target, Register) and isinstance(source, Register) and source.name not in self.changed:
            self.changed.discard(target.name)

    def _cvta(self, it: Instruction, who: Who | None) -> None:
        """Global memory and parameters have generic addresses of their own."""
        self.write(it.operands[0], self.read(it.operands[1], 8), who)

    def _ld(self, it: Instruction, who: Who | None) -> None:
        if "param" not in it.opcode:
            super()._ld(it, who)
            return
        source, width = it.operands[1], WIDTHS[it.opcode[-1]]
        assert isinstance(source, Address)
        at = self._one(source.base, 8, who) + source.offset - PARAMETERS
        for i, x in enumerate(self._items(it.operands[0])):
            raw = self.launch.argument[at + i * width : at + (i + 1) * width]
            if at < 0 or len(raw) < width:
                raise Fault("a parameter is read outside it")
            self.write(x, np.full(SIZE, int.from_bytes(raw, "little"), UNSIGNED[width]), who)

    def _atom(self, it: Instruction, who: Who | None) -> None:
        """``add.u32`` in the order of threads."""
        if it.opcode[1:] != ("global", "add", "u32"):
            raise Fault("an atomic operation that is not known here")
        to, address, by = it.operands
        at, values, before = self._addresses(address), self.read(by, 4), np.zeros(SIZE, np.uint32)
        for thread in np.nonzero(self.path.who if who is None else who)[0]:
            one = slice(thread, thread + 1)
            old = self.memory.load(at[one], 4).view(np.uint32)[0]
            before[one] = old
            self.memory.store(at[one], (old + values[one]).view(np.uint8)[None])
        self.write(to, before, who)

    def _red(self, it: Instruction, who: Who | None) -> None:
        if it.opcode != ("red", "global", "add", "v4", "f32"):
            raise Fault("a reduction that is not known here")
        at, everyone = self._addresses(it.operands[0]), np.nonzero(self.path.who if who is None else who)[0]
        if (at[everyone] % 16).any():
            raise Fault("a reduction of 16 bytes at an address that is no multiple of 16")
        for i, x in enumerate(self._items(it.operands[1])):
            self.memory.add(at[everyone] + 4 * i, self.read(x, 4).view(np.float32)[everyone])

    # --- barriers

    def _wait(self, waits: Callable[[], bool], then: Callable[[], None], why: str) -> None:
        self.path.waits, self.path.then, self.path.why = waits, then, why

    def _bar(self, it: Instruction, who: Who | None) -> None:
        if it.opcode[1:2] == ("warp",):
            self._warps_of(who)
            return
        warps = self._warps_of(who)
        barrier = self.ordered.named[self._one(it.operands[0], 4, who)]
        given = self._one(it.operands[1], 4, who) if len(it.operands) > 1 else self.launch.program.threads
        if given % 32:
            raise Fault("a barrier counts whole warps")
        phase = barrier.ended
        for warp in warps.tolist():
            barrier.arrive(self.ordered.released(warp), given)
        if "arrive" not in it.opcode:
            self._wait(lambda: barrier.ended > phase, lambda: self.ordered.acquire(warps, barrier), "barrier")

    _barrier = _bar

    def _mbarrier(self, it: Instruction, who: Who | None) -> None:
        what, threads = it.opcode[1], np.nonzero(self.path.who if who is None else who)[0]
        if what == "init":
            at = self._addresses(it.operands[0])
            self.ordered.init_mbarrier(int(at[threads[0]]), self._one(it.operands[1], 4, who))
            if len(threads) > 1:
                raise Fault("an mbarrier is made by several threads")
        elif what == "arrive":
            at = self._addresses(it.operands[1])
            for thread in threads.tolist():
                expected = int(self.read(it.operands[2], 4)[thread]) if "expect_tx" in it.opcode else 0
                knows = self.ordered.released(int(self.warps[thread]))
                self.ordered.mbarrier(int(at[thread])).arrive(knows, expected)
        elif what == "try_wait" and "parity" in it.opcode:
            self._try_wait(it, who, threads)
        else:
            raise Fault("an mbarrier instruction that is not known here")

    def _try_wait(self, it: Instruction, who: Who | None, threads: NDArray[np.intp]) -> None:
        """It waits until it can say yes: the instruction may wait as long as it likes."""
        to, address, parity = it.operands
        assert isinstance(address, Address)
        barrier = self.ordered.mbarrier(self._one(address.base, 4, who) + address.offset)
        wanted = self._one(parity, 4, who)
        if not barrier.is_done(wanted):
            self._wait(lambda: barrier.is_done(wanted), lambda: None, f"mbarrier {barrier.agent}, parity {wanted}")
            return
        self.ordered.acquire(np.unique(self.warps[threads]), barrier)
        self.write(to, np.ones(SIZE, bool), who)

    def _elect(self, it: Instruction, who: Who | None) -> None:
        self._warps_of(who)
        self.write(it.operands[1], np.arange(SIZE) % 32 == 0, who)

    def _setmaxnreg(self, it: Instruction, who: Who | None) -> None:
        count = it.operands[0]
        assert isinstance(count, Number)
        if who is not None or count.bits % 8 or not 24 <= count.bits <= 256:
            raise Fault("setmaxnreg takes a multiple of 8 from 24 to 256, and whole warpgroups")

    def _prefetch(self, it: Instruction, who: Who | None) -> None:
        """A hint."""

    def _griddepcontrol(self, it: Instruction, who: Who | None) -> None:
        """The kernels of a pass run in turn."""

    def _fence(self, it: Instruction, who: Who | None) -> None:
        if it.opcode[1:3] == ("proxy", "async"):
            self.ordered.fence(np.unique(self.warps if who is None else self.warps[who]))

    # --- copies

    def _cp(self, it: Instruction, who: Who | None) -> None:
        threads = np.nonzero(self.path.who if who is None else who)[0].tolist()
        is_bulk = it.opcode[2] == "bulk"
        if it.opcode[-1] == "commit_group" or "wait_group" in it.opcode:
            of, keys = (self.stores, threads) if is_bulk else (self.copies, self._warps_of(who).tolist())
            for key in keys:
                copies = of.setdefault(key, Copies())
                if it.opcode[-1] == "commit_group":
                    copies.commit()
                else:
                    assert isinstance(it.operands[0], Number)
                    copies.wait(it.operands[0].bits)
        elif not is_bulk:
            for warp in np.unique(self.warps[threads]).tolist():
                self._copy(it, np.array([x for x in threads if self.warps[x] == warp]), warp)
        else:
            for thread in threads:  # each begins its own
                self._bulk(it, np.arange(SIZE) == thread, thread)

    def _copy(self, it: Instruction, threads: NDArray[np.intp], warp: int) -> None:
        """``cp.async`` of one warp: it reads and writes when it is waited for, zeros where nothing exists."""
        to, source, size, *given = it.operands
        assert isinstance(size, Number)
        exist = self.read(given[0], 4)[threads] if given else np.full(len(threads), size.bits)
        at, where = self._addresses(source)[threads], self._addresses(to)[threads]
        if not np.isin(exist, (0, size.bits)).all() or (where % size.bits).any():
            raise Fault("a copy of a part of its bytes, or to an address that is no multiple of them")
        flat = self.ordered.copy_begins(where[:, None] + np.arange(size.bits), warp)

        def end() -> None:
            data = np.zeros((len(threads), size.bits), np.uint8)
            data[exist > 0] = self.memory.load(at[exist > 0], size.bits)
            self.ordered.is_taken[flat] = False
            self.ordered.store(where, data, self.warps[threads])

        self.copies.setdefault(warp, Copies()).open.append(end)

    def _bulk(self, it: Instruction, who: Who, thread: int) -> None:
        warp = int(self.warps[thread])
        if "bulk_group" in it.opcode:
            place, source = it.operands[:2]
            assert isinstance(place, Place)
            self._store_box(self._map(place, who), self._coordinates(place, who), self._address(source, who), thread)
        elif "tensor" in it.opcode:
            to, place, barrier = it.operands[:3]
            assert isinstance(place, Place)
            mbarrier = self.ordered.mbarrier(self._address(barrier, who))
            box, coordinates = self._map(place, who), self._coordinates(place, who)
            where = box.in_shared(self._address(to, who))
            self._load(where[:, None] + np.arange(2), where, lambda: box.load(self.memory, coordinates), mbarrier, warp)
        else:
            to, source, size, barrier = it.operands
            mbarrier = self.ordered.mbarrier(self._address(barrier, who))
            begin, count = self._address(source, who), self._one(size, 4, who)
            where = self._address(to, who) + np.arange(0, count, 16)
            if begin % 16 or where[0] % 16 or count % 16:
                raise Fault("a bulk copy has multiples of 16 bytes at multiples of 16")
            at = begin + np.arange(0, count, 16)
            self._load(where[:, None] + np.arange(16), where, lambda: self.memory.load(at, 16), mbarrier, warp)

    def _load(
        self, every: Addresses, where: Addresses, data: Callable[[], Bytes], barrier: Mbarrier, warp: int
    ) -> None:
        self.loads.append(Load(self.ordered.copy_begins(every, warp), where, data, barrier))

    def _store_box(self, box: TensorMap, coordinates: list[int], begin: int, thread: int) -> None:
        warps = self.warps[thread : thread + 1]
        where = box.in_shared(begin)
        flat = self.ordered.async_read_begins(where, warps)

        def end() -> None:
            box.store(self.memory, coordinates, self.ordered.data[where[:, None] + np.arange(2)])
            self.ordered.async_read_ends(flat, warps)

        self.stores.setdefault(thread, Copies()).open.append(end)

    def _address(self, operand: Operand, who: Who | None) -> int:
        assert isinstance(operand, Address)
        return self._one(operand.base, 8, who) + operand.offset

    def _map(self, place: Place, who: Who | None) -> TensorMap:
        offset = self._one(place.map, 8, who) - PARAMETERS
        if offset not in self.launch.maps:
            raise Fault("there is no tensor map at this address")
        return self.launch.maps[offset]

    def _coordinates(self, place: Place, who: Who | None) -> list[int]:
        found = [self._one(x, 4, who) for x in place.coordinates]
        return [x - (1 << 32) if x >> 31 else x for x in found]

    # --- products

    def _wgmma(self, it: Instruction, who: Who | None) -> None:
        if not self.is_whole or who is not None:
            raise Fault("wgmma is taken by a part of a warpgroup")
        if it.opcode[1] == "fence":
            self.changed.clear()
            self.is_fenced = True
        super()._wgmma(it, who)

    def _begin_product(self, it: Instruction) -> None:
        operands = [*self._items(it.operands[0])]
        if not isinstance(it.operands[1], Register):
            operands += self._items(it.operands[1])
        if not self.is_fenced or any(x.name in self.changed for x in operands if isinstance(x, Register)):
            raise Fault("wgmma uses registers that were written since wgmma.fence")
        super()._begin_product(it)


def states(groups: list[Group]) -> str:
    """Where the paths of a block wait, for a message."""
    return "; ".join(
        f"warpgroup {group.numbers[0] // 4}: {int(path.who.sum())} threads at {path.why or 'no barrier'}"
        for group in groups
        for path in group.paths
    )
