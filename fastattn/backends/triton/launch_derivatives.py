"""The host side of Jacobian-vector products of both passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.triton import scans
from fastattn.backends.triton.arguments import Bshd, Flags, PerHead, PerRow, Stats
from fastattn.backends.triton.backward_jvp import (
    backward_jvp_dbias_kernel,
    backward_jvp_dkdv_kernel,
    backward_jvp_dq_kernel,
    backward_jvp_dsinks_kernel,
    backward_jvp_preprocess_kernel,
)
from fastattn.backends.triton.bias_sums import BiasSums
from fastattn.backends.triton.derived_configs import config_of
from fastattn.backends.triton.jvp import Moved, jvp_kernel
from fastattn.backends.triton.launch import (
    ALWAYS,
    DSINKS_ROWS,
    PREPROCESS_ROWS,
    Backward,
    Call,
    _rows,
    _scores,
    compiled,
    target,
)
from fastattn.backends.triton.plans import device_of, launched
from fastattn.problem import Grads, Inputs, Rows, Tangents
from fastattn.spec import AttentionSpec


def jvp(tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse."""
    assert results.out is not None and results.lse is not None and results.lse_low is not None
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.empty(inputs.lse_shape(), dtype=torch.float32, device=out.device)
    if lse.numel() == 0:
        return out, lse
    with device_of(out):
        call, moved = _moving(Call.of(inputs, spec), tangents, inputs, spec)
        x, config = call.inputs, config_of(call, "jvp")
        grid, schedule = call.schedule(x.max_seqlen_q, config.block_m, x.batch * x.heads_q)
        terms = call.with_tiles("q", config.block_m, config.block_n)
        launched(jvp_kernel, grid)(
            call.q, call.k, call.v, moved, _rows(results.out.contiguous()), PerRow.of(results.lse.contiguous()),
            PerRow.of(results.lse_low.contiguous()), _rows(out), PerRow.of(lse), terms, call.sizes, schedule,
            **compiled(x.q.device, call.flags, config),
        )  # fmt: skip
    return out, lse


def backward_jvp(
    rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
) -> Grads:
    """The tangents of the gradients named in ``needs``."""
    with device_of(inputs.q):
        pass_ = BackwardJvp.of(rows, moved, tangents, inputs, spec)
        dk, dv = pass_.dkdv() if "k" in needs or "v" in needs else (None, None)
        return Grads(
            dq=pass_.dq() if "q" in needs else None,
            dk=dk if "k" in needs else None,
            dv=dv if "v" in needs else None,
            dbias=pass_.dbias() if "bias" in needs and inputs.bias is not None else None,
            dsinks=pass_.dsinks() if "sinks" in needs and inputs.sinks is not None else None,
        )


def _moving(call: Call, tangents: Tangents, inputs: Inputs, spec: AttentionSpec) -> tuple[Call, Moved]:
    """The call, whose flags then hold for the tangents, too, and these."""
    moving = {name: x for name in ("q", "k", "v") if (x := getattr(tangents, name)) is not None}
    # keys and values that no query keeps become zeros in a call, and so do their tangents
    along = Call.of(inputs.replace(**moving), spec)
    call = _sharing(call, along.flags.vector, along.flags.contiguous)
    q, k, v = (getattr(along, name) if name in moving else None for name in ("q", "k", "v"))
    moved = Moved(
        q,
        k,
        v,
        bias=None if tangents.bias is None else _scores(tangents.bias),
        sinks=None if tangents.sinks is None else PerHead.of(tangents.sinks),
    )
    return call, moved


def _sharing(call: Call, vector: int, contiguous: bool) -> Call:
    """The call with flags that hold for further tensors, too."""
    flags = call.flags
    flags = dataclasses.replace(
        flags, vector=min(flags.vector, vector), contiguous=flags.contiguous and contiguous
    )  # fmt: skip
    return dataclasses.replace(call, flags=flags)


