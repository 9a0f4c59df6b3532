"""Hooks into PyTorch's attention entry points: ``scaled_dot_product_attention`` and the flash-attention registry.

``override_sdpa`` serves every caller of the function, such as timm, diffusers and your own models. The registry entry
serves the calls that torch sends to its flash kernel on a CUDA device.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import register_flash_attention_impl

from fastattn import functional, ops, rng
from fastattn.decoding import attention_with_kv_cache
from fastattn.dispatch import requested
from fastattn.errors import InputError, UnsupportedError
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import dispatch_keys

# A backend of fastattn may call torch's attention, which must not come back here.
_serving: ContextVar[bool] = ContextVar("fastattn_serving_torch", default=False)


@dataclass
class SdpaReport:
    """A count of the calls under ``override_sdpa``. Prints as text.

    Attributes:
        served: calls that fastattn computed. Calls inside a compiled function are counted once, when it is compiled.
        fallbacks: calls that torch computed instead, by reason.
    """

    served: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"fastattn served {self.served} of {self.served + self.fallbacks.total()} attention calls"]
        lines += [f"  {count} left to torch: {reason}" for reason, count in self.fallbacks.most_common()]
        return "\n".join(lines)


@contextlib.contextmanager
def override_sdpa(*, quiet: bool = False) -> Iterator[SdpaReport]:
    """Make ``torch.nn.functional.scaled_dot_product_attention`` use fastattn inside the block, in every thread.

    It reaches all code that looks the function up at each call, ``F.scaled_dot_product_attention(...)``, including
    ``nn.MultiheadAttention``. A module that has executed ``from torch.nn.functional import
    scaled_dot_product_attention`` keeps torch's. A function compiled inside the block keeps fastattn after it. Calls
    that fastattn cannot compute, nested tensors for example, go to torch; the report counts them by reason and is
    printed to stderr at the end if there are any.

    Args:
        quiet: never print.

    Returns:
        a context manager that gives the ``SdpaReport``.

    Example:
        >>> import torch
        >>> from fastattn.integrations.torch import override_sdpa
        >>> q = torch.randn(1, 2, 5, 8)
        >>> with override_sdpa() as report:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> print(report)
        fastattn served 1 of 1 attention calls
    """
    ops.refuse_context_parallel()
    before, report = F.scaled_dot_product_attention, SdpaReport()
    F.scaled_dot_product_attention = _replacement(before, report)
    try:
        yield report
    finally:
        F.scaled_dot_product_attention = before
        if report.fallbacks and not quiet:
            print(report, file=sys.stderr)


def _replacement(original: Callable[..., Tensor], report: SdpaReport) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def by(function: Callable[..., Tensor]) -> Tensor:
            return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if torch.compiler.is_compiling():  # a refused call is an error here: it cannot be counted in a graph
            return by(functional.scaled_dot_product_attention)
        if _serving.get():
            return by(original)
        try:
            _refuse_foreign(query, key, value)
            with _now_serving():
                out = by(functional.scaled_dot_product_attention)
        except (InputError, UnsupportedError) as reason:
            report.fallbacks[str(reason).splitlines()[0]] += 1
            return by(original)
        report.served += 1
        return out

    return scaled_dot_product_attention


def _refuse_foreign(*tensors: Tensor) -> None:
    for x in tensors:
        if x.is_nested or x.layout != torch.strided:
            raise UnsupportedError("nested or sparse tensors; packed sequences go to fastattn.attention_varlen")


@contextlib.contextmanager
def _now_serving() -> Iterator[None]:
    token = _serving.set(True)
    try:
        yield
    finally:
        _serving.reset(token)


# --- torch's registry of flash attention ------------------------------------------------------------------------


def register_flash_attention(name: str = "fastattn") -> None:
    """Add fastattn to torch's registry of flash attention. This changes nothing until it is activated there.

    After ``torch.nn.attention.activate_flash_attention_impl("fastattn")``, what ``scaled_dot_product_attention`` sends
    to its flash kernel on a CUDA device (fp16 or bf16, no mask) is computed by fastattn, forward and backward, and so
    is ``torch.nn.attention.varlen.varlen_attn``, with its windows, pages and ``out`` as well.
    ``restore_flash_attention_impl()`` ends it. Not yet run on a GPU.

    Args:
        name: the name to register under.

    Example:
        >>> import torch
        >>> from fastattn.integrations.torch import register_flash_attention
        >>> register_flash_attention()
        >>> "fastattn" in torch.nn.attention.list_flash_attention_impls()
        True
    """
    register_flash_attention_impl(name, register_fn=_Override)


class _Override:
    """Replaces torch's flash operators, those that it has, on one device type until ``remove`` is called."""

    def __init__(self, device: str = "CUDA") -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, ours in (
            ("_scaled_dot_product_flash_attention", _flash_forward),
            ("_scaled_dot_product_flash_attention_backward", _flash_backward),
            ("_flash_attention_forward", _varlen_forward),
            ("_flash_attention_forward_no_dropout_inplace", _varlen_forward_into),
            ("_flash_attention_backward", _varlen_backward),
        ):
            if not hasattr(torch.ops.aten, name):
                continue
            kernel = _guarded(ours, _original(f"aten::{name}", device))
            self.library.impl(name, kernel, device, allow_override=True)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def _original(name: str, device: str) -> Callable[..., Any] | None:
    """torch's kernel for a device; None where this torch has none."""
    try:
        kernel = torch.library.get_kernel(name, device)
    except RuntimeError:
        return None
    keys = dispatch_keys(device)
    return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


