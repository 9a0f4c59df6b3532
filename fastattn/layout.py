"""Layouts: the orders of dimensions that public functions accept, and the one order used internally.

Internally a dense batch is always ``(B, S, H, D)`` and a packed one ``(T, H, D)`` with ``cu_seqlens``. A layout only
names an order; these functions return strided views and never copy.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from fastattn.errors import input_error

Layout = Literal["BSHD", "BHSD", "THD"]
LAYOUTS: tuple[Layout, ...] = ("BSHD", "BHSD", "THD")


def to_internal(x: Tensor, layout: Layout) -> Tensor:
    """A ``(B, S, H, D)`` (or, packed, ``(T, H, D)``) view of ``x``."""
    return x.transpose(1, 2) if layout == "BHSD" else x


def from_internal(x: Tensor, layout: Layout) -> Tensor:
    """The view of ``(B, S, H, D)`` that ``layout`` names: the inverse of ``to_internal``."""
    return x.transpose(1, 2) if layout == "BHSD" else x


def check_layout(layout: str) -> None:
    if layout not in ("BSHD", "BHSD"):
        raise input_error(
            "layout", repr(layout), "'BSHD' or 'BHSD'", "For packed sequences call fastattn.attention_varlen."
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Check type, dtype, shape and device of a ``cu_seqlens`` tensor, without reading its values."""
    if not isinstance(cu_seqlens, Tensor):
        raise input_error(
            name, type(cu_seqlens).__name__, "an int32 tensor", f"Pass torch.tensor({name}, dtype=torch.int32)."
        )
    if cu_seqlens.dtype != torch.int32:
        raise input_error(name, cu_seqlens.dtype, "torch.int32", f"Pass {name}.to(torch.int32).")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise input_error(
            name, f"shape {tuple(cu_seqlens.shape)}", "shape (N + 1,)", "Pass the N + 1 boundaries of N sequences."
        )
    if cu_seqlens.device != device:
        raise input_error(name, f"device {cu_seqlens.device}", f"device {device}, that of q", "Move it with .to(...).")


def check_cu_seqlens_values(name: str, boundaries: list[int], total: int, max_seqlen: int) -> None:
    """Check the values of ``cu_seqlens``, for callers that have them on the host."""
    if boundaries[0] != 0:
        raise input_error(name, f"first value {boundaries[0]}", "first value 0", "Prepend a 0: it is a running sum.")
    lengths = [end - begin for begin, end in itertools.pairwise(boundaries)]
    if any(length < 0 for length in lengths):
        where = next(n for n, length in enumerate(lengths) if length < 0)
        raise input_error(
            name,
            f"{boundaries[where]} followed by {boundaries[where + 1]}",
            "values that never decrease",
            "Pass the running sum of the lengths.",
        )
    if boundaries[-1] != total:
        raise input_error(
            name,
            f"last value {boundaries[-1]}",
            f"last value {total}, the number of packed tokens",
            "The lengths must add up to the first dimension of the tensor.",
        )
    if lengths and max(lengths) > max_seqlen:
        raise input_error(
            name.replace("cu_seqlens", "max_seqlen"),
            max_seqlen,
            f"at least {max(lengths)}, the longest sequence",
            "Pass the longest length, or None to have it computed.",
        )
