"""Hazards in machine code (SASS): every path through a kernel is walked with the registers that wgmma still uses.

ptxas moves instructions around asynchronous products, inserts fences, or serialises them; the emulator runs C++ and
cannot see that. These rules are checked:

- a register of an accumulator, or of an operand A, is not accessed until the wait for its product;
- a register that a product reads is not written between WARPGROUP.ARRIVE and that product;
- no product is in flight at the end;
- after ``setmaxnreg`` a role names no register above its new limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x")
MOST_STATES = 200_000
# Their first operand is an address or a predicate, not a result.
WITHOUT_RESULT = ("ST", "RED", "BAR", "SYNCS", "R2UR", "ISETP", "FSETP", "ATOM")
Registers = frozenset[int]
NONE: Registers = frozenset()


@dataclass(frozen=True)
class Instruction:
    """One line of a listing. ``guard`` is its predicate, "" if it has none."""

    address: int
    guard: str
    name: str
    operands: str

    def named(self) -> list[int]:
        """The registers that the operands name, in order."""
        return [int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)]

    def touched(self) -> Registers:
        """All registers that it reads or writes, except those of a product itself."""
        pairs = (int(number) + 1 for number in re.findall(r"\bR(\d+)\.64\b", self.operands))  # 64-bit addresses
        operands = re.sub(r"\[.*?\]", "", self.operands).split(",")  # as wide as the name says; not addresses
        if self.name.startswith("IMAD.WIDE"):  # the factors, the last but one and the one before, have 32 bits
            operands = [operand for operand in operands if not re.match(r"\s*!?U?P", operand)]
            operands = [*operands[:-3], operands[-1]]
        data = re.findall(r"\bR(\d+)\b", ",".join(operands))
        return frozenset(int(n) + i for n in data for i in range(self._width())).union(self.named(), pairs)

    def written(self) -> Registers:
        first = re.match(r"(?:U?P[T\d]+,\s*)*R(\d+)\b", self.operands)
        if first is None or self.name.startswith(WITHOUT_RESULT):
            return NONE
        return frozenset(range(int(first[1]), int(first[1]) + self._width()))

    def _width(self) -> int:
        return 4 if ".128" in self.name else 2 if ".64" in self.name or ".WIDE" in self.name else 1

    def product(self) -> Product | None:
        """The registers of a tensor-core instruction; None if it is none."""
        shape, registers = PRODUCT.match(self.name), self.named()
        if shape is None:
            return None
        accumulator = frozenset(range(registers[0], registers[0] + int(shape[1]) // 2))
        in_registers = re.match(r"R\d+, R\d+, gdesc", self.operands) is not None
        operand = frozenset(range(registers[1], registers[1] + 4)) if in_registers else NONE
        return Product(accumulator, operand, adds="RZ, !UPT" not in self.operands, ends_group="gsb0" in self.operands)


class Product(NamedTuple):
    accumulator: Registers
    operand: Registers
    adds: bool  # to what the accumulator holds
    ends_group: bool


class Group(NamedTuple):
    """The registers of products that are waited for together."""

    accumulators: Registers = NONE
    operands: Registers = NONE

    def plus(self, product: Product) -> Group:
        return Group(self.accumulators | product.accumulator, self.operands | product.operand)


class State(NamedTuple):
    """The state at an instruction: committed groups in flight, the open one, and registers written since ARRIVE.

    ``dirty`` is None if no ARRIVE is in force.
    """

    position: int
    groups: tuple[Group, ...]
    open_group: Group
    dirty: Registers | None


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The kernels of a listing by ``cuobjdump --dump-sass``, by name."""
    for part in re.split(r"Function : ", listing)[1:]:
        lines = (LINE.match(line) for line in part.splitlines())
        yield part.split()[0], [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in lines if m]


def hazards(code: list[Instruction]) -> list[str]:
    """The violations of the rules."""
    if not any(instruction.name.startswith("HGMMA") for instruction in code):
        return []
    return [*_hazards_of_products(code), *_registers_over_limit(code)]