def _guarded(ours: Callable[..., Any], original: Callable[..., Any] | None) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _serving.get() and original is not None:
            return original(*args, **kwargs)
        with _now_serving():
            return ours(*args, **kwargs)

    return kernel


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention``: ``(B, H, S, D)`` tensors, nine results."""
    if return_debug_mask:
        raise UnsupportedError("return_debug_mask: fastattn has no debug mask; see fastattn.attention_weights.")
    rng_state = rng.new_rng_state(query.device)  # returned also when unused: the schema wants a tensor
    flat = _flat(query, key, value, dropout_p, is_causal, rng_state, scale)
    out, lse, _ = torch.ops.fastattn.forward(*flat, query.requires_grad)
    results = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
    results = results.copy_(out.transpose(1, 2))  # in the memory order of query, as torch promises
    unused = rng_state.new_zeros(()).view(torch.uint64)
    debug_mask = query.new_empty(0)
    lengths = query.shape[2], key.shape[2]
    return results, lse, None, None, *lengths, rng_state.view(torch.uint64), unused, debug_mask


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    flat = _flat(query, key, value, dropout_p, is_causal, philox_seed.view(torch.int64), scale)
    grad_out, out = (x.transpose(1, 2).contiguous() for x in (grad_out, out))
    needs = [True, True, True, False, False]
    lse = logsumexp.contiguous()  # torch keeps no more of it
    grads = torch.ops.fastattn.backward(grad_out, None, out, lse, torch.zeros_like(lse), *flat, needs)
    dq, dk, dv = (x.transpose(1, 2) for x in grads[:3])
    return dq, dk, dv


def _flat(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, rng_state: Tensor, scale: float | None
) -> ops.Flat:
    """The common arguments of fastattn's operators, from those of torch's."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    inputs = Inputs(
        q, k, v, rng_state=rng_state if dropout_p else None, max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1]
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spec = AttentionSpec(scale, None, None, 0 if is_causal else None, "upper_left", dropout_p)
    return ops.flatten(inputs, spec, requested(None))


