"""Attention by the C++ kernels: their structs and tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from fastattn.backends.base import Outputs, Run
from fastattn.backends.cpu import threads
from fastattn.backends.cpu.library import Library
from fastattn.errors import input_error
from fastattn.problem import MORE, TENSORS, Grads, Inputs
from fastattn.spec import AttentionSpec
from fastattn.storage import model

VERSION = 6  # kAttentionVersion of csrc/cpu/params.h
# fa::cpu::AttentionParams: its fields in order, those that change from call to call first.
VARIABLE = (
    "version", "threads", "machine", "q", "k", "v", "out", "lse", "lse_low", "dout", "dlse", "dq", "dk", "dv", "dbias",
    "dsinks", "bias", "mask", "slopes", "sinks", "segments_q", "segments_kv", "intervals", "cu_seqlens_q",
    "cu_seqlens_kv", "rng_state",
)  # fmt: skip
FIXED = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "dout_batch", "dout_row",
    "dout_head", "bias_batch", "bias_head", "bias_row", "bias_key", "dbias_batch", "dbias_head", "dbias_row",
    "dbias_key", "mask_batch", "mask_head", "mask_row", "mask_key", "slopes_stride", "sinks_stride",
    "segments_q_stride", "segments_kv_stride", "intervals_batch", "intervals_head", "intervals_row", "intervals_count",
    "dtype", "bias_dtype", "dbias_dtype", "dbias_adds", "batch", "heads_q",
    "heads_kv", "head_dim_qk", "head_dim_v", "rows_q", "rows_kv", "left", "right", "lower_right", "dropout_threshold",
    "scale", "softcap", "dropout_scale",
)  # fmt: skip
VARIABLE_PART = struct.Struct(f"<{len(VARIABLE)}q")
# The fields up to lse_low and up to dsinks: all that changes for calls on q, k and v alone.
FORWARD_PART, BACKWARD_PART = (struct.Struct(f"<{VARIABLE.index(last) + 1}q") for last in ("lse_low", "dsinks"))
MORE_PART = struct.Struct(f"<{len(MORE)}q")  # from bias to cu_seqlens_kv
STRIDES_PART = struct.Struct("<3q")  # of one tensor
FIXED_PART = struct.Struct(f"<{len(FIXED) - 3}q3d")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 4}  # Dtype of csrc/cpu/params.h
HOST = torch.device("cpu")  # said each time: torch.device as a context changes where new tensors are made
UNBOUNDED = 1 << 29  # for a side of the band that has no limit, or a wider one: more than any length
MAX_HEAD_DIM = 512

_NOTHING = (None,) * len(MORE)
Addresses = dict[str, int]


class Call:
    """A problem as the kernels read it: tensors with contiguous rows, and the struct that names them."""

    def __init__(self, inputs: Inputs, spec: AttentionSpec, machine: int) -> None:
        self.inputs = readable(inputs)
        self.spec = spec
        self.machine = machine
        self.words = words_of(inputs.q.dtype)
        given = self.inputs
        self.tensors: dict[str, Tensor | None] = {
            "q": given.q, "k": given.k, "v": given.v, "bias": given.bias, "mask": given.mask,
            "slopes": given.alibi_slopes, "sinks": given.sinks, "segments_q": given.segment_ids_q,
            "segments_kv": given.segment_ids_kv, "intervals": given.intervals, "cu_seqlens_q": given.cu_seqlens_q,
            "cu_seqlens_kv": given.cu_seqlens_kv, "rng_state": given.rng_state if spec.dropout_p > 0 else None,
        }  # fmt: skip

    def packed(self, dout: Tensor | None = None, dbias: Tensor | None = None, **results: Tensor | None) -> bytes:
        """The struct, with further tensors by the name of its fields."""
        tensors = self.tensors | results | {"dout": dout, "dbias": dbias}
        variable = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
        variable |= {"version": VERSION, "threads": threads.count(), "machine": self.machine}
        packed = VARIABLE_PART.pack(*(variable.get(name, 0) for name in VARIABLE))
        return packed + fixed_part(self.inputs, self.spec, dout, dbias)


def forward(library: Library, inputs: Inputs, spec: AttentionSpec, machine: int | None = None) -> Outputs:
    """``(out, lse, lse_low)``."""
    call = Call(inputs, spec, library.machine if machine is None else machine)
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=HOST)
    lse, low = (torch.empty(inputs.lse_shape(), dtype=call.words, device=HOST) for _ in range(2))
    library.attend("forward", call.packed(out=out, lse=lse, lse_low=low))
    return out, lse, low


def backward(
    library: Library,
    dout: Tensor,
    dlse: Tensor | None,
    results: Outputs,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    machine: int | None = None,
) -> Grads:
    """The gradients named in ``needs``; ``results`` are those of the forward pass."""
    call = Call(inputs, spec, library.machine if machine is None else machine)
    out, lse, low = (x.contiguous() for x in results)
    dout = dout if _has_contiguous_rows(dout) else dout.contiguous()
    dlse = None if dlse is None else dlse.to(call.words).contiguous()
    grads = Gradients.of(inputs, needs)
    library.attend("backward", call.packed(out=out, lse=lse, lse_low=low, dout=dout, dlse=dlse, **grads.tensors()))
    return grads.finished()


@dataclass(frozen=True)
class Gradients:
    """Memory for gradients as the kernels write them, or for their tangents."""

    of_qkv: dict[str, Tensor]
    dbias: Tensor | None
    dsinks: Tensor | None
    sums: SumsOfMore

    @classmethod
    def of(cls, inputs: Inputs, needs: Sequence[str]) -> Gradients:
        of_qkv = {
            f"d{name}": torch.empty(x.shape, dtype=x.dtype, device=HOST)
            for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
            if name in needs
        }
        sums = SumsOfMore.of(inputs, needs)
        return cls(of_qkv, *sums.make(), sums)

    def tensors(self) -> dict[str, Tensor]:
        more = (("dbias", self.dbias), ("dsinks", self.dsinks))
        return self.of_qkv | {name: x for name, x in more if x is not None}

    def finished(self) -> Grads:
        """In the shapes and dtypes of the inputs."""
        return Grads(**self.of_qkv, **self.sums.as_gradients(self.dbias, self.dsinks))


@dataclass(frozen=True)
class SumsOfMore:
    """What kernels add up for the gradients of bias and sinks: shape and dtype of each, and its form as a gradient.

    Attributes:
        of_bias: None if the bias needs no gradient, likewise ``of_sinks``.
        of_sinks: of each sequence and head.
        dtypes: those of the gradients.
        shares_sinks: all sequences have the same sinks.
    """

    of_bias: tuple[tuple[int, ...], torch.dtype] | None
    of_sinks: tuple[tuple[int, ...], torch.dtype] | None
    dtypes: dict[str, torch.dtype]
    shares_sinks: bool

    @classmethod
    def of(cls, inputs: Inputs, needs: Sequence[str]) -> SumsOfMore:
        words, bias, sinks = words_of(inputs.q.dtype), inputs.bias, inputs.sinks
        of_bias = of_sinks = None
        if bias is not None and "bias" in needs:
            of_bias = (tuple(bias.shape), bias.dtype if _is_of_pairs(bias, inputs) else words)
        if sinks is not None and "sinks" in needs:
            of_sinks = ((inputs.batch, inputs.heads_q), words)
        dtypes = {name: x.dtype for name, x in (("dbias", bias), ("dsinks", sinks)) if x is not None}
        return cls(of_bias, of_sinks, dtypes, sinks is not None and sinks.shape[0] == 1)

    def make(self) -> tuple[Tensor | None, Tensor | None]:
        """Memory for both; of the bias it holds zeros."""
        dbias = None if self.of_bias is None else _zeros(*self.of_bias)
        return dbias, None if self.of_sinks is None else torch.empty(
            self.of_sinks[0], dtype=self.of_sinks[1], device=HOST
        )

    def as_gradients(self, dbias: Tensor | None, dsinks: Tensor | None) -> dict[str, Tensor]:
        found = {}
        if dbias is not None:
            found["dbias"] = dbias.to(self.dtypes["dbias"])
        if dsinks is not None:
            summed = dsinks.sum(0, keepdim=True) if self.shares_sinks else dsinks
            found["dsinks"] = summed.to(self.dtypes["dsinks"])
        return found


def prepared_forward(
    library: Library, inputs: Inputs, spec: AttentionSpec, *, keep: bool, heads_first: bool, apart: bool
) -> Run | None:
    """``forward`` for calls of one kind; lse and lse_low are ``apart`` or one tensor, since two take longer to make."""
    rest = rest_of(inputs, spec, FORWARD_PART)
    if rest is None:
        return None
    alone, dtype = rest(), inputs.q.dtype
    words, machine, run_pass, pack = words_of(dtype), library.machine, library.passes["forward"], FORWARD_PART.pack
    count, new = threads.count, torch.empty_like
    low = 0 if apart else math.prod(inputs.lse_shape()) * words.itemsize  # where lse_low begins
    out_model = model(inputs.out_shape(), dtype, HOST, heads_first)
    kept_model = model(inputs.lse_shape() if apart else (2, *inputs.lse_shape()), words, HOST)

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None) -> tuple[Tensor, ...]:
        out, at, at_low = new(out_model), 0, 0
        kept: tuple[Tensor, ...] = ()
        if keep:
            kept = (new(kept_model), new(kept_model)) if apart else (new(kept_model),)
            at, at_low = kept[0].data_ptr(), kept[-1].data_ptr() + low
        failed = run_pass(
            pack(VERSION, count(), machine, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), at, at_low)
            + (rest(*more) if more else alone)
        )
        if failed:
            library.explain(failed)
        return (out, *kept)

    return run


def prepared_backward(
    library: Library,
    inputs: Inputs,
    spec: AttentionSpec,
    dout: Tensor,
    needs: Sequence[str],
    *,
    heads_first: bool,
    apart: bool,
) -> Run | None:
    """``backward`` for calls of one kind, whose ``lse`` has no gradient; lse and lse_low are as in the forward pass."""
    sums = SumsOfMore.of(inputs, needs)
    rest = rest_of(inputs, spec, BACKWARD_PART, dout, sums.make()[0])
    if rest is None:
        return None
    alone, new, has_sums = rest(), torch.empty_like, sums.of_bias is not None or sums.of_sinks is not None
    dq_model, dk_model, dv_model = (
        model(tuple(x.shape), x.dtype, HOST, heads_first) for x in (inputs.q, inputs.k, inputs.v)
    )
    usual = (dout.transpose(1, 2) if heads_first else dout).stride()
    with_strides = _strides_of_dout(BACKWARD_PART, heads_first, inputs.is_packed)
    machine, run_pass, pack = library.machine, library.passes["backward"], BACKWARD_PART.pack
    count, low = threads.count, math.prod(inputs.lse_shape()) * words_of(inputs.q.dtype).itemsize

    def of_one(dout: Tensor, out: Tensor, kept: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        at = kept.data_ptr()
        return run(dout, out, at, at + low, *tensors)

    def of_two(dout: Tensor, out: Tensor, lse: Tensor, lse_low: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        return run(dout, out, lse.data_ptr(), lse_low.data_ptr(), *tensors)

    def run(
        dout: Tensor, out: Tensor, at: int, at_low: int, q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None
    ) -> tuple[Tensor, ...]:
        dq, dk, dv = new(dq_model), new(dk_model), new(dv_model)
        dbias, dsinks = sums.make() if has_sums else (None, None)
        after = rest(*more) if more else alone
        strides = dout.stride()
        if strides != usual:
            if strides[-1] != 1:
                dout = dout.contiguous()
            after = with_strides(after, dout)
        failed = run_pass(
            pack(VERSION, count(), machine, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), at, at_low,
                 dout.data_ptr(), 0, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _address(dbias), _address(dsinks))
            + after
        )  # fmt: skip
        if failed:
            library.explain(failed)
        return (dq, dk, dv, *sums.as_gradients(dbias, dsinks).values()) if has_sums else (dq, dk, dv)

    return of_two if apart else of_one


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rest_of(
    inputs: Inputs,
    spec: AttentionSpec,
    first: struct.Struct,
    dout: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Callable[..., bytes] | None:
    """The struct behind its ``first`` part as a function of ``MORE``; None if it takes more than addresses."""
    read = readable(inputs)
    if inputs.rng_state is not None or any(getattr(read, name) is not getattr(inputs, name) for name in TENSORS):
        return None
    before = bytes(VARIABLE_PART.size - first.size - MORE_PART.size - 8)  # 8: rng_state
    after, pack = bytes(8) + fixed_part(inputs, spec, dout, dbias), MORE_PART.pack

    def rest(*more: Tensor | None) -> bytes:
        return before + pack(*map(_address, more or _NOTHING)) + after

    return rest


def _strides_of_dout(first: struct.Struct, heads_first: bool, is_packed: bool) -> Callable[[bytes, Tensor], bytes]:
    """A function that puts the strides of a gradient of out into the struct behind its ``first`` part."""
    begin = VARIABLE_PART.size - first.size + 8 * FIXED.index("dout_batch")
    end = begin + STRIDES_PART.size

    def with_strides(rest: bytes, dout: Tensor) -> bytes:
        strides = _strides(dout.transpose(1, 2) if heads_first else dout, is_packed)
        return rest[:begin] + STRIDES_PART.pack(*strides) + rest[end:]

    return with_strides


def words_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def readable(inputs: Inputs) -> Inputs:
    """With tensors as the kernels read them: rows contiguous, few numbers in the dtype of the arithmetic."""
    words, changes = words_of(inputs.q.dtype), {}
    for name, dtype in (
        ("q", None), ("k", None), ("v", None), ("alibi_slopes", words), ("sinks", words), ("segment_ids_q", None),
        ("segment_ids_kv", None), ("cu_seqlens_q", torch.int32), ("cu_seqlens_kv", torch.int32), ("rng_state", None),
    ):  # fmt: skip
        x: Tensor | None = getattr(inputs, name)
        if x is None:
            continue
        read = x if dtype is None else x.to(dtype)
        read = read if _has_contiguous_rows(read) else read.contiguous()
        if read is not x:
            changes[name] = read
    if inputs.intervals is not None and inputs.intervals.stride()[-2:] != (2, 1):
        changes["intervals"] = inputs.intervals.contiguous()
    if inputs.segment_ids_q is not None and inputs.segment_ids_kv is not None:
        changes["segment_ids_q"], changes["segment_ids_kv"] = _small_ids(inputs.segment_ids_q, inputs.segment_ids_kv)
    return inputs.replace(**changes) if changes else inputs


def fixed_part(inputs: Inputs, spec: AttentionSpec, dout: Tensor | None = None, dbias: Tensor | None = None) -> bytes:
    """The part of the struct that calls with tensors of the same kind share."""
    q, k, v, is_packed = inputs.q, inputs.k, inputs.v, inputs.is_packed
    for name, x in (("q", q), ("k", k)):
        if x.shape[-3] >= UNBOUNDED:
            todo = "The kernels count in 32 bits."
            raise input_error(name, f"{x.shape[-3]} tokens", f"fewer than {UNBOUNDED}", todo)
    return FIXED_PART.pack(
        *_strides(q, is_packed), *_strides(k, is_packed), *_strides(v, is_packed), *_strides(dout, is_packed),
        *_steps(inputs.bias), *_steps(dbias), *_steps(inputs.mask), _step(inputs.alibi_slopes), _step(inputs.sinks),
        _step(inputs.segment_ids_q), _step(inputs.segment_ids_kv), *_of_intervals(inputs.intervals),
        DTYPES[q.dtype], *(0 if x is None else DTYPES[x.dtype] for x in (inputs.bias, dbias)),
        dbias is not None and not _is_of_pairs(dbias, inputs), inputs.batch, q.shape[-2],
        k.shape[-2], q.shape[-1], v.shape[-1], q.shape[-3], k.shape[-3], _side(spec.left), _side(spec.right),
        spec.anchor == "lower_right", spec.dropout_threshold, spec.scale, spec.softcap or 0.0, spec.dropout_scale,
    )  # fmt: skip


def _is_of_pairs(bias: Tensor, inputs: Inputs) -> bool:
    """Whether each number of a bias is of one pair of a query and a key, in a dtype that the kernels write."""
    shape = (inputs.batch, inputs.heads_q, inputs.q.shape[-3], inputs.k.shape[-3])
    is_double = words_of(inputs.q.dtype) == torch.float64
    return bias.shape == shape and bias.shape[-1] > 1 and is_double == (bias.dtype == torch.float64)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros from fresh pages, which no one has to write; torch.zeros writes them."""
    found = numpy.zeros(shape, f"i{dtype.itemsize}")
    return torch.from_numpy(found).view(dtype)


