"""The text of PTX as instructions with operands."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Register:
    """A virtual register, by its name."""

    name: str


@dataclass(frozen=True)
class Number:
    """The bits of an immediate operand; negative integers are as written."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A name: a parameter, a variable, a label or a special register."""

    name: str


@dataclass(frozen=True)
class Vector:
    """Registers in braces."""

    items: tuple[Register | Number | Symbol, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Number
    offset: int


@dataclass(frozen=True)
class Place:
    """``[map, {coordinates}]``: a box in the tensor that a tensor map describes."""

    map: Register | Symbol | Number
    coordinates: tuple[Register | Number | Symbol, ...]


Operand = Register | Number | Symbol | Vector | Address | Place


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate register that decides which threads execute it, or None.
        negated: whether they do where it is false.
        opcode: its parts, for example ("add", "s32").
        operands: as written, results first.
        text: the line, for messages.
    """

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel: its instructions, the place of each label, and the types of its parameters in order."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[tuple[str, str], ...]
    threads: int


_PARAMETER = re.compile(r"\.param\s+(?:\.align \d+ )?\.(\w+)(?:\s+\.ptr[^,)]*?)?\s+(\w+)(?:\[\d+\])?\s*[,)\n]")
_SCOPE = re.compile(r"(?m)^\s*\{\s*(\.reg .*)\}\s*$")
_DECLARED = re.compile(r"\.reg \.\w+ ([\w, ]+);")
_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)")


def parse(ptx: str) -> Program:
    """The program of the one kernel that ``ptx`` holds."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{(.*)\}", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the text holds no kernel")
    name, declared, directives, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _statements(_SCOPE.sub(_opened, body)):
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif not line.startswith("."):
            instructions.append(_instruction(line))
    parameters = tuple((kind, of) for kind, of in _PARAMETER.findall(declared + "\n"))
    return Program(name, tuple(instructions), labels, parameters, int(threads[1]) if threads else 0)


def _opened(scope: re.Match[str]) -> str:
    """The statements of a scope on one line, its own registers under names that begin as all others do."""
    text = scope[1]
    names = [name.strip() for declared in _DECLARED.findall(text) for name in declared.split(",")]
    for name in names:
        text = re.sub(rf"(?<![\w.%$]){name}(?!\w)", f"%{name}_of_scope", text)
    return re.sub(_DECLARED, "", text).replace(".reg", "")


def _statements(body: str) -> list[str]:
    """Labels, directives and instructions, one each; scopes of inline assembly are opened."""
    body = re.sub(r"(?m)^\s*(\$?\w+):", r"\n\1:\n", body)
    found = []
    for line in re.split(r"[;\n]", body):
        text = " ".join(line.split())
        if not _is_operand_list(text):
            text = text.strip("{} ")
        if text:
            found.append(text)
    return found


def _is_operand_list(text: str) -> bool:
    """Whether braces in a statement hold registers rather than statements."""
    return re.search(r"\{\s*%|\{\s*_", text) is not None


def _instruction(line: str) -> Instruction:
    guarded = _GUARD.match(line)
    negated, guard, rest = (guarded[1] == "!", guarded[2], guarded[3]) if guarded else (False, None, line)
    opcode, _, operands = rest.partition(" ")
    parts = tuple(part for part in opcode.replace("::", "_").split(".") if part)
    return Instruction(guard, negated, parts, tuple(_operand(x) for x in _split(operands)), line)


def _split(operands: str) -> list[str]:
    """Operands between commas outside braces and brackets; ``%p|%q`` is two."""
    found, depth, current = [], 0, ""
    for char in operands:
        depth += (char in "{[") - (char in "}]")
        if depth == 0 and char in ",|":
            found.append(current.strip())
            current = ""
        else:
            current += char
    return [x for x in (*found, current.strip()) if x]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_simple(x.strip()) for x in text.strip("{} ").split(",")))
    if text.startswith("[") and "," in text:
        pointer, _, coordinates = text.strip("[] ").partition(",")
        return Place(_simple(pointer.strip()), tuple(_simple(x.strip()) for x in coordinates.strip("{} ").split(",")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(_simple(base.strip()), int(offset.strip() or "0", 0))
    return _simple(text)


def _simple(text: str) -> Register | Number | Symbol:
    if text.startswith("%") and not text.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid")):
        return Register(text)
    if text.startswith(("0f", "0F")):
        return Number(int(text[2:], 16), True)
    if text.startswith(("0d", "0D")):
        return Number(int(text[2:], 16), True)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Number(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d+", text):
        return Number(struct.unpack("<I", struct.pack("<f", float(text)))[0], True)
    return Symbol(text)