# --- packed sequences: torch.nn.attention.varlen ------------------------------------------------------------------


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """``aten::_flash_attention_forward``: packed ``(T, H, D)``, or ``(B, S, H, D)`` without boundaries; five results.

    With a ``block_table``, key and value are pages, and ``seqused_k`` says how many keys each sequence has.
    """
    if return_debug_mask or alibi_slopes is not None:
        raise UnsupportedError("return_debug_mask and alibi_slopes: call fastattn.attention or attention_weights.")
    rng_state = rng.new_rng_state(query.device)
    unused, debug_mask = rng_state.new_zeros(()).view(torch.uint64), query.new_empty(0)
    band = _sides(window_size_left, window_size_right, is_causal)
    if block_table is not None:
        lengths = seqused_k if seqused_k is not None else cum_seq_k if cum_seq_k is None else cum_seq_k.diff()
        out, lse = _of_pages((query, key, value), (cum_seq_q, max_q), lengths, block_table, band, scale)
    elif seqused_k is not None:
        raise UnsupportedError("seqused_k without a block_table: pack the keys that are in use, and pass cu_seq_k.")
    else:
        boundaries = (cum_seq_q, cum_seq_k, max_q, max_k)
        flat = _packed_flat((query, key, value), boundaries, dropout_p, band, rng_state, scale)
        out, lse, _ = torch.ops.fastattn.forward(*flat, query.requires_grad)
    return out, lse, rng_state.view(torch.uint64), unused, debug_mask


def _varlen_forward_into(out: Tensor, *args: Any, **options: Any) -> Tensor:
    """``aten::_flash_attention_forward_no_dropout_inplace``: the result goes to ``out``."""
    found, lse, *_ = _varlen_forward(*args, **options)
    out.copy_(found)
    return lse


def _varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_flash_attention_backward``."""
    band = _sides(window_size_left, window_size_right, is_causal)
    boundaries = (cum_seq_q, cum_seq_k, max_q, max_k)
    flat = _packed_flat((query, key, value), boundaries, dropout_p, band, rng_state.view(torch.int64), scale)
    lse, needs = logsumexp.contiguous(), [True, True, True, False, False]
    grads = torch.ops.fastattn.backward(
        grad_out.contiguous(), None, out.contiguous(), lse, torch.zeros_like(lse), *flat, needs
    )
    dq, dk, dv = grads[:3]
    return dq, dk, dv


Band = tuple[int | None, int | None]


def _sides(left: int | None, right: int | None, is_causal: bool) -> Band:
    """The band of a spec; -1 and None are unbounded."""
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    return left, 0 if is_causal else right


def _packed_flat(
    qkv: tuple[Tensor, Tensor, Tensor],
    boundaries: tuple[Tensor | None, Tensor | None, int, int],
    dropout_p: float,
    band: Band,
    rng_state: Tensor,
    scale: float | None,
) -> ops.Flat:
    starts_q, starts_k, longest_q, longest_k = boundaries
    inputs = Inputs(
        *qkv,
        cu_seqlens_q=None if starts_q is None else starts_q.to(torch.int32),
        cu_seqlens_kv=None if starts_k is None else starts_k.to(torch.int32),
        rng_state=rng_state if dropout_p else None,
        max_seqlen_q=longest_q,
        max_seqlen_kv=longest_k,
    )
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    return ops.flatten(inputs, AttentionSpec(scale, None, *band, "lower_right", dropout_p), requested(None))


def _of_pages(
    query_and_pages: tuple[Tensor, Tensor, Tensor],
    boundaries_q: tuple[Tensor | None, int],
    lengths: Tensor | None,
    block_table: Tensor,
    band: Band,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    if lengths is None:
        raise UnsupportedError("a block_table with neither seqused_k nor cu_seq_k: pass one, the lengths of the keys.")
    starts_q, longest_q = boundaries_q
    packed: dict[str, Any] = {"cu_seqlens_q": starts_q, "max_seqlen_q": longest_q} if starts_q is not None else {}
    found = attention_with_kv_cache(
        *query_and_pages, lengths.to(torch.int32), block_table=block_table, causal=False, window=band,
        scale=scale, return_lse=True, **packed,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found
