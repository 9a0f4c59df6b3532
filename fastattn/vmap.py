"""vmap of the operators: the mapped dimension of every argument is folded into the batch.

For packed sequences it becomes more sequences. So per-sample gradients run on the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.problem import DIFFERENTIABLE, TENSORS

Dims = Sequence[int | None]


def fold(size: int, in_dims: Dims, flat: Sequence[Any], per_sample: Sequence[str]) -> tuple[Any, ...]:
    """The operators' common arguments with ``size`` samples in one batch.

    What all samples share stays shared, unless its gradient is wanted ``per_sample``.
    """
    packed = is_packed(flat)
    batch = batch_size(flat, in_dims, "cu_seqlens_q") - 1 if packed else batch_size(flat, in_dims, "q")
    folded: list[Tensor | None] = []
    for name, x, dim in zip(TENSORS, flat, in_dims, strict=False):
        if x is None:
            folded.append(None)
        elif name in ("q", "k", "v"):
            folded.append(into_batch(size, dim, x))
        elif name == "rng_state":
            folded.append(x if dim is None else x.select(dim, 0))  # the batch index already tells samples apart
        elif name.startswith("cu_seqlens"):
            total = batch_size(flat, in_dims, "q" if name.endswith("_q") else "k")
            folded.append(_join_sequences(size, dim, x, total))
        elif name == "intervals" and packed:
            each = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(each.movedim(0, 2).flatten(2, 3))  # (V, 1, H, T, n, 2) -> (1, H, V * T, n, 2)
        elif dim is None and x.shape[0] == 1 and name not in per_sample:
            folded.append(x)
        else:
            folded.append(_for_each(size, batch, dim, x))
    return (*folded, *flat[len(TENSORS) :])


def _for_each(size: int, batch: int, dim: int | None, x: Tensor) -> Tensor:
    """``(1|B, ...)`` -> ``(size * B, ...)``."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def fold_tangents(
    size: int, in_dims: Dims, tangents: Sequence[Tensor | None], flat: Sequence[Any], folded: Sequence[Any]
) -> list[Tensor | None]:
    """Tangents of the inputs in ``flat``, in the shapes that these have in ``folded``."""
    found: list[Tensor | None] = []
    for name, dim, x in zip(DIFFERENTIABLE, in_dims, tangents, strict=True):
        primal = folded[TENSORS.index(name)]
        if x is None:
            found.append(None)
        elif name in ("q", "k", "v"):
            found.append(into_batch(size, dim, x))
        elif primal is flat[TENSORS.index(name)]:
            found.append(x)
        else:
            found.append(_for_each(size, primal.shape[0] // size, dim, x))
    return found


def unfold_gradients(
    size: int, grads: Sequence[Tensor], in_dims: Dims, flat: Sequence[Any], needs: Sequence[str]
) -> tuple[Any, Any]:
    """Gradients of folded inputs for each sample. What was shared within a sample has one in each."""
    by_sample = []
    for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
        if name not in needs:
            by_sample.append(grad)
            continue
        grad = grad.unflatten(0, (size, -1))
        was_shared = name in ("bias", "sinks") and batch_size(flat, in_dims, name) == 1
        by_sample.append(grad.sum(1, keepdim=True) if was_shared else grad)
    return tuple(by_sample), tuple(0 if name in needs else None for name in DIFFERENTIABLE)


def drops_alike(info: Any, in_dims: Dims, flat: Sequence[Any]) -> bool:
    """Whether samples share dropout's elements, which count from the first batch entry of a call.

    They do where they are asked to, and where no input is mapped: samples are gradients or tangents of one call then.
    """
    at = TENSORS.index("rng_state")
    if flat[at] is None or in_dims[at] is not None:
        return False
    return info.randomness == "same" or all(dim is None for dim in in_dims)


def one_by_one(size: int, in_dims: Dims, args: Sequence[Any], function: Callable[..., Any]) -> tuple[Any, Any]:
    """Each sample by a call of its own."""
    samples = []
    for n in range(size):
        at_n = (x.select(dim, n) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
        samples.append(function(*at_n))
    return tuple(torch.stack(each) for each in zip(*samples, strict=True)), (0,) * len(samples[0])


def into_batch(size: int, dim: int | None, x: Tensor) -> Tensor:
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def fold_lse(size: int, dim: int | None, x: Tensor | None, packed: bool) -> Tensor | None:
    if x is None or not packed:
        return None if x is None else into_batch(size, dim, x)
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.transpose(0, 1).flatten(1, 2)  # (V, H, T) -> (H, V * T)


def fold_rows(size: int, in_dims: Dims, rows: Sequence[Tensor | None], packed: bool) -> list[Tensor | None]:
    """``dout``, ``dlse``, ``out``, ``lse`` and ``lse_low``, or their tangents."""
    like_lse = (False, True, False, True, True)
    folded: list[Tensor | None] = []
    for dim, x, is_lse in zip(in_dims, rows, like_lse, strict=True):
        folded.append(fold_lse(size, dim, x, packed) if is_lse or x is None else into_batch(size, dim, x))
    return folded


def _join_sequences(size: int, dim: int | None, cu_seqlens: Tensor, total: int) -> Tensor:
    """Boundaries of ``size`` packed batches of ``total`` tokens, laid end to end."""
    each = cu_seqlens.expand(size, -1) if dim is None else cu_seqlens.movedim(dim, 0)
    begins = torch.arange(0, size * total, total, dtype=each.dtype, device=each.device)[:, None]
    end = each.new_full((1,), size * total)
    return torch.cat([(each[:, :-1] + begins).flatten(), end])


def unfold_outputs(size: int, results: Sequence[Tensor], packed: bool) -> tuple[Any, Any]:
    of_lse = 1 if packed else 0
    dims = (0, of_lse, of_lse)[: len(results)]
    return tuple(x.unflatten(dim, (size, -1)) for x, dim in zip(results, dims, strict=True)), dims


def is_packed(flat: Sequence[Any]) -> bool:
    return flat[TENSORS.index("cu_seqlens_q")] is not None


def batch_size(flat: Sequence[Any], in_dims: Dims, name: str) -> int:
    """The first dimension of one sample of an argument."""
    at = TENSORS.index(name)
    x, dim = flat[at], in_dims[at]
    return x.shape[1 if dim == 0 else 0]
