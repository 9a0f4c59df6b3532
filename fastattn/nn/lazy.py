"""Attention weights that are computed when they are first read.

``nn.MultiheadAttention`` returns weights by default, and most callers discard them. A ``LazyTensor`` has a shape, dtype
and device; any operation, ``repr``, ``numpy`` or pickle on it computes the real tensor first, with the gradients that
it would have had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastattn import state
from fastattn.arguments import autocast
from fastattn.dispatch import requested_now
from fastattn.errors import input_error
from fastattn.inspection import attention_weights, mean_attention_weights, weights_of_call
from fastattn.ops import without_autocast
from fastattn.torch_internals import (
    is_in_forward_mode,
    is_traced,
    is_transformed,
    is_watched,
    make_wrapper,
    without_torch_function,
)

_PROPERTIES = ("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_cuda", "is_cpu", "is_sparse")
_METHODS = ("dim", "size", "numel", "__len__", "is_floating_point", "is_complex", "element_size", "ndimension")
_KNOWN = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class LazyTensor(Tensor):
    """A tensor that is computed when it is first read; ``lazily`` makes one.

    Callers in Python get the real tensor through ``__torch_function__``, which runs before autograd. Callers that
    bypass it, such as a ``torch.autograd.Function``, send their gradient to this tensor's own history, which computes
    the same.
    """

    _source: _Source
    _node: Any

    def read(self) -> Tensor:
        """The tensor itself."""
        history = _history(self)
        value = self._source.value()
        return value if history is None or history is self._node else _Linked.apply(self, value.detach())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN and isinstance(args[0], LazyTensor):
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        if len(args) == 1 and not kwargs and isinstance(args[0], LazyTensor):
            return func(args[0].read())  # the commonest look, without the time that a tree takes
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Serve callers in C++, which bypass ``__torch_function__``; autograd has recorded the history before this."""
        args, kwargs = tree_map_only(LazyTensor, lambda x: x._source.value().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.read(), memo)


class _Source:
    """The tensor that a lazy one stands for, computed once, with gradients recorded if they were at first."""

    def __init__(self, compute: Callable[[], Tensor], reads: Sequence[Tensor]) -> None:
        self.compute: Callable[[], Tensor] | None = compute
        self.result: Tensor | None = None
        self.records = torch.is_grad_enabled()
        self.watched = [(x, x._version) for x in reads if not x.is_inference()]

    def value(self) -> Tensor:
        if self.result is None:
            assert self.compute is not None
            if any(x._version != version for x, version in self.watched):
                todo = "Read the weights before changing what they are computed from, or pass need_weights=False."
                raise input_error("attention weights", "a mask, queries or keys changed in place", "none", todo)
            with torch.set_grad_enabled(self.records):
                self.result = self.compute()
            self.compute, self.watched = None, []
        return self.result


def lazily(
    compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, reads: Sequence[Tensor]
) -> LazyTensor:
    """A tensor whose value ``compute`` returns when it is first read.

    Args:
        compute: called once.
        shape: of its result.
        dtype: of its result.
        reads: the tensors that ``compute`` reads, at least one; reading the result after one of them was changed in
            place is an error.
    """
    source = _Source(compute, reads)
    if not source.records or not any(x.requires_grad for x in reads):
        return _lazy(source, shape, dtype, reads[0].device)
    made: LazyTensor = _record(source, shape, dtype, *reads)
    return made


def _history(lazy: LazyTensor) -> Any:
    with without_torch_function():
        return lazy.grad_fn


