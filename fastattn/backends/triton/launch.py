"""The host side: describes a call, which ``problem.py`` has checked, to the kernels and launches them.

Nothing here reads a value from the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.backends.base import Outputs
from fastattn.backends.triton import arguments, configs, scans
from fastattn.backends.triton.arguments import (
    Bshd,
    Flags,
    PerHead,
    PerRow,
    PerToken,
    Ranges,
    Schedule,
    Scores,
    Sizes,
    Stats,
    Terms,
    coded,
)
from fastattn.backends.triton.backward import backward_dkdv_kernel, backward_dq_kernel, backward_preprocess_kernel
from fastattn.backends.triton.bias_sums import BiasSums
from fastattn.backends.triton.configs import ALWAYS, Config
from fastattn.backends.triton.forward import forward_kernel
from fastattn.backends.triton.plans import device_of, launched
from fastattn.backends.triton.reductions import backward_dbias_kernel, backward_dsinks_kernel, sum_parts_kernel
from fastattn.errors import input_error
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec

# Offsets within a tile are 32-bit: BLOCK * stride must stay below 2^31. Rows further apart than this are copied.
MAX_ROW_STRIDE = 1 << 22
LEAST_FROM_BYTES = 32  # a product over fewer elements that were computed from bytes is wrong: operands.left_operand
ONE_PASS = 256  # wider rows of dk and dv do not fit into registers together; each has a pass, with the scores again
# Tiles of the small kernels.
PREPROCESS_ROWS, DSINKS_ROWS, SUMMED = 64, 1024, 1024
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Call:
    """One call, described for the kernels."""

    inputs: Inputs
    q: Bshd
    k: Bshd
    v: Bshd
    terms: Terms
    sizes: Sizes
    flags: Flags
    segments: dict[str, PerToken]

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec) -> Call:
        """The call with zeros for the keys and values that no query keeps: they may hold NaN, and ``0 * NaN`` is NaN.

        Kernels zero the keys outside the band while loading. For masks and segments, one pass that finds the unused
        keys and a copy of K and V, which are small, cost less than a search in the loops of the kernels.
        """
        if max(inputs.max_seqlen_q, inputs.max_seqlen_kv) >= arguments.UNBOUNDED:
            longest = max(inputs.max_seqlen_q, inputs.max_seqlen_kv)
            raise input_error("q, k, v", f"a sequence of {longest} rows", "less than 2^29", "Split the sequence.")
        q, k, v = (_rows(x) for x in (inputs.q, inputs.k, inputs.v))
        sizes = sizes_of(spec, inputs.max_seqlen_q, inputs.max_seqlen_kv, inputs.heads_q, inputs.heads_kv)
        terms, flags = _terms(inputs), _flags(inputs, spec, (q, k, v))
        segments = scans.segments_of(inputs, terms) if flags.segments else {}
        if flags.mask or flags.segments or flags.intervals:
            used = scans.used_keys(inputs, scans.with_segments(terms, segments, "kv"), sizes, flags)
            k, v = (_rows(torch.where(used[..., None] != 0, x, 0)) for x in (inputs.k, inputs.v))
            flags = _flags(inputs, spec, (q, k, v))
        return cls(inputs, q, k, v, terms, sizes, flags, segments)

    def config(self, kernel: str) -> Config:
        return config_of(self.inputs.q.device, kernel, self.flags)

    def schedule(self, rows: int, block: int, heads: int) -> tuple[tuple[int], Schedule]:
        """``(grid, schedule)`` of a kernel whose programs each own ``block`` of ``rows`` rows of one of ``heads``."""
        x = self.inputs
        of_head = x.max_seqlen_kv * (x.k.shape[-1] + x.v.shape[-1]) * x.k.element_size()
        sharing = max(1, heads // max(1, x.batch * x.heads_kv))
        return schedule_of(triton.cdiv(rows, block), heads, sharing, of_head, x.q.device)

    def with_tiles(self, rows: str, block: int, block_other: int, sharing: int | None = None) -> Terms:
        """The terms for a kernel whose programs own ``block`` rows of ``rows`` ("q" or "kv"), with their visits.

        With intervals for each head, ``sharing`` query heads share a list: by default the whole group if keys own.
        """
        group = self.inputs.heads_q // self.inputs.heads_kv
        sharing = sharing or (group if rows == "kv" else 1)
        terms = scans.with_segments(self.terms, self.segments, rows)
        return scans.with_visits(self.inputs, terms, self.sizes, self.flags, rows, (block, block_other), sharing)


def schedule_of(
    blocks: int, heads: int, sharing: int, of_head: int, device: torch.device
) -> tuple[tuple[int], Schedule]:
    """``(grid, schedule)``: ``blocks`` for each of ``heads``, of which ``sharing`` read the same ``of_head`` bytes."""
    together = max(1, _l2_bytes(device) // 2 // max(1, of_head)) * sharing
    return (blocks * heads,), Schedule(coded(blocks), coded(heads), coded(min(together, heads)))


def forward(
    inputs: Inputs, spec: AttentionSpec, config: Config | None = None, results: Outputs | None = None
) -> Outputs:
    """``(out, lse, lse_low)``. ``config`` overrides that of the table, ``results`` is memory for what is returned."""
    out, lse, low = results or _results(inputs)
    if lse.numel() == 0:
        return out, lse, low
    with device_of(out):
        call = Call.of(inputs, spec)
        config = config or call.config("forward")
        grid, schedule = call.schedule(inputs.max_seqlen_q, config.block_m, inputs.batch * inputs.heads_q)
        terms = call.with_tiles("q", config.block_m, config.block_n)
        launched(forward_kernel, grid)(
            call.q,
            call.k,
            call.v,
            _rows(out),
            PerRow.of(lse),
            PerRow.of(low),
            terms,
            call.sizes,
            schedule,
            **compiled(call.inputs.q.device, call.flags, config),
        )
    return out, lse, low


def _results(inputs: Inputs) -> Outputs:
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse, low = (torch.empty(inputs.lse_shape(), dtype=torch.float32, device=out.device) for _ in range(2))
    return out, lse, low


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
) -> Grads:
    """The gradients named in ``needs``."""
    with device_of(out):
        pass_ = Backward.of(dout, dlse, out, lse, lse_low, inputs, spec)
        dk, dv = pass_.dkdv() if "k" in needs or "v" in needs else (None, None)
        return Grads(
            dq=pass_.dq() if "q" in needs else None,
            dk=dk if "k" in needs else None,
            dv=dv if "v" in needs else None,
            dbias=pass_.dbias() if "bias" in needs and inputs.bias is not None else None,
            dsinks=pass_.dsinks() if "sinks" in needs and inputs.sinks is not None else None,
        )


@dataclass(frozen=True)
class Backward:
    """One backward pass: the call, the gradients of its results, and the statistics of each row."""

    call: Call
    dout: Bshd
    stats: Stats

    @classmethod
    def of(
        cls,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        inputs: Inputs,
        spec: AttentionSpec,
    ) -> Backward:
        call, incoming = Call.of(inputs, spec), _rows(dout)
        vector = min(call.flags.vector, incoming.vector())
        contiguous = call.flags.contiguous and dout.stride(-1) == 1
        call = dataclasses.replace(call, flags=dataclasses.replace(call.flags, vector=vector, contiguous=contiguous))
        self = cls(call, incoming, Stats.like(lse))
        if lse.numel():
            parts = PerRow.of(lse.contiguous()), PerRow.of(lse_low.contiguous())
            self._fill(_rows(out), *parts, None if dlse is None else PerRow.of(dlse.contiguous()))
        return self

    def _fill(self, out: Bshd, lse: PerRow, lse_low: PerRow, dlse: PerRow | None) -> None:
        x, full = self.call.inputs, self.call.flags
        grid, schedule = self.call.schedule(x.max_seqlen_q, PREPROCESS_ROWS, x.batch * x.heads_q)
        flags = Flags(
            d_qk=full.d_v,
            d_v=full.d_v,
            block_qk=full.block_v,
            block_v=full.block_v,
            vector=min(full.vector, out.vector()),
            contiguous=full.contiguous and out.ptr.stride(-1) == 1,
            packed=full.packed,
            upcast=full.upcast,
        )
        launched(backward_preprocess_kernel, grid)(
            out,
            self.dout,
            dlse,
            lse,
            lse_low,
            self.stats,
            self.call.terms,
            self.call.sizes,
            schedule,
            F=flags,
            BLOCK_M=PREPROCESS_ROWS,
            **ALWAYS,
        )

    def dkdv(self, config: Config | None = None) -> tuple[Tensor, Tensor]:
        call, x = self.call, self.call.inputs
        config = config or call.config("backward_dkdv")
        dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.k, x.v))
        if dk.numel():
            group, heads = x.heads_q // x.heads_kv, x.batch * x.heads_kv
            parts = parts_of(triton.cdiv(x.max_seqlen_kv, config.block_n) * heads, group, processors(dk.device))
            grid, schedule = call.schedule(x.max_seqlen_kv, config.block_n, heads * parts)
            sizes, of_k, of_v = call.sizes, dk, dv
            if parts > 1:
                schedule = schedule._replace(parts=coded(parts))
                sizes = sizes._replace(group=coded(group // parts))
                shapes = ((*t.shape[:-2], x.heads_kv * parts, t.shape[-1]) for t in (dk, dv))
                of_k, of_v = (torch.empty(shape, dtype=torch.float32, device=dk.device) for shape in shapes)
            terms = call.with_tiles("kv", config.block_n, config.block_m, group // parts)
            passes = [(True, True)]
            if max(call.flags.block_qk, call.flags.block_v) > ONE_PASS:
                passes = [(True, False), (False, True)]
            for of_dk, of_dv in passes:
                launched(backward_dkdv_kernel, grid)(
                    call.q, call.k, call.v, self.dout, _rows(of_k), _rows(of_v), self.stats, terms, sizes, schedule,
                    DK=of_dk, DV=of_dv, **compiled(dk.device, call.flags, config, of_keys=True),
                )  # fmt: skip
            if parts > 1:
                for partial, total in ((of_k, dk), (of_v, dv)):
                    launched(sum_parts_kernel, (triton.cdiv(total.numel(), SUMMED),))(
                        partial, total, coded(parts), coded(total.numel()), D=total.shape[-1], BLOCK=SUMMED, **ALWAYS
                    )
        return dk, dv

    def dq(self, config: Config | None = None) -> Tensor:
        call, x = self.call, self.call.inputs
        config = config or call.config("backward_dq")
        dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
        if dq.numel():
            grid, schedule = call.schedule(x.max_seqlen_q, config.block_m, x.batch * x.heads_q)
            terms = call.with_tiles("q", config.block_m, config.block_n)
            launched(backward_dq_kernel, grid)(
                call.q, call.k, call.v, self.dout, _rows(dq), self.stats, terms, call.sizes, schedule,
                **compiled(call.inputs.q.device, call.flags, config),
            )  # fmt: skip
        return dq

    def dbias(self, config: Config | None = None) -> Tensor:
        call, x = self.call, self.call.inputs
        assert x.bias is not None
        if 0 in (x.batch, x.q.shape[1], x.k.shape[1]):
            return torch.zeros(x.bias.shape, dtype=x.bias.dtype, device=x.bias.device)
        config = config or call.config("backward_dbias")
        sums = BiasSums.of(x, config)
        terms = scans.with_segments(call.terms, call.segments, "q")
        launched(backward_dbias_kernel, sums.grid)(
            call.q, call.k, call.v, self.dout, _scores(sums.sums), self.stats, terms, call.sizes, *sums.shared,
            IN_CHUNKS=self.dbias_in_chunks(), **sums.options, **compiled(x.q.device, call.flags, config),
        )  # fmt: skip
        return sums.finished(x.bias)

    def dbias_in_chunks(self) -> bool:
        """``Flags.in_chunks`` for dbias, which keeps only scores of its products, so long rows need no registers.

        AMD GPUs have registers for whole rows, but too few scalar registers for the loop over chunks.
        """
        flags = self.call.flags
        is_long = max(flags.block_qk, flags.block_v) > 64
        return flags.in_chunks or (is_long and target(self.call.inputs.q.device)[0] == "cuda")

    def dsinks(self) -> Tensor:
        call, x = self.call, self.call.inputs
        assert x.sinks is not None
        found = torch.zeros(x.batch, x.heads_q, dtype=torch.float32, device=x.q.device)
        if found.numel() and self.stats.delta.numel():
            full = call.flags
            flags = Flags(full.d_qk, full.d_v, full.block_qk, full.block_v, packed=full.packed)
            launched(backward_dsinks_kernel, (x.batch, x.heads_q))(
                self.stats, PerHead.of(found), call.terms, call.sizes, F=flags, BLOCK=DSINKS_ROWS, **ALWAYS
            )
        return (found.sum(0, keepdim=True) if x.sinks.shape[0] == 1 else found).to(x.sinks.dtype)


# --- description --------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Bshd:
    """``x`` as ``Bshd``, copied if its rows are so far apart that offsets would not fit 32 bits."""
    is_far = x.stride(-1) >= MAX_ROW_STRIDE or x.stride(-3) >= MAX_ROW_STRIDE
    return Bshd.of(x.contiguous() if is_far else x)


def _scores(x: Tensor) -> Scores:
    return Scores.of(x.contiguous() if max(x.stride(2), x.stride(3)) >= MAX_ROW_STRIDE else x)


def _per_token(x: Tensor) -> PerToken:
    return PerToken.of(x.contiguous() if x.shape[1] * x.stride(1) >= 1 << 31 else x)


def _unrolled(intervals: Tensor | None) -> int:
    """``Flags.intervals``."""
    return 0 if intervals is None else next((n for n in (1, 2, 4) if intervals.shape[3] <= n), 8)


def _scores_vector(x: Tensor | None, s_kv: int) -> int:
    """8 if the rows of a bias or mask are contiguous and begin at multiples of 8 elements; 0 without one."""
    if x is None:
        return 0
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    aligned = all(stride % 8 == 0 for stride in (*strides[:-1], s_kv)) and x.data_ptr() % 16 == 0
    return 8 if aligned and strides[-1] == 1 else 1


def _terms(inputs: Inputs) -> Terms:
    def optional(describe: Callable[[Tensor], Any], x: Tensor | None) -> Any:
        return None if x is None else describe(x)

    mask = None if inputs.mask is None else inputs.mask.view(torch.uint8)
    return Terms(
        bias=optional(_scores, inputs.bias),
        mask=optional(_scores, mask),
        alibi_slopes=optional(PerHead.of, inputs.alibi_slopes),
        sinks=optional(PerHead.of, inputs.sinks),
        segment_ids_q=optional(_per_token, inputs.segment_ids_q),
        segment_ids_kv=optional(_per_token, inputs.segment_ids_kv),
        intervals=optional(Ranges.of, inputs.intervals),
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_kv=inputs.cu_seqlens_kv,
        rng_state=inputs.rng_state,
    )


def sizes_of(spec: AttentionSpec, s_q: int, s_kv: int, heads_q: int, heads_kv: int) -> Sizes:
    def bounded(side: int | None) -> int:
        return coded(arguments.UNBOUNDED if side is None else min(side, arguments.UNBOUNDED))

    return Sizes(
        s_q=coded(s_q),
        s_kv=coded(s_kv),
        heads_q=coded(heads_q),
        group=coded(heads_q // heads_kv),
        left=bounded(spec.left),
        right=bounded(spec.right),
        lower_right=coded(int(spec.anchor == "lower_right")),
        dropout_threshold=coded(spec.dropout_threshold),
        scale=float(spec.scale),
        softcap=float(spec.softcap or 1.0),
        dropout_scale=float(spec.dropout_scale),
    )


def flags_of(inputs: Inputs | CacheInputs, spec: AttentionSpec, rows: tuple[Bshd, Bshd, Bshd]) -> Flags:
    """The flags that calls with and without a cache share; ``rows`` describes q, k and v."""
    d_qk, d_v = rows[0].ptr.shape[-1], rows[2].ptr.shape[-1]
    finished = spec.softcap is not None or inputs.bias is not None or inputs.alibi_slopes is not None
    return Flags(
        d_qk=d_qk,
        d_v=d_v,
        block_qk=max(16, triton.next_power_of_2(d_qk)),
        block_v=max(16, triton.next_power_of_2(d_v)),
        vector=min(x.vector() for x in rows),
        contiguous=all(x.ptr.stride(-1) == 1 for x in rows),
        packed=inputs.is_packed,
        left=spec.left is not None,
        right=spec.right is not None,
        softcap=spec.softcap is not None,
        alibi=inputs.alibi_slopes is not None,
        sinks=inputs.sinks is not None,
        bias=int(inputs.bias is not None),
        plain=not finished and spec.scale >= torch.finfo(torch.float32).tiny,
        precise=inputs.q.dtype == torch.float32,
        precision="tf32" if inputs.q.dtype == torch.float32 and _tf32() else "ieee",
        upcast=INTERPRETED and inputs.q.dtype == torch.bfloat16,
    )


def _flags(inputs: Inputs, spec: AttentionSpec, rows: tuple[Bshd, Bshd, Bshd]) -> Flags:
    return dataclasses.replace(
        flags_of(inputs, spec, rows),
        segments=inputs.segment_ids_q is not None,
        intervals=_unrolled(inputs.intervals),
        dropout=spec.dropout_p > 0,
        bias=_scores_vector(inputs.bias, inputs.max_seqlen_kv),
        mask=_scores_vector(inputs.mask, inputs.max_seqlen_kv),
    )


def config_of(device: torch.device, kernel: str, flags: Flags) -> Config:
    """The configuration from the table for a device and flags."""
    bits, head_dim = (32 if flags.precise else 16), max(flags.d_qk, flags.d_v)
    return configs.config_for(target(device)[1], kernel, bits, head_dim, flags.features)


def compiled(device: torch.device, flags: Flags, config: Config, of_keys: bool = False) -> dict[str, Any]:
    """The options of a launch; with ``of_keys`` keys own the results, and sums run over the query rows of a tile."""
    backend, arch = target(device)
    rows, over = (config.block_n, config.block_m) if of_keys else (config.block_m, config.block_n)
    is_wgmma = arch in ("sm_90", "sm_100") and rows >= 64
    if backend == "cuda" and flags.mask and over < LEAST_FROM_BYTES and not is_wgmma:
        flags = dataclasses.replace(flags, opaque=True)
    options = {
        "F": flags,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **ALWAYS,
    }
    if target(device)[0] == "cuda":
        options["maxnreg"] = 255  # otherwise ptxas may reserve registers for more threads, and spill kilobytes
    return options


# --- machine ------------------------------------------------------------------------------------------------------


def parts_of(programs: int, group: int, on: int) -> int:
    """The parts of a group of query heads, of equal size, that give each of ``on`` processors a program.

    Args:
        programs: the number of programs with one for each group.
        group: query heads that share a key/value head.
        on: processors of the device.
    """
    return next((parts for parts in range(1, group) if group % parts == 0 and programs * parts >= on), group)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _tf32() -> bool:
    """Whether torch's own switch allows tf32 for products of fp32."""
    return torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def target(device: torch.device) -> tuple[str, str]:
    """``(backend of Triton, architecture as the table names it)``."""
    if INTERPRETED:
        return "interpreter", "interpreter"
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        found = triton.runtime.driver.active.get_current_target()
    return found.backend, configs.arch_name(found.backend, found.arch)


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 25
