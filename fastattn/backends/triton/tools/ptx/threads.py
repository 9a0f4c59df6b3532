"""Threads that run in lockstep: their registers, their accesses to memory, and the instructions of tensor cores.

Subclasses say which threads an instruction is for, and what branches, barriers and asynchronous copies do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.triton.tools.ptx import matrices, operations
from fastattn.backends.triton.tools.ptx.memory import Addresses, Bytes, Fault, Global
from fastattn.backends.triton.tools.ptx.operations import UNSIGNED, WIDTHS, Bits, compute
from fastattn.backends.triton.tools.ptx.text import (
    Address,
    Instruction,
    Number,
    Operand,
    Place,
    Register,
    Symbol,
    Vector,
)

UNKNOWN = np.uint32(0x7FC0DEAD)  # NaN, in registers that a product has yet to write


class SharedMemory(Protocol):
    """Shared memory with its checks, as the threads of a block use it."""

    data: Bytes

    def load(self, at: Addresses, size: int, warps: NDArray[np.int16]) -> Bytes: ...

    def store(self, at: Addresses, data: Bytes, warps: NDArray[np.int16]) -> None: ...

    def product_begins(self, of_groups: Addresses) -> None: ...

    def product_ends(self, of_groups: Addresses) -> None: ...


@dataclass
class Product:
    """An asynchronous product, computed when it is waited for."""

    compute: Callable[[list[Bits]], list[Bits]]
    sums: tuple[str, ...]
    ends: Callable[[], None]


class Threads:
    """Threads with the same instruction at a time.

    Args:
        memory, shared: what they load from and store to.
        warps: the number of each thread's warp.
        special: special registers.
        symbols: the addresses of named variables.
        parameters: the values of named parameters.
    """

    shared: SharedMemory

    def __init__(
        self, memory: Global, shared: SharedMemory, warps: NDArray[np.int16], special: Mapping[str, Bits],
        symbols: Mapping[str, int], parameters: Mapping[str, Bits],
    ) -> None:  # fmt: skip
        self.memory, self.shared, self.warps, self.special = memory, shared, warps, special
        self.symbols, self.parameters, self.threads = symbols, parameters, len(warps)
        self.registers: dict[str, Bits] = {}
        self.open_products: list[Product] = []
        self.products: list[list[Product]] = []
        self.sums: dict[str, Bits] = {}  # what registers hold that products will write

    def _step(self, it: Instruction) -> int | None:
        """The place to continue at, or None for the next instruction; -1 ends the block."""
        who = self._guard(it)
        name = it.opcode[0]
        if name in ("bra", "ret", "exit"):
            return self._branch(it, who)
        if who is not None and not who.any():
            return None
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(it, who)
        else:
            self._arithmetic(it, who)
        return None

    def _branch(self, it: Instruction, who: NDArray[np.bool_] | None) -> int | None:
        raise NotImplementedError

    def _guard(self, it: Instruction) -> NDArray[np.bool_] | None:
        if it.guard is None:
            return None
        found = self.registers[it.guard]
        return ~found if it.negated else found

    # --- operands

    def read(self, operand: Operand, width: int) -> Bits:
        """The bits of an operand, in as many bytes."""
        if isinstance(operand, Register):
            if operand.name not in self.registers:
                raise Fault(f"{operand.name} is read before it is written")
            found = self.registers[operand.name]
            same = found.dtype == bool or found.dtype.itemsize == width
            return found if same else found.astype(UNSIGNED[width])
        if isinstance(operand, Number):
            return np.full(self.threads, operand.bits & ((1 << 8 * width) - 1), UNSIGNED[width])
        if isinstance(operand, Symbol) and operand.name in self.special:
            return self.special[operand.name].astype(UNSIGNED[width])
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return np.full(self.threads, self.symbols[operand.name], UNSIGNED[width])
        raise Fault(f"an operand that is not known: {operand}")

    def write(self, operand: Operand, bits: Bits, who: NDArray[np.bool_] | None) -> None:
        if isinstance(operand, Symbol):  # "_", a result that nobody wants
            return
        assert isinstance(operand, Register)
        if who is not None and not who.all():
            before = self.registers.get(operand.name)
            bits = np.where(who, bits, np.zeros_like(bits) if before is None else before)
        self.registers[operand.name] = bits

    def _predicate(self, operand: Operand) -> NDArray[np.bool_]:
        """A truth value for each thread, from a predicate or a number."""
        if isinstance(operand, Number):
            return np.full(self.threads, bool(operand.bits))
        return self.read(operand, 1).astype(bool, copy=False)

    def _addresses(self, operand: Operand) -> Addresses:
        assert isinstance(operand, Address)
        return self.read(operand.base, 8).view(np.int64) + operand.offset

    def _items(self, operand: Operand) -> tuple[Register | Number | Symbol, ...]:
        if isinstance(operand, Vector):
            return operand.items
        assert not isinstance(operand, Address | Place)
        return (operand,)

    # --- arithmetic

    def _arithmetic(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        try:
            given = [self._operand_of(it, i, x) for i, x in enumerate(it.operands[1:])]
            found = compute(it.opcode, given)
        except KeyError as missing:
            raise Fault(f"an instruction that is not known here ({missing})") from None
        self.write(it.operands[0], found, who)

    def _operand_of(self, it: Instruction, index: int, operand: Operand) -> Bits:
        kind = it.opcode[-1]
        if kind == "pred" or (it.opcode[0] == "selp" and index == 2):
            return self._predicate(operand)
        if it.opcode[0] in ("shl", "shr") and index == 1:
            return self.read(operand, 4)
        if (it.opcode[0] == "bfe" and index > 0) or (it.opcode[0] == "bfi" and index > 1):
            return self.read(operand, 4)
        width = WIDTHS[kind]
        if it.opcode[0] == "mad" and index == 2 and operations.is_wide(it.opcode):
            width *= 2
        return self.read(operand, width)

    def _mov(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        """Also packs registers into a wider one, and unpacks them."""
        target, source = it.operands
        kind = it.opcode[-1]
        if kind == "pred":
            self.write(target, self._predicate(source), who)
            return
        width = WIDTHS[kind]
        if isinstance(source, Vector):
            parts = width // len(source.items)
            raw = np.stack([self.read(x, parts) for x in source.items], 1)
            self.write(target, np.ascontiguousarray(raw).view(UNSIGNED[width])[:, 0], who)
        elif isinstance(target, Vector):
            parts = width // len(target.items)
            raw = np.ascontiguousarray(self.read(source, width)[:, None]).view(UNSIGNED[parts])
            for i, x in enumerate(target.items):
                self.write(x, np.ascontiguousarray(raw[:, i]), who)
        else:
            self.write(target, self.read(source, width), who)

    def _shfl(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        """Between the lanes of whole warps; a second result says whether the lane read from exists."""
        to, *inside_to, source, lane_or_mask, clamp, _ = it.operands
        lanes_there = np.ones(self.threads, bool) if who is None else who
        if (lanes_there.reshape(-1, 32).any(1) != lanes_there.reshape(-1, 32).all(1)).any():
            raise Fault("a shuffle of some threads only")
        mode = it.opcode[2]
        if (self.read(clamp, 4)[lanes_there] != (0 if mode == "up" else 31)).any():
            raise Fault("a shuffle inside parts of a warp")
        x = self.read(source, 4).reshape(-1, 32)
        lanes, by = np.arange(32)[None, :], self.read(lane_or_mask, 4).reshape(-1, 32).astype(np.int64)
        of = {"bfly": lanes ^ by, "idx": by & 31, "up": lanes - by, "down": lanes + by}[mode]
        inside = (of >= 0) & (of < 32)
        self.write(to, np.take_along_axis(x, np.where(inside, of, lanes), 1).reshape(-1), who)
        for operand in inside_to:
            self.write(operand, inside.reshape(-1), who)

    def _redux(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        if who is not None:
            raise Fault("a reduction over some threads only")
        kind = it.opcode[-1]
        x = operations.values(self.read(it.operands[1], 4), kind).reshape(-1, 32)
        over: dict[str, Any] = {
            "min": np.min,
            "max": np.max,
            "add": np.sum,
            "and": np.bitwise_and.reduce,
            "or": np.bitwise_or.reduce,
        }
        found = np.repeat(over[it.opcode[2]](x, axis=1), 32)
        self.write(it.operands[0], operations.bits_of(found, kind), None)

    # --- memory

    def _ld(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        targets, width = self._items(it.operands[0]), WIDTHS[it.opcode[-1]]
        source = it.operands[1]
        if "param" in it.opcode:
            assert isinstance(source, Address) and isinstance(source.base, Symbol)
            self.write(targets[0], self.parameters[source.base.name].astype(UNSIGNED[width]), who)
            return
        at, size = self._addresses(source), width * len(targets)
        everyone = np.arange(self.threads) if who is None else np.nonzero(who)[0]
        raw = np.zeros((self.threads, size), np.uint8)
        if "shared" in it.opcode or "shared_cta" in it.opcode:
            raw[everyone] = self.shared.load(at[everyone], size, self.warps[everyone])
        else:
            raw[everyone] = self.memory.load(at[everyone], size)
        for i, x in enumerate(targets):
            bits = np.ascontiguousarray(raw.view(UNSIGNED[width])[:, i])
            if it.opcode[-1][0] == "s":  # the register may be wider
                bits = operations.values(bits, it.opcode[-1]).astype(np.int64).view(np.uint64)
            self.write(x, bits, who)

    def _st(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        sources, width = self._items(it.operands[1]), WIDTHS[it.opcode[-1]]
        raw = np.ascontiguousarray(np.stack([self.read(x, width) for x in sources], 1)).view(np.uint8)
        at = self._addresses(it.operands[0])
        everyone = np.arange(self.threads) if who is None else np.nonzero(who)[0]
        if "shared" in it.opcode or "shared_cta" in it.opcode:
            self.shared.store(at[everyone], raw[everyone], self.warps[everyone])
        else:
            self.memory.store(at[everyone], raw[everyone])

    # --- tensor cores

    def _ldmatrix(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        registers, address = it.operands
        targets, at, lanes = self._rows_of_matrices(it, registers, address, who)
        rows = self.shared.load(at[lanes], 16, self.warps[lanes])
        for x, bits in zip(targets, matrices.matrices_of_rows(rows, len(targets), "trans" in it.opcode), strict=True):
            self.write(x, bits, None)

    def _stmatrix(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        address, sources = it.operands
        given, at, lanes = self._rows_of_matrices(it, sources, address, who)
        rows = matrices.rows_of_matrices([self.read(x, 4) for x in given], "trans" in it.opcode)
        self.shared.store(at[lanes], rows, self.warps[lanes])

    def _rows_of_matrices(
        self, it: Instruction, registers: Operand, address: Operand, who: NDArray[np.bool_] | None
    ) -> tuple[tuple[Register | Number | Symbol, ...], Addresses, NDArray[np.bool_]]:
        """The registers, one for each matrix, the addresses, and the lanes whose addresses are of rows."""
        if who is not None or "b16" not in it.opcode:
            raise Fault("an instruction on matrices that is not known here")
        items = self._items(registers)
        return items, self._addresses(address), np.arange(self.threads) % 32 < 8 * len(items)

    def _mma(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        targets, of_a, of_b, of_sums = (self._items(x) for x in it.operands)
        kind = it.opcode[-3]
        if who is not None or len(of_a) != 4 or it.opcode[-1] != "f32":
            raise Fault("an mma that is not known here")
        a = matrices.a_of_registers([self.read(x, 4) for x in of_a], kind)
        b = matrices.b_of_registers([self.read(x, 4) for x in of_b], kind)
        sums = matrices.sums_of_registers([self.read(x, 4) for x in of_sums])
        for x, bits in zip(targets, matrices.registers_of_sums(matrices.product(a, b, sums)), strict=True):
            self.write(x, bits, None)

    def _wgmma(self, it: Instruction, who: NDArray[np.bool_] | None) -> None:
        if "mma_async" in it.opcode:
            self._begin_product(it)
        elif "commit_group" in it.opcode:
            self.products.append(self.open_products)
            self.open_products = []
        elif "wait_group" in it.opcode:
            left = it.operands[0]
            assert isinstance(left, Number)
            while len(self.products) > left.bits:
                self._end_products(self.products.pop(0))

    def _begin_product(self, it: Instruction) -> None:
        of_sums, of_a, of_b, scale_d, *signs = it.operands
        if any(x != Number(1) for x in signs[:2]):
            raise Fault("a wgmma with a sign")
        kind = it.opcode[-2]
        columns = int(it.opcode[4].partition("n")[2].partition("k")[0])
        flags = [isinstance(x, Number) and x.bits == 1 for x in signs[2:]]
        a_transposed, b_transposed = (
            (False, *flags) if isinstance(of_a, Vector) and len(flags) == 1 else (*flags, False, False)[:2]
        )
        reads_a, end_a = self._operand_a(of_a, kind, a_transposed)
        where_b = self._behind(of_b, columns, kind, b_transposed)
        keeps = self._predicate(scale_d)
        names = tuple(x.name for x in self._items(of_sums) if isinstance(x, Register))
        self.shared.product_begins(where_b)
        for name in names:
            self.sums.setdefault(name, self.registers.get(name, np.full(self.threads, UNKNOWN)))
            self.registers[name] = np.full(self.threads, UNKNOWN)

        def compute(sums: list[Bits]) -> list[Bits]:
            raw_b = self.shared.data[where_b]  # [groups, columns, K, size]
            b = matrices.elements(raw_b, kind)[..., 0].swapaxes(-1, -2)
            before = matrices.sums_of_registers(sums)
            before = np.where(keeps.reshape(-1, 32)[:, :1, None], before, 0)
            return matrices.registers_of_sums(matrices.product(reads_a(), np.repeat(b, 4, 0), before))

        def ends() -> None:
            end_a()
            self.shared.product_ends(where_b)

        self.open_products.append(Product(compute, names, ends))

    def _end_products(self, group: list[Product]) -> None:
        for done in group:
            found = done.compute([self.sums[name] for name in done.sums])
            done.ends()
            self.sums.update(zip(done.sums, found, strict=True))
        later = {name for rest in (*self.products, self.open_products) for product in rest for name in product.sums}
        for name in {name for done in group for name in done.sums} - later:
            self.registers[name] = self.sums.pop(name)

    def _operand_a(self, operand: Operand, kind: str, transposed: bool) -> tuple[Callable[[], Any], Callable[[], None]]:
        """A function that reads the 64 rows of each group of warps, ``[warps, 16, K]``, and one that ends reading."""
        if isinstance(operand, Vector):
            registers = list(operand.items)
            return lambda: matrices.a_of_registers([self.read(x, 4) for x in registers], kind), lambda: None
        where = self._behind(operand, 64, kind, transposed)
        self.shared.product_begins(where)

        def read() -> Any:
            rows = matrices.elements(self.shared.data[where], kind)[..., 0]
            return rows.reshape(-1, 16, rows.shape[-1])

        return read, lambda: self.shared.product_ends(where)

    def _behind(self, operand: Operand, rows: int, kind: str, transposed: bool) -> Addresses:
        """``[groups, rows, K, bytes]``: where the matrix behind the descriptor of each group of four warps lies."""
        of_groups = self.read(operand, 8).reshape(-1, 128)
        if (of_groups != of_groups[:, :1]).any():
            raise Fault("wgmma: the threads of a group have different descriptors")
        size = matrices.SIZES[kind]
        found = [matrices.addresses(int(x), rows, size, transposed) for x in of_groups[:, 0]]
        return np.stack(found)[..., None] + np.arange(size)
