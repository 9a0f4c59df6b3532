"""Checks of what layers are built of, and of the tokens they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.functional import explain
from fastattn.torch_internals import autocast_dtype

Window = tuple[int | None, int | None]


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether ``x`` has the device of the parameters, and their dtype or one that autocast will change."""
    if x.device == weight.device and x.dtype == weight.dtype:
        return True
    return x.device == weight.device and x.is_floating_point() and autocast_dtype(x.device.type) is not None


def check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int, dropout: float) -> None:
    check_heads({"embed_dim": embed_dim}, num_heads, num_kv_heads, dropout)
    if embed_dim % num_heads:
        todo = "The heads share embed_dim evenly."
        raise input_error("num_heads", f"{num_heads} for embed_dim {embed_dim}", "a divisor of embed_dim", todo)


def check_heads(sizes: dict[str, int], num_heads: int, num_kv_heads: int, dropout: float) -> None:
    """Raise InputError unless a layer with these ``sizes``, heads and dropout can be built."""
    for name, size in {**sizes, "num_heads": num_heads, "num_kv_heads": num_kv_heads}.items():
        if size < 1:
            raise input_error(name, size, "a positive int", "Check the model's configuration.")
    if num_heads % num_kv_heads:
        todo = "Each key/value head serves num_heads // num_kv_heads query heads."
        raise input_error("num_kv_heads", f"{num_kv_heads} for num_heads {num_heads}", "a divisor of num_heads", todo)
    if not 0.0 <= dropout <= 1.0:
        raise input_error("dropout", dropout, "a probability in [0, 1]", "0 turns dropout off.")


def check_options(window: Window | None, softcap: float | None, backend: str | None) -> None:
    """Have ``fastattn.attention`` check its own arguments now rather than in the first forward pass."""
    x = torch.empty(1, 1, 1, 1, device="meta")
    explain(x, x, x, window=window, softcap=softcap, backend=backend)
