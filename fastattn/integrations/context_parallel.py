"""Context parallel: attention over a sequence whose tokens are sharded across the ranks of a process group.

``SequenceSharding`` assigns tokens to ranks; the two functions return exactly the result of a single process:

- ``ring_attention`` passes keys and values round the ranks. It takes any number of heads and the memory of one rank's
  tokens.
- ``ulysses_attention`` exchanges tokens for heads, computes whole sequences for some heads, and exchanges them back. It
  sends fewer, larger messages; the number of ranks must divide the query heads.

With a causal mask and tokens assigned in order, the last rank would have most of the work. ``SequenceSharding``
assigns head and tail: of ``2 n`` chunks, rank ``r`` of ``n`` holds chunks ``r`` and ``2 n - 1 - r``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn import numerics, ops
from fastattn.arguments import Window, dense_problem
from fastattn.dispatch import check_name, requested
from fastattn.errors import input_error
from fastattn.functional import attention
from fastattn.problem import Inputs, check_inputs
from fastattn.reference import lse_dtype
from fastattn.spec import AttentionSpec, full_range, tile_range

NEEDS_QKV = [True, True, True, False, False]


@dataclass(frozen=True)
class SequenceSharding:
    """The assignment of the tokens of a sequence to ranks.

    Attributes:
        group: the ranks; None is all of them.
        head_tail: each rank holds an early and a late chunk, for balanced work under causal masks. False: tokens in
            order.

    Example:
        >>> import os, torch, torch.distributed as dist
        >>> from fastattn.integrations.context_parallel import SequenceSharding, ring_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sharding = SequenceSharding()
        >>> q = torch.randn(2, 64, 8, 32)
        >>> mine = sharding.shard(q)
        >>> sharding.unshard(ring_attention(mine, mine, mine, sharding, causal=True)).shape
        torch.Size([2, 64, 8, 32])
        >>> dist.destroy_process_group()
    """

    group: dist.ProcessGroup | None = None
    head_tail: bool = True

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def runs(self, length: int, rank: int) -> list[range]:
        """The positions that a rank holds of a sequence of ``length``, as runs in the order of its local tensor."""
        chunks = self.size * (2 if self.head_tail else 1)
        if length % chunks:
            allowed = f"a multiple of {chunks}, the number of chunks"
            raise input_error("length", length, allowed, "Pad the sequence at its end.")
        held = (rank, chunks - 1 - rank) if self.head_tail else (rank,)
        chunk = length // chunks
        return [range(n * chunk, (n + 1) * chunk) for n in held]

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The positions of this rank's tokens ``(length / size,)``, for example for rotary embedding."""
        return torch.tensor([i for run in self.runs(length, self.rank) for i in run], device=device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank has in full."""
        return x.index_select(dim, self.positions(x.shape[dim], x.device))

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor on every rank, gathered from all parts. It has no gradient."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim).index_select(dim, self._order(x.shape[dim] * self.size).argsort().to(x.device))

    def _order(self, length: int) -> Tensor:
        """The positions held by rank 0, then by rank 1, ..."""
        return torch.tensor([i for rank in range(self.size) for run in self.runs(length, rank) for i in run])


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: SequenceSharding,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``fastattn.attention`` over a sharded sequence; keys and values travel round the ring of ranks.

    Each rank computes its rows with one rank's keys while the next arrive, and merges the parts by log-sum-exp. Pairs
    outside the causal mask or window are not computed. In the backward pass keys, values and their gradients go round
    once more. Memory is that of the local tokens. Every rank must call it.

    Args:
        q: this rank's queries ``(B, S / size, H_q, D_qk)``, from ``sharding.shard``.
        k: this rank's keys ``(B, S / size, H_kv, D_qk)``.
        v: this rank's values ``(B, S / size, H_kv, D_v)``.
        sharding: which tokens these are.
        causal: as in ``attention``; it refers to the whole sequence, as do the other options.
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        backend: as in ``attention``.

    Returns:
        this rank's rows ``(B, S / size, H_q, D_v)``; differentiable.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: the backend asked for cannot serve the call.

    Source:
        Liu et al., "Ring attention with blockwise transformers for near-infinite context", 2023; head and tail chunks:
        Llama 3, section 3.3.2, 2024.
    """
    check_name(backend)
    inputs, spec = dense_problem(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=None,
        mask=None,
        alibi_slopes=None,
        sinks=None,
        segment_ids=None,
        dropout_p=0.0,
        rng_state=None,
        layout="BSHD",
    )
    check_inputs(inputs, spec)
    if q.shape[1] != k.shape[1]:
        raise input_error("k", f"{k.shape[1]} tokens", f"{q.shape[1]}, as q", "Shard both with the same sharding.")
    return _Ring.apply(inputs.q, inputs.k, inputs.v, sharding, spec, requested(backend))


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: SequenceSharding,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``fastattn.attention`` over a sharded sequence; ranks exchange tokens for heads, all to all, and back.

    Args:
        q: this rank's queries ``(B, S / size, H_q, D_qk)``; the number of ranks divides ``H_q``.
        k: this rank's keys ``(B, S / size, H_kv, D_qk)``; the number of ranks divides ``H_kv``, or the other way round.
        v: this rank's values ``(B, S / size, H_kv, D_v)``.
        sharding: which tokens these are.
        causal: as in ``attention``; it refers to the whole sequence, as do the other options.
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        backend: as in ``attention``.

    Returns:
        this rank's rows ``(B, S / size, H_q, D_v)``; differentiable.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: the backend asked for cannot serve the call.

    Source:
        Jacobs et al., "DeepSpeed Ulysses", 2023.
    """
    size, heads_q, heads_kv = sharding.size, q.shape[2], k.shape[2]
    if heads_q % size or (heads_kv % size and size % heads_kv):
        allowed = (
            f"a number of query heads that {size} ranks divide, and of key heads that they divide or that divides it"
        )
        raise input_error("q, k", f"{heads_q} and {heads_kv} heads", allowed, "ring_attention takes any number.")
    if heads_kv % size:
        k, v = (x.repeat_interleave(size // heads_kv, dim=2) for x in (k, v))
    order = sharding._order(q.shape[1] * size).to(q.device)
    q, k, v = (_tokens_for_heads(x, sharding).index_select(1, order.argsort()) for x in (q, k, v))
    out = attention(q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, backend=backend)
    assert isinstance(out, Tensor)
    return _heads_for_tokens(out.index_select(1, order), sharding)


# --- all to all -------------------------------------------------------------------------------------------------


def _tokens_for_heads(x: Tensor, sharding: SequenceSharding) -> Tensor:
    """``(B, S / n, H, D)`` of some tokens -> ``(B, S, H / n, D)`` of some heads, tokens in the order of ranks."""
    by_owner = x.unflatten(2, (sharding.size, -1)).movedim(2, 0)
    return _AllToAll.apply(by_owner, sharding.group).movedim(0, 1).flatten(1, 2)


def _heads_for_tokens(x: Tensor, sharding: SequenceSharding) -> Tensor:
    """The inverse."""
    by_owner = x.unflatten(1, (sharding.size, -1)).movedim(1, 0)
    return _AllToAll.apply(by_owner, sharding.group).movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Rank r gets ``x[r]`` of every rank, stacked; it is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


# --- ring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Some rows against some keys of one rank: slices of the local tensors, and the band between them."""

    rows: slice
    keys: slice
    spec: AttentionSpec


def _blocks(rows: list[range], keys: list[range], length: int, spec: AttentionSpec) -> Iterator[_Block]:
    """The blocks to compute between the tokens of two ranks, cut to the band."""
    for n, row_run in enumerate(rows):
        for m, key_run in enumerate(keys):
            begin, end = tile_range(spec, row_run.start, row_run.stop, length, length)
            j0, j1 = max(begin, key_run.start), min(end, key_run.stop)
            begin, end = tile_range(spec.transposed(), j0, j1, length, length)
            i0, i1 = max(begin, row_run.start), min(end, row_run.stop)
            if i0 < i1 and j0 < j1:
                first_row, first_key = row_run.start - n * len(row_run), key_run.start - m * len(key_run)
                rows_here, keys_here = slice(i0 - first_row, i1 - first_row), slice(j0 - first_key, j1 - first_key)
                yield _Block(rows_here, keys_here, _between(spec, range(i0, i1), range(j0, j1)))


def _between(spec: AttentionSpec, rows: range, keys: range) -> AttentionSpec:
    """The band of the whole sequence as one between some rows and some keys, whose diagonal is lower right."""
    shift = rows.stop - keys.stop
    left = None if spec.left is None else spec.left - shift
    right = None if spec.right is None else spec.right + shift
    between = AttentionSpec(spec.scale, spec.softcap, left, right)
    if full_range(between, 0, len(rows), len(rows), len(keys)) == (0, len(keys)):
        return AttentionSpec(spec.scale, spec.softcap)
    return between


class _Ring(torch.autograd.Function):
    """``(q, k, v)`` of this rank -> its rows of the output."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sharding: SequenceSharding, spec: AttentionSpec, backend: str | None
    ) -> Tensor:
        length = q.shape[1] * sharding.size
        mine, needs_grad = sharding.runs(length, sharding.rank), any(ctx.needs_input_grad)
        dtype = lse_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), numerics.NEVER, dtype=dtype)
        low = torch.zeros_like(lse)
        for source, (k_there, v_there) in _travelling((k, v), sharding):
            for block in _blocks(mine, sharding.runs(length, source), length, spec):
                flat = _flat(q, k_there, v_there, block, backend)
                here = torch.ops.fastattn.forward(*flat, needs_grad)
                _merge(out[:, block.rows], lse[:, :, block.rows], low[:, :, block.rows], here)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, low)
        ctx.sharding, ctx.spec, ctx.backend = sharding, spec, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, low = ctx.saved_tensors
        sharding, spec = ctx.sharding, ctx.spec
        length = q.shape[1] * sharding.size
        mine = sharding.runs(length, sharding.rank)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
        for source, (k_there, v_there) in _travelling((k, v), sharding):
            for block in _blocks(mine, sharding.runs(length, source), length, spec):
                dout_here, out_here = (x[:, block.rows].contiguous() for x in (dout, out))
                lses_here = (x[:, :, block.rows].contiguous() for x in (lse, low))
                flat = _flat(q, k_there, v_there, block, ctx.backend)
                grads = torch.ops.fastattn.backward(dout_here, None, out_here, *lses_here, *flat, NEEDS_QKV)
                dq[:, block.rows] += grads[0]
                dk[:, block.keys] += grads[1]
                dv[:, block.keys] += grads[2]
            dk, dv = _passed_on((dk, dv), sharding)  # gradients follow their keys, and end at the rank of the keys
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _flat(q: Tensor, k: Tensor, v: Tensor, block: _Block, backend: str | None) -> ops.Flat:
    q, k, v = q[:, block.rows], k[:, block.keys], v[:, block.keys]
    inputs = Inputs(q, k, v, max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1])
    return ops.flatten(inputs, block.spec, backend)


def _merge(out: Tensor, lse: Tensor, low: Tensor, here: tuple[Tensor, Tensor, Tensor]) -> None:
    """Merge the results of one block into ``out``, ``lse`` and ``low``, in place, weighted by shares of the softmax."""
    out_here, lse_here, low_here = here
    merged = numerics.merge_lse(torch.stack([lse, lse_here]), torch.stack([low, low_here]))
    share, share_here = merged[2].transpose(2, 3)[..., None]
    out.mul_(share).add_(out_here * share_here)
    lse.copy_(merged[0])
    low.copy_(merged[1])


def _travelling(tensors: tuple[Tensor, ...], sharding: SequenceSharding) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """``(rank, its tensors)`` for every rank, this one first; the next tensors arrive during the computation."""
    tensors = tuple(x.contiguous() for x in tensors)
    for step in range(sharding.size):
        last = step == sharding.size - 1
        arriving, pending = (tensors, []) if last else _send_on(tensors, sharding)
        yield (sharding.rank - step) % sharding.size, tensors
        for work in pending:
            work.wait()
        tensors = arriving


def _passed_on(tensors: tuple[Tensor, ...], sharding: SequenceSharding) -> tuple[Tensor, ...]:
    arriving, pending = _send_on(tensors, sharding)
    for work in pending:
        work.wait()
    return arriving


def _send_on(tensors: tuple[Tensor, ...], sharding: SequenceSharding) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
    """Start to send contiguous tensors to the next rank and to receive others; keep them until that is done."""
    if sharding.size == 1:
        return tensors, []
    group = sharding.group or dist.group.WORLD
    assert group is not None
    to, source = (dist.get_global_rank(group, (sharding.rank + by) % sharding.size) for by in (1, -1))
    arriving = tuple(torch.empty_like(x) for x in tensors)
    operations = [dist.P2POp(dist.isend, x, to, group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, source, group) for x in arriving]
    return arriving, dist.batch_isend_irecv(operations)
