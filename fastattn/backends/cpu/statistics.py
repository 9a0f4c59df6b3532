"""Statistics of the weights, the weights themselves, and the gradients of both, by the C++ kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.base import Run
from fastattn.backends.cpu import threads
from fastattn.backends.cpu.attention import (
    BACKWARD_PART,
    DTYPES,
    FORWARD_PART,
    HOST,
    VERSION,
    Call,
    Gradients,
    rest_of,
    words_of,
)
from fastattn.backends.cpu.library import Library
from fastattn.problem import Grads, Inputs, Statistics, StatisticsGradient
from fastattn.spec import AttentionSpec
from fastattn.storage import model

# fa::cpu::StatisticsParams: its fields in order.
FIELDS = (
    "rows_per_part", "parts", "share", "entropy", "largest_logit", "largest_key", "key_sum", "key_max", "dlse",
    "dentropy", "dlargest_logit", "dweights", "dweights_batch", "dweights_head", "dweights_row", "weights",
    "weights_dtype", "averages",
)  # fmt: skip
STRUCT = struct.Struct(f"<{len(FIELDS)}q")
TILE = 48  # query rows that are worked on together: kForwardRows of csrc/cpu/forward.h
MOST_PARTS, LEAST_ROWS = 8, 4 * TILE
READ_BEHIND = 64  # words behind the gradients of weights


def forward(library: Library, inputs: Inputs, spec: AttentionSpec, *, machine: int | None = None) -> Statistics:
    """The statistics that the spec defines.

    Query rows are cut into parts by their number alone; each part has its own share of what belongs to keys. So the
    bits do not depend on which thread works on which part.
    """
    call = Call(inputs, spec, library.machine if machine is None else machine)
    entropy, largest = (torch.empty(inputs.lse_shape(), dtype=call.words, device=HOST) for _ in range(2))
    key = torch.empty(inputs.lse_shape(), dtype=torch.int64, device=HOST)
    shares = _Shares.of(inputs)
    shape = (shares.parts, *inputs.key_shape())
    sums, most = (torch.zeros(shape, dtype=call.words, device=HOST) for _ in range(2))
    results = {"entropy": entropy, "largest_logit": largest, "largest_key": key, "key_sum": sums, "key_max": most}
    numbers = {"rows_per_part": shares.rows_per_part, "parts": shares.parts, "share": sums[0].numel()}
    library.run("statistics", call.packed(), _packed(results, **numbers))
    for n in range(1, shape[0]):
        sums[0] += sums[n]
        torch.maximum(most[0], most[n], out=most[0])
    key_sum, key_max = (x[0] if shape[0] == 1 else x[0].clone() for x in (sums, most))  # without the other shares
    return Statistics(entropy, largest, key, key_sum, key_max)


def backward(
    library: Library,
    gradient: StatisticsGradient,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    machine: int | None = None,
) -> Grads:
    """The gradients named in ``needs``: first what they take of each row, then a pass like that of attention."""
    call = Call(inputs, spec, library.machine if machine is None else machine)
    lse, low, dlse = (torch.empty(inputs.lse_shape(), dtype=call.words, device=HOST) for _ in range(3))
    more = {
        "largest_key": torch.empty(inputs.lse_shape(), dtype=torch.int64, device=HOST),
        "dentropy": _given(gradient.entropy, inputs.lse_shape(), call.words),
        "dlargest_logit": _given(gradient.largest_logit, inputs.lse_shape(), call.words),
        "dweights": _given(gradient.key_sum, inputs.key_shape(), call.words),
    }
    heads, keys = inputs.heads_q, inputs.k.shape[-3]
    steps = {"dweights_batch": 0 if inputs.is_packed else heads * keys, "dweights_head": keys}
    shares = _Shares.of(inputs)
    numbers = {"rows_per_part": shares.rows_per_part, "parts": shares.parts, **steps}
    library.run("statistics", call.packed(lse=lse, lse_low=low), _packed({**more, "dlse": dlse}, **numbers))
    grads = Gradients.of(inputs, needs)
    packed = call.packed(lse=lse, lse_low=low, dlse=dlse, **grads.tensors())
    library.run("statistics_backward", packed, _packed(more, **steps))
    return grads.finished()


def weights(
    library: Library,
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    averages: bool,
    dtype: torch.dtype,
    machine: int | None = None,
) -> Tensor:
    """The weights of all heads, or their average."""
    call = Call(inputs, spec, library.machine if machine is None else machine)
    found = torch.empty(inputs.weights_shape(averages), dtype=dtype, device=HOST)
    packed = _packed({"weights": found}, weights_dtype=DTYPES[dtype], averages=int(averages))
    library.run("weights", call.packed(), packed)
    return found


def weights_backward(
    library: Library,
    dweights: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    machine: int | None = None,
) -> Grads:
    """The gradients named in ``needs``, out of those of the weights of all heads or of their average."""
    call = Call(inputs, spec, library.machine if machine is None else machine)
    lse, low, dlse = (torch.empty(inputs.lse_shape(), dtype=call.words, device=HOST) for _ in range(3))
    more, averages = {"dweights": _given(dweights, tuple(dweights.shape), call.words)}, dweights.dim() == 3
    if averages:
        more["dweights"] /= inputs.heads_q
    steps = _steps_of_weights(inputs, averages)
    grads = Gradients.of(inputs, needs)
    packed = call.packed(lse=lse, lse_low=low, dlse=dlse, **grads.tensors())
    library.run("weights_backward", packed, _packed({**more, "dlse": dlse}, **steps))
    return grads.finished()


def prepared_weights(
    library: Library, inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], Run] | None:
    """``weights`` and ``weights_backward`` for calls of one kind, whose tensors are q and k."""
    rest, rest_of_backward = (rest_of(inputs, spec, part) for part in (FORWARD_PART, BACKWARD_PART))
    if rest is None or rest_of_backward is None:
        return None
    after, after_backward, heads, words = rest(), rest_of_backward(), inputs.heads_q, words_of(inputs.q.dtype)
    count, new, machine, explain = threads.count, torch.empty_like, library.machine, library.explain
    weigh, pull_back = (library.with_more[name] for name in ("weights", "weights_backward"))
    shape = inputs.weights_shape(averages)
    found_model, grads_model = model(shape, dtype, HOST), model((math.prod(shape) + READ_BEHIND,), words, HOST)
    rows_model, of_row = model((3, *inputs.lse_shape()), words, HOST), math.prod(inputs.lse_shape()) * words.itemsize
    dq_model, dk_model = (model(tuple(x.shape), x.dtype, HOST) for x in (inputs.q, inputs.k))
    pack, pack_backward = FORWARD_PART.pack, BACKWARD_PART.pack
    of_weights = _with_addresses("weights", weights_dtype=DTYPES[dtype], averages=int(averages))
    of_gradient = _with_addresses("dlse", "dweights", **_steps_of_weights(inputs, averages))

    def run(q: Tensor, k: Tensor) -> Tensor:
        found = new(found_model)
        begin = pack(VERSION, count(), machine, q.data_ptr(), k.data_ptr(), 0, 0, 0, 0)
        if failed := weigh(begin + after, of_weights(found.data_ptr())):
            explain(failed)
        return found

    def run_backward(dweights: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        given, rows, dq, dk = new(grads_model), new(rows_model), new(dq_model), new(dk_model)
        values = given[:-READ_BEHIND].view(shape).copy_(dweights)
        if averages:
            values.div_(heads)
        lse = rows.data_ptr()
        begin = pack_backward(VERSION, count(), machine, q.data_ptr(), k.data_ptr(), 0, 0, lse, lse + of_row, 0,
                              lse + 2 * of_row, dq.data_ptr(), dk.data_ptr(), 0, 0, 0)  # fmt: skip
        if failed := pull_back(begin + after_backward, of_gradient(lse + 2 * of_row, given.data_ptr())):
            explain(failed)
        return dq, dk

    return run, run_backward


def _with_addresses(*names: str, **numbers: int) -> Callable[..., bytes]:
    """The struct as a function of the addresses of tensors, which are named in the order of its fields."""
    pack, template = STRUCT.pack, [numbers.get(name, 0) for name in FIELDS]
    places = [FIELDS.index(name) for name in names]

    def packed(*addresses: int) -> bytes:
        values = template.copy()  # other threads fill theirs
        for place, address in zip(places, addresses):  # noqa: B905  equally many, and strict costs time
            values[place] = address
        return pack(*values)

    return packed


def _steps_of_weights(inputs: Inputs, averages: bool) -> dict[str, int]:
    """Where the gradient of a row's weights lies."""
    s_q, s_kv = inputs.q.shape[1], inputs.k.shape[1]
    heads = 1 if averages else inputs.heads_q
    return {
        "dweights_batch": heads * s_q * s_kv, "dweights_head": 0 if averages else s_q * s_kv, "dweights_row": s_kv
    }  # fmt: skip


@dataclass(frozen=True)
class _Shares:
    """The parts that query rows are cut into, each with a share of what belongs to keys."""

    parts: int = 0
    rows_per_part: int = 0

    @classmethod
    def of(cls, inputs: Inputs) -> _Shares:
        even = -(-inputs.max_seqlen_q // MOST_PARTS)
        rows = max(LEAST_ROWS, -(-even // TILE) * TILE)
        return cls(max(1, -(-inputs.max_seqlen_q // rows)), rows)


def _packed(tensors: dict[str, Tensor], **numbers: int) -> bytes:
    values = {name: x.data_ptr() for name, x in tensors.items()} | numbers
    return STRUCT.pack(*(values.get(name, 0) for name in FIELDS))


def _given(gradient: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A gradient as the kernels read it, zeros for None, with memory behind it."""
    found = torch.empty(math.prod(shape) + READ_BEHIND, dtype=dtype, device=HOST)
    if gradient is None:
        return found.zero_()
    found[-READ_BEHIND:] = 0
    found[:-READ_BEHIND].view(shape).copy_(gradient)
    return found