def _lazy(source: _Source, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> LazyTensor:
    made = make_wrapper(LazyTensor, tuple(shape), dtype=dtype, device=device)
    made._source, made._node = source, None
    return made


class _History(torch.autograd.Function):
    """The derivative of a lazy tensor that was used without being read."""

    @staticmethod
    def forward(ctx: Any, source: _Source, shape: Sequence[int], dtype: torch.dtype, *reads: Tensor) -> LazyTensor:
        ctx.source, ctx.reads = source, reads
        made = _lazy(source, shape, dtype, reads[0].device)
        made._node = ctx  # its grad_fn
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = [x for x in ctx.reads if x.requires_grad]
        grads = iter(torch.autograd.grad(ctx.source.value(), wanted, grad, allow_unused=True))
        return None, None, None, *(next(grads) if x.requires_grad else None for x in ctx.reads)


# Function.apply without what it does first for torch.func (docs/decisions/plans.md): no transform comes here.
_record = super(torch.autograd.Function, _History).apply


class _Linked(torch.autograd.Function):
    """The value of a lazy tensor whose history was replaced, as checkpointing does; gradients go to the lazy one."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def weights_when_read(
    q: Tensor,
    k: Tensor,
    dtype: torch.dtype,
    *,
    mean: bool = False,
    unbatched: bool = False,
    owned: bool = False,
    **options: Any,
) -> Tensor:
    """The weights of ``attention(q, k, v, **options)``, computed when they are first read.

    Under a compiler, a tracer or a transform they are computed at once; unused results are removed there.

    Args:
        q: ``(B, S_q, H_q, D)``.
        k: ``(B, S_kv, H_kv, D)``.
        dtype: of the weights.
        mean: average over the heads.
        unbatched: B is 1, and left out of the result.
        owned: no other code can change ``q`` and ``k`` in place. Changes of inference tensors cannot be detected, so
            if these are not owned the weights are computed at once.
        options: of ``fastattn.attention``.

    Returns:
        ``(B, H_q, S_q, S_kv)``, or ``(B, S_q, S_kv)`` if averaged.
    """
    tensors = [q, k]
    for option in options.values():
        if isinstance(option, Tensor):
            tensors.append(option)
        elif isinstance(option, tuple):  # segment ids of queries and keys, or a window
            tensors += [x for x in option if isinstance(x, Tensor)]
    if not _is_plain_eager(tensors) or not (owned or _has_count(q, k)):
        weights = (mean_attention_weights if mean else attention_weights)(q, k, **options).to(dtype)
        return weights[0] if unbatched else weights
    q, k = tensors[:2] = autocast(q, k)
    if not _has_count(*tensors[2:]):
        options = {name: _counted(x) for name, x in options.items()}
        tensors = [x for x in tensors if not x.is_inference()]  # nobody else can change the copies
    is_sharded = state.whole_rows is not None

    def compute() -> Tensor:
        if is_sharded:
            todo = "Pass need_weights=False, or leave the context-parallel block for the calls whose weights you read."
            raise input_error("attention weights", "tokens of one rank, of a call on those of all ranks", "none", todo)
        with without_autocast(q.device.type):
            weights = weights_of_call(q, k, mean, options, dtype)
        return weights[0] if unbatched else weights

    shape = (q.shape[1], k.shape[1]) if mean else (q.shape[2], q.shape[1], k.shape[1])
    return lazily(compute, shape if unbatched else (q.shape[0], *shape), dtype, tensors or [q])


LITTLE = 1 << 15  # scores, below which torch's function for a layer takes less time than a kernel and a look at them


def have_little_weights(tensors: Sequence[Tensor], count: int) -> bool:
    """Whether an eager call on a CPU has so few scores that torch's function for the whole layer is the fastest.

    Args:
        tensors: the queries, keys and values, or what they are projected from.
        count: of scores.
    """
    if not 0 < count <= LITTLE or is_watched() or any(type(x) is not Tensor or not x.is_cpu for x in tensors):
        return False
    return requested_now(None) is None and state.whole_rows is None


def _has_count(*tensors: Tensor) -> bool:
    return not any(x.is_inference() for x in tensors)


def _counted(option: Any) -> Any:
    """The option, with inference tensors copied, because changes of them in place cannot be detected."""
    if isinstance(option, tuple):
        return tuple(map(_counted, option))
    return option.clone() if isinstance(option, Tensor) and option.is_inference() else option


def _is_plain_eager(tensors: list[Tensor]) -> bool:
    """Whether nothing watches or transforms the call; a profiler and autocast may."""
    if torch.compiler.is_compiling() or is_transformed() or is_traced() or is_in_forward_mode():
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