@dataclass(frozen=True)
class BackwardJvp:
    """A backward pass, the tangents of what it takes, and the statistics of each row of both."""

    call: Call
    dout: Bshd
    moved: Moved
    stats: Stats
    moving: Stats

    @classmethod
    def of(cls, rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec) -> BackwardJvp:
        assert rows.dout is not None and rows.out is not None and rows.lse is not None and rows.lse_low is not None
        pass_ = Backward.of(rows.dout, rows.dlse, rows.out, rows.lse, rows.lse_low, inputs, spec)
        call, along = _moving(pass_.call, tangents, inputs, spec)
        if moved.dout is not None:
            dout = _rows(moved.dout)
            call = _sharing(call, dout.vector(), moved.dout.stride(-1) == 1)
            along = along._replace(dout=dout)
        self = cls(call, pass_.dout, along, pass_.stats, Stats.like(rows.lse))
        if rows.lse.numel():
            self._fill(rows.out, moved)
        return self

    def _fill(self, out: Tensor, moved: Rows) -> None:
        assert moved.out is not None and moved.lse is not None
        call, full = self.call, self.call.flags
        x = call.inputs
        grid, schedule = call.schedule(x.max_seqlen_q, PREPROCESS_ROWS, x.batch * x.heads_q)
        flags = Flags(
            full.d_v, full.d_v, full.block_v, full.block_v, vector=full.vector, contiguous=full.contiguous,
            packed=full.packed, upcast=full.upcast,
        )  # fmt: skip
        launched(backward_jvp_preprocess_kernel, grid)(
            _rows(out.contiguous()), self.dout, _rows(moved.out.contiguous()), self.moved.dout,
            PerRow.of(moved.lse.contiguous()), None if moved.dlse is None else PerRow.of(moved.dlse.contiguous()),
            self.moving, call.terms, call.sizes, schedule, F=flags, BLOCK_M=PREPROCESS_ROWS, **ALWAYS,
        )  # fmt: skip

    def _in_chunks(self, most: int) -> Flags:
        """Flags of a kernel that has no registers for rows of more than ``most`` elements, of eight tensors at once.

        On AMD GPUs the loop over chunks takes too many scalar registers.
        """
        flags, (backend, _) = self.call.flags, target(self.call.inputs.q.device)
        is_long = max(flags.block_qk, flags.block_v) > most
        return dataclasses.replace(flags, chunked=is_long and backend == "cuda")

    def dkdv(self) -> tuple[Tensor, Tensor]:
        call, x = self.call, self.call.inputs
        dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.k, x.v))
        if dk.numel():
            config = config_of(call, "backward_jvp_dkdv")
            grid, schedule = call.schedule(x.max_seqlen_kv, config.block_n, x.batch * x.heads_kv)
            terms = call.with_tiles("kv", config.block_n, config.block_m)
            flags, both = self._in_chunks(128), (_rows(dk), _rows(dv))
            # without whole rows in shared memory, sums of both would take more registers than there are
            for of_k, of_v in ((both[0], None), (None, both[1])) if flags.in_chunks else (both,):
                launched(backward_jvp_dkdv_kernel, grid)(
                    call.q, call.k, call.v, self.dout, self.moved, of_k, of_v, self.stats, self.moving, terms,
                    call.sizes, schedule, **compiled(x.q.device, flags, config, of_keys=True),
                )  # fmt: skip
        return dk, dv

    def dq(self) -> Tensor:
        call, x = self.call, self.call.inputs
        dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
        if dq.numel():
            config = config_of(call, "backward_jvp_dq")
            grid, schedule = call.schedule(x.max_seqlen_q, config.block_m, x.batch * x.heads_q)
            terms = call.with_tiles("q", config.block_m, config.block_n)
            launched(backward_jvp_dq_kernel, grid)(
                call.q, call.k, call.v, self.dout, self.moved, _rows(dq), self.stats, self.moving, terms, call.sizes,
                schedule, **compiled(x.q.device, call.flags, config),
            )  # fmt: skip
        return dq

    def dbias(self) -> Tensor:
        call, x = self.call, self.call.inputs
        assert x.bias is not None
        if 0 in (x.batch, x.q.shape[1], x.k.shape[1]):
            return torch.zeros(x.bias.shape, dtype=x.bias.dtype, device=x.bias.device)
        config = config_of(call, "backward_jvp_dbias")
        sums = BiasSums.of(x, config)
        terms = scans.with_segments(call.terms, call.segments, "q")
        launched(backward_jvp_dbias_kernel, sums.grid)(
            call.q, call.k, call.v, self.dout, self.moved, _scores(sums.sums), self.stats, self.moving, terms,
            call.sizes, *sums.shared, **sums.options, **compiled(x.q.device, self._in_chunks(64), config),
        )  # fmt: skip
        return sums.finished(x.bias)

    def dsinks(self) -> Tensor:
        call, x = self.call, self.call.inputs
        assert x.sinks is not None
        found = torch.zeros(x.batch, x.heads_q, dtype=torch.float32, device=x.q.device)
        if found.numel() and self.stats.delta.numel():
            full = call.flags
            flags = Flags(full.d_qk, full.d_v, full.block_qk, full.block_v, packed=full.packed)
            launched(backward_jvp_dsinks_kernel, (x.batch, x.heads_q))(
                self.stats, self.moving, self.moved.sinks, PerHead.of(found), call.terms, call.sizes, F=flags,
                BLOCK=DSINKS_ROWS, **ALWAYS,
            )  # fmt: skip
        return (found.sum(0, keepdim=True) if x.sinks.shape[0] == 1 else found).to(x.sinks.dtype)
