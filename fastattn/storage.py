"""Check that tensors lie inside their storage: kernels read addresses, and torch permits storages that are too small.

Such storages are common: sharded training frees parameters by ``untyped_storage().resize_(0)``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastattn.errors import input_error


def extent(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of its last."""
    if x.numel() == 0:
        return 0
    return x.element_size() * (1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)))


def holds(x: Tensor, size: int) -> bool:
    """Whether the storage of ``x`` has ``size`` bytes from its first element on."""
    return x.storage_offset() * x.element_size() + size <= x.untyped_storage().nbytes()


def check_storages(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raise InputError unless the memory of every tensor is as long as its shape and strides say."""
    for name, x in zip(names, tensors, strict=False):
        if x is None or x.layout is not torch.strided or not (size := extent(x)) or holds(x, size):
            continue
        given = f"a tensor of shape {tuple(x.shape)} in a storage of {x.untyped_storage().nbytes()} bytes"
        allowed = f"a storage of at least {x.storage_offset() * x.element_size() + size}"
        raise input_error(name, given, allowed, "It was freed or resized: gather a sharded parameter before the call.")


def model(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, heads_first: bool = False) -> Tensor:
    """A tensor without memory: ``torch.empty_like`` makes tensors alike of it in half the time of ``torch.empty``.

    ``heads_first`` exchanges the dimensions 1 and 2 of ``(B, S, H, D)``, whose order in memory stays.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    made = made.transpose(1, 2) if heads_first else made
    made.untyped_storage().resize_(0)
    return made
