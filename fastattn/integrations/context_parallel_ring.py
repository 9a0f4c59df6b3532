"""Attention over documents whose keys arrive rank by rank: blocks are computed one by one and merged by log-sum-exp.

A block is a call on a few tokens, whose backend numbers them from 0. What depends on the place in the document:

- The band becomes the band of the block.
- ALiBi: outside the diagonal all keys of a block lie on one side of its rows, so with ``near`` the key next to them
  ``-slope |i - j| = -slope |i - near| - slope |near - j|``: a number for each row, which only moves the log-sum-exp,
  and a bias for each key.
- Dropout: ``rng_state`` carries where the block begins; see ``rng.py``. Kernels count from 0, so ``portable`` serves.
- Sinks take part once, after the last block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn import numerics, ops
from fastattn.backends.base import Backend, Outputs
from fastattn.backends.portable import terms
from fastattn.dispatch import select
from fastattn.integrations.context_parallel_sharding import Block, SequenceSharding, blocks
from fastattn.problem import Inputs, Problem
from fastattn.reference import lse_dtype
from fastattn.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """What a call has besides the tensors with a gradient.

    Attributes:
        sharding: which tokens these are.
        spec: of the whole documents.
        backend: asked for by name.
        mask: ``(1|B, 1|H_q, 1|T, 1|T_row)``, this rank's rows and the keys of the whole row.
        alibi_slopes: ``(1|B, H_q)``.
        segment_ids_q: ``(1|B, T)``, with ``segment_ids_kv`` of this rank's keys.
        rng_state: ``(2,)``, the same on every rank.
        heads: number of query heads in all, of which these begin at ``first_head``.
    """

    sharding: SequenceSharding
    spec: AttentionSpec
    backend: str | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    segment_ids_q: Tensor | None
    segment_ids_kv: Tensor | None
    rng_state: Tensor | None
    heads: int
    first_head: int = 0

    def blocks(self, tokens: int, source: int) -> Iterator[Block]:
        """Between this rank's ``tokens`` and the keys of ``source``."""
        length = self.sharding.row_length(tokens)
        mine, theirs = (self.sharding.runs_in_documents(length, rank) for rank in (self.sharding.rank, source))
        return blocks(mine, theirs, self.spec)

    def travelling(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """``(rank, its k, v and segment ids)`` for every rank."""
        segments = () if self.segment_ids_kv is None else (self.segment_ids_kv,)
        return _travelling((k, v, *segments), self.sharding)


class Attend(torch.autograd.Function):
    """``(q, k, v, bias, sinks)`` of this rank -> its rows of the output."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, call: Call
    ) -> Tensor:
        needs_grad, dtype = any(ctx.needs_input_grad), lse_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), numerics.NEVER, dtype=dtype)
        low = torch.zeros_like(lse)
        with ops.without_autocast(q.device.type):
            for source, there in call.travelling(k, v):
                for block in call.blocks(q.shape[1], source):
                    part = _Part.of(q, there, bias, block, call)
                    here = part.backend(call, needs_grad).forward(part.inputs, part.spec)
                    rows = block.rows
                    _merge(out[:, rows], lse[:, :, rows], low[:, :, rows], part.whole(here))
            if sinks is not None:
                out, lse, low = terms.add_sinks(out, lse, low, Inputs(q, k, v, sinks=sinks))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, low)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, lse, low = ctx.saved_tensors
        call = ctx.call
        needs = ["q", "k", "v"] + (["bias"] if ctx.needs_input_grad[3] else [])
        zeros = {"dtype": lse.dtype, "memory_format": torch.contiguous_format}
        dq, dk, dv = (torch.zeros_like(x, **zeros) for x in (q, k, v))
        dbias = torch.zeros_like(bias, **zeros) if "bias" in needs else None
        with ops.without_autocast(q.device.type):
            for source, there in call.travelling(k, v):
                for block in call.blocks(q.shape[1], source):
                    part = _Part.of(q, there, bias, block, call)
                    rows = block.rows
                    dout_here, out_here = (x[:, rows].contiguous() for x in (dout, out))
                    lses = part.of_block(lse[:, :, rows], low[:, :, rows])
                    chosen = part.backend(call, needs_grad=True)
                    grads = chosen.backward(dout_here, None, out_here, *lses, part.inputs, part.spec, needs)
                    of_bias = None if dbias is None else _window(dbias, block)
                    into = dq[:, rows], dk[:, block.keys], dv[:, block.keys], of_bias
                    for total, grad in zip(into, (grads.dq, grads.dk, grads.dv, grads.dbias), strict=True):
                        if total is not None and grad is not None:
                            total += grad.sum_to_size(total.shape)
                # gradients follow their keys, and are home after the last step
                dk, dv = _passed_on((dk, dv), call.sharding, source)
            dsinks = None
            if ctx.needs_input_grad[4]:
                dsinks = terms.sink_gradient(dout, None, out, lse, low, Inputs(q, k, v, sinks=sinks))
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks, None


@dataclass(frozen=True)
class _Part:
    """A block as a call of its own.

    Attributes:
        inputs: its tensors.
        spec: its scalars.
        shift: ``(1|B, H_q, M)``, what the scores of each row lack; None is 0.
    """

    inputs: Inputs
    spec: AttentionSpec
    shift: Tensor | None

    @classmethod
    def of(cls, q: Tensor, there: tuple[Tensor, ...], bias: Tensor | None, block: Block, call: Call) -> _Part:
        rows, keys = block.rows, block.keys
        q, k, v = q[:, rows], there[0][:, keys], there[1][:, keys]
        slopes, shift, bias = None, None, None if bias is None else _window(bias, block)
        if call.alibi_slopes is not None and block.is_square:
            slopes = call.alibi_slopes
        elif call.alibi_slopes is not None:
            added, shift = _alibi(call.alibi_slopes.to(lse_dtype(q.dtype)), block)
            bias = added if bias is None else bias + added
        segments_q = None if call.segment_ids_q is None else call.segment_ids_q[:, rows]
        inputs = Inputs(
            q, k, v, bias, None if call.mask is None else _window(call.mask, block), slopes,
            segment_ids_q=segments_q, segment_ids_kv=None if segments_q is None else there[2][:, keys],
            rng_state=_placed(block, call), max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1],
        )  # fmt: skip
        return cls(inputs, block.spec, shift)

    def backend(self, call: Call, needs_grad: bool) -> Backend:
        asked = "portable" if call.backend is None and self.spec.dropout_p else call.backend
        return select(Problem.of(self.inputs, self.spec, needs_grad), asked)

    def whole(self, results: Outputs) -> Outputs:
        """The results of the block with log-sum-exps of the whole document's scores."""
        out, lse, low = results
        return results if self.shift is None else (out, *numerics.shifted_lse(lse, low, self.shift))

    def of_block(self, lse: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, of log-sum-exps."""
        if self.shift is not None:
            lse, low = numerics.shifted_lse(lse, low, -self.shift)
        return lse.contiguous(), low.contiguous()


def _window(x: Tensor, block: Block) -> Tensor:
    """The part of a ``(1|B, 1|H_q, 1|T, 1|T_row)`` tensor that a block sees."""
    for dim, span in ((2, block.rows), (3, block.columns)):
        if x.shape[dim] > 1:
            x = x.narrow(dim, span.start, span.stop - span.start)
    return x


def _alibi(slopes: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """``(1|B, H_q, 1, N)`` and ``(1|B, H_q, M)``: the bias of each key, and what it leaves to each row."""
    rows, keys = (x.stop - x.start for x in (block.rows, block.keys))
    near = block.key if block.key > block.row else block.key + keys - 1
    i = torch.arange(block.row, block.row + rows, device=slopes.device)
    j = torch.arange(block.key, block.key + keys, device=slopes.device)
    of_row, of_key = (-slopes[..., None] * (x - near).abs().to(slopes.dtype) for x in (i, j))
    return of_key[:, :, None], of_row


def _placed(block: Block, call: Call) -> Tensor | None:
    if call.rng_state is None:
        return None
    documents = 1 if call.sharding.lengths is None else len(call.sharding.lengths)
    place = [block.row, block.key, block.document * call.heads + call.first_head, documents * call.heads]
    return torch.cat([call.rng_state, call.rng_state.new_tensor(place)])


def _merge(out: Tensor, lse: Tensor, low: Tensor, here: Outputs) -> None:
    """Add the keys of one block to what is there, in place: weighted by their shares of the softmax."""
    out_here, lse_here, low_here = here
    merged = numerics.merge_lse(torch.stack([lse, lse_here]), torch.stack([low, low_here]))
    share, share_here = merged[2].transpose(2, 3)[..., None]
    out.mul_(share).add_(out_here * share_here)
    lse.copy_(merged[0])
    low.copy_(merged[1])


# --- the ring -----------------------------------------------------------------------------------------------------


def _travelling(tensors: tuple[Tensor, ...], sharding: SequenceSharding) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """``(rank, its tensors)`` for every rank, the own one first; the next ones are on their way meanwhile."""
    tensors = tuple(x.contiguous() for x in tensors)
    for step in range(sharding.size):
        source = (sharding.rank - step) % sharding.size
        last = step == sharding.size - 1
        arriving, pending = (tensors, []) if last else _send_on(tensors, sharding, source)
        yield source, tensors
        for work in pending:
            work.wait()
        tensors = arriving


def _passed_on(tensors: tuple[Tensor, ...], sharding: SequenceSharding, source: int) -> tuple[Tensor, ...]:
    arriving, pending = _send_on(tensors, sharding, source)
    for work in pending:
        work.wait()
    return arriving


def _send_on(
    tensors: tuple[Tensor, ...], sharding: SequenceSharding, source: int
) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
    """Begin to send the contiguous tensors of rank ``source`` to the next rank, and to receive those before them.

    They must live on until it is done.
    """
    if sharding.size == 1:
        return tensors, []
    group = sharding.processes()
    to, giver = (dist.get_global_rank(group, (sharding.rank + by) % sharding.size) for by in (1, -1))
    length = tensors[0].shape[1] * sharding.size if sharding.lengths is None else sum(sharding.lengths)
    tokens = sharding.num_tokens(length, (source - 1) % sharding.size)
    arriving = tuple(x.new_empty((x.shape[0], tokens, *x.shape[2:])) for x in tensors)
    operations = [dist.P2POp(dist.isend, x, to, group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, giver, group) for x in arriving]
    return arriving, dist.batch_isend_irecv(operations)