def _hazards_of_products(code: list[Instruction]) -> list[str]:
    read = frozenset().union(*(p.operand | (p.accumulator if p.adds else NONE) for i in code if (p := i.product())))
    follow, found = _successors(code), dict[str, None]()
    todo, seen = [State(0, (), Group(), None)], set[State]()
    while todo:
        state = todo.pop()
        if state in seen or state.position >= len(code):
            continue
        seen.add(state)
        if len(seen) > MOST_STATES:
            return [*found, f"more than {MOST_STATES} states: not all paths were walked"]
        instruction = code[state.position]
        wrong, after = _step(instruction, state, read)
        found |= {f"{instruction.address:#x} {instruction.name} {text}": None for text in wrong}
        todo += [after._replace(position=position) for position in follow(state.position)]
    return list(found)


def _step(instruction: Instruction, state: State, read: Registers) -> tuple[list[str], State]:
    """The violations of one instruction in a state, and the state after it."""
    product = instruction.product()
    if product is not None:
        return _multiply(product, state)
    if instruction.name.startswith("WARPGROUP.ARRIVE"):
        return [], state._replace(dirty=NONE)
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        left = int(re.search(r",\s*(0x[0-9a-f]+)", instruction.operands)[1], 16)  # type: ignore[index]
        groups = state.groups[len(state.groups) - left :] if left and len(state.groups) > left else state.groups
        groups = groups if left else ()
        return [], state._replace(groups=groups, dirty=None if not groups else state.dirty)
    wrong, in_flight = [], (*state.groups, state.open_group)
    written = instruction.written()
    for group in in_flight:
        if instruction.touched() & group.accumulators:
            wrong.append("touches an accumulator of a product in flight")
        if written & group.operands:
            wrong.append("writes an operand of a product in flight")
    if instruction.name.startswith("EXIT") and not instruction.guard and any(map(any, in_flight)):
        wrong.append("ends the kernel with a product in flight")
    return wrong, state if state.dirty is None else state._replace(dirty=state.dirty | (written & read))


def _multiply(product: Product, state: State) -> tuple[list[str], State]:
    wrong = []
    if state.dirty is None:
        wrong.append("follows no ARRIVE")
    elif (product.operand | (product.accumulator if product.adds else NONE)) & state.dirty:
        wrong.append("reads a register written since ARRIVE")
    if any(product.operand & group.accumulators for group in (*state.groups, state.open_group)):
        wrong.append("reads an accumulator of a product in flight")
    group = state.open_group.plus(product)
    if product.ends_group:
        return wrong, state._replace(groups=(*state.groups, group), open_group=Group())
    return wrong, state._replace(open_group=group)


def _successors(code: list[Instruction]) -> Callable[[int], list[int]]:
    """The positions that may follow a position."""
    at = {instruction.address: position for position, instruction in enumerate(code)}

    def follow(position: int) -> list[int]:
        instruction = code[position]
        if instruction.name.startswith(("BRA", "BRX")):
            target = re.search(r"(0x[0-9a-f]+)\s*$", instruction.operands)
            is_conditional = bool(instruction.guard) or re.match(r"!?U?P\w", instruction.operands) is not None
            jump = [at[int(target[1], 16)]] if target and int(target[1], 16) in at else []
            return [*jump, position + 1] if is_conditional else jump
        if instruction.name.startswith(("EXIT", "RET")):
            return [position + 1] if instruction.guard else []
        return [position + 1]

    return follow


def _registers_over_limit(code: list[Instruction]) -> list[str]:
    """Registers that a role names above its limit by ``setmaxnreg``."""
    found, follow = [], _successors(code)
    for begin, instruction in enumerate(code):
        if not instruction.name.startswith("USETMAXREG"):
            continue
        limit = int(instruction.operands.rpartition(",")[2], 16)
        todo, seen, most = [begin + 1], {begin + 1}, -1
        while todo:
            position = todo.pop()
            product = code[position].product()
            most = max([most, *code[position].touched(), *(product.accumulator if product else NONE)])
            after = {p for p in follow(position) if p < len(code)} - seen
            seen |= after
            todo += after
        if most >= limit:
            found.append(f"{instruction.address:#x} a role of {limit} registers names R{most}")
    return found
