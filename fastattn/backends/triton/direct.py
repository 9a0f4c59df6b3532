"""Launches of compiled kernels by the driver itself, from a block of parameters in which the addresses alone change.

Triton's launcher looks at each argument of each launch. Between calls of one kind nothing but addresses and the stream
changes, so the rest is packed once. Packing follows the signature that Triton compiled the kernel for; what is not
plain in it (tensor maps, clusters, scratch memory, cooperative grids, another vendor) is left to Triton's launcher.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.backends import driver

WARP = 32
SCRATCH_PARAMETERS = 2  # pointers that Triton adds behind those of the signature: null, as no kernel here uses them
FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
PLAIN = {
    "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0,
    "profile_scratch_size": 0, "cluster_dims": (1, 1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """A pointer among the arguments of a kernel: a tensor of the call, and an offset in bytes from its beginning."""

    tensor: int
    offset: int


def launcher(
    launched: Sequence[tuple[Any, tuple[int, int, int], tuple[Any, ...]]],
    place: Callable[[Address], tuple[int, int]],
    device: int,
) -> driver.Launch | None:
    """The launches of compiled kernels on grids with arguments; None if one of them is not plain.

    Args:
        launched: the kernel, the grid and the arguments of each, in the order of its signature.
        place: the number of a tensor among those whose addresses a call gives, and the offset in bytes.
        device: of the kernels.
    """
    if not launched or not all(_is_plain(kernel) for kernel, _, _ in launched):
        return None
    slots: dict[tuple[int, int], int] = {}
    constants, kernels = bytearray(), []
    for kernel, grid, arguments in launched:
        params: list[tuple[str, int]] = []
        for kind, value in _flat(tuple(kernel.src.signature.values()), arguments):
            if isinstance(value, Address):
                params.append(("slot", slots.setdefault(place(value), 8 * len(slots))))
            elif kind in FORMATS:
                params.append(("constant", len(constants)))
                constants += struct.pack(f"<{FORMATS[kind]}", value).ljust(8, b"\0")
            else:
                return None
        params += [("constant", len(constants))] * SCRATCH_PARAMETERS
        constants += bytes(8)
        kernels.append((kernel, grid, params))
    begins = {"slot": 0, "constant": 8 * len(slots)}
    placed = [
        driver.Placed(
            kernel.function,
            grid,
            WARP * kernel.metadata.num_warps,
            kernel.metadata.shared,
            tuple(begins[where] + offset for where, offset in params),
        )
        for kernel, grid, params in kernels
    ]
    order, pack_into = tuple(slots), struct.Struct(f"<{len(slots)}Q").pack_into

    def write(block: driver.Block, addresses: tuple[int, ...], held: Sequence[int] | None) -> None:
        pack_into(block.buffer, block.begin, *[addresses[tensor] + offset for tensor, offset in order])

    return driver.launcher(device, bytes(8 * len(slots)) + bytes(constants), placed, write)


def has_hooks(runtime: Any) -> bool:
    """Whether something asks Triton's launcher to be told of launches."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _is_plain(kernel: Any) -> bool:
    metadata = getattr(kernel, "metadata", None)
    if metadata is None or metadata.target.backend != "cuda":
        return False
    kernel._init_handles()
    return all(getattr(metadata, name, value) == value for name, value in PLAIN.items())


def _flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """The type of each parameter with its argument; constants that were compiled in have neither."""
    if isinstance(kinds, tuple):
        for kind, value in zip(kinds, values, strict=True):
            yield from _flat(kind, value)
    elif kinds != "constexpr":
        yield kinds, values