def _has_contiguous_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _small_ids(of_q: Tensor, of_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of 32 bits, equal and in order as those given."""
    if of_q.dtype == of_kv.dtype == torch.int32:
        return of_q.contiguous(), of_kv.contiguous()
    small = tuple(x.to(torch.int32).contiguous() for x in (of_q, of_kv))
    if all(bool((x == given).all()) for x, given in zip(small, (of_q, of_kv), strict=True)):
        return small[0], small[1]
    _, numbers = torch.unique(torch.cat([of_q.flatten().long(), of_kv.flatten().long()]), return_inverse=True)
    first, second = numbers.to(torch.int32).split([of_q.numel(), of_kv.numel()])
    return first.view(of_q.shape), second.view(of_kv.shape)


def _strides(x: Tensor | None, is_packed: bool) -> tuple[int, ...]:
    """Of the batch, the row and the head."""
    if x is None:
        return (0, 0, 0)
    return (0, *x.stride()[:2]) if is_packed else x.stride()[:3]


def _step(x: Tensor | None) -> int:
    """From row to row of ``(1|n, m)``; 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _steps(x: Tensor | None) -> tuple[Any, ...]:
    """Of what broadcasts to the scores."""
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))


def _of_intervals(x: Tensor | None) -> tuple[int, ...]:
    """Steps from batch entry to batch entry, head to head and row to row, and the ranges of a row."""
    if x is None:
        return (0, 0, 0, 0)
    return (*_steps(x)[:2], x.stride(2), x.shape[3])


def _side(limit: int | None) -> int:
    return UNBOUNDED if limit is None else min(limit, UNBOUNDED)
