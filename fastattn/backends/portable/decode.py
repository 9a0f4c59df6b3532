"""Attention to a cache: few query rows, many keys, so the time goes into reading keys and values once.

Sequences whose queries and lengths are alike make a *group*, and a group reads its positions a *piece* at a time:
a view of the cache where that is possible, else a copy in the dtype of the computation, small enough to stay in a
CPU's cache. All query heads that share a key/value head are rows of one product. Pieces are joined by their lse, and
so is the sink, a piece without values:

    lse = logsumexp(lse of the pieces)        out = sum(exp(lse of the piece - lse) * out of the piece)

On an accelerator one group holds every sequence and reaches as far as the block table, so that nothing waits for
lengths (not yet run on a GPU). In host memory a sequence with many query rows is left to ``forward``, which skips
what the band masks.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import kv_cache, numerics
from fastattn.backends.base import Outputs
from fastattn.backends.portable import flash
from fastattn.backends.portable.groups import Group
from fastattn.kv_cache import CacheInputs
from fastattn.numerics import NEVER
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, distance, full_range, page_and_row, tile_range

Part = tuple[Tensor, Tensor, Tensor]  # out [p, n, H_kv, R, D], lse and lse_low [p, n, H_kv, R] of p parts of the keys
Dense = Callable[[Inputs, AttentionSpec], Outputs]

FEW_KEYS = 16  # torch's kernel takes a row of fewer keys for empty if all its scores are NaN
MANY_ROWS = 16  # query rows from which on a sequence is computed by ``forward``
PIECE = 1 << 20  # elements of the keys of a piece that is copied
SMALL = 1 << 17  # elements of the keys up to which sequences of different lengths share a group
WASTE = 1.25  # or up to this many times the positions that the shortest reads alone
LONG = 1 << 21  # elements of a sequence's keys from which on a view is read in the order in which it lies in memory,
FOLD = 512  # this many keys of all heads at a time: head after head would touch every page of memory once for each


def attend(inputs: CacheInputs, spec: AttentionSpec, forward: Dense) -> tuple[Tensor, Tensor]:
    """Append, then ``(out, lse)``; ``forward`` is the backend's for dense problems."""
    kv_cache.append(inputs)
    if inputs.tree_mask is not None:
        spec = dataclasses.replace(spec, right=None)  # the bits take its place
    if inputs.rotary_cos is not None:
        inputs = inputs.replace(q=kv_cache.rotated_queries(inputs, spec), rotary_cos=None, rotary_sin=None)
    if inputs.q.numel() == 0:
        lse = inputs.q.new_full(inputs.lse_shape(), NEVER, dtype=_compute_dtype(inputs))
        return inputs.q.new_zeros(inputs.out_shape()), lse
    return _on_host(inputs, spec, forward) if inputs.q.device.type == "cpu" else _on_device(inputs, spec)


def _on_host(inputs: CacheInputs, spec: AttentionSpec, forward: Dense) -> tuple[Tensor, Tensor]:
    s_q, s_kv = inputs.host_lengths()
    groups = list(_groups(inputs, spec, s_q, s_kv))
    if inputs.tree_mask is not None:
        groups = [group.in_trees(kv_cache.tree_of(inputs)) for group in groups]
    if not inputs.is_packed and len(groups) == 1 and groups[0].count == inputs.batch:
        out, lse = _attend_group(inputs, spec, groups[0], inputs.q)
        return out.to(inputs.q.dtype).contiguous(), lse.transpose(1, 2).contiguous()
    first = [b * inputs.max_seqlen_q for b in range(inputs.batch)]
    if inputs.cu_seqlens_q is not None:
        first = inputs.cu_seqlens_q.tolist()[:-1]
    q = inputs.q.reshape(-1, *inputs.q.shape[-2:])  # [T, H_q, D], whether packed or not
    out = q.new_zeros(*q.shape[:2], inputs.v_cache.shape[-1])
    lse = q.new_full(q.shape[:2], NEVER, dtype=_compute_dtype(inputs))
    if inputs.sinks is not None:  # all that a row without keys has
        of_rows = torch.repeat_interleave(torch.tensor(s_q)) if inputs.sinks.shape[0] > 1 else 0
        lse.copy_(inputs.sinks[of_rows])
    for b in range(inputs.batch):
        if s_q[b] > _most_rows(inputs) and s_kv[b]:
            rows = slice(first[b], first[b] + s_q[b])
            out_part, lse_part = _prompt(inputs, spec, forward, (b, s_kv[b]), q[rows])
            out[rows], lse[rows] = out_part[0], lse_part[0].transpose(0, 1)
    starts = torch.tensor(first)
    for group in groups:
        at = starts[group.index][:, None] + torch.arange(group.rows)
        out_part, lse_part = _attend_group(inputs, spec, group, q[at])
        out[at], lse[at] = out_part.to(out.dtype), lse_part
    return out.view(inputs.out_shape()), _as_lse(lse, inputs)


def _most_rows(inputs: CacheInputs) -> int:
    """Query rows up to which a sequence is computed in a group; all of a tree, which ``forward`` does not know."""
    return MANY_ROWS if inputs.tree_mask is None else inputs.max_seqlen_q


def _on_device(inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Everything as one group: query rows padded to the longest sequence, and no length looked at."""
    b = torch.arange(inputs.batch, device=inputs.q.device)
    s_kv = (inputs.cache_lengths + inputs.new_lengths()).long()[:, None, None, None]
    rows_q = inputs.max_seqlen_q
    tree = None if inputs.tree_mask is None else kv_cache.tree_of(inputs)
    group = Group(b, inputs.batch, rows_q, rows_q, s_kv, (0, inputs.capacity), (0, 0), tree)
    if inputs.cu_seqlens_q is None:
        out, lse = _attend_group(inputs, spec, group, inputs.q)
        return out.to(inputs.q.dtype).contiguous(), lse.transpose(1, 2).contiguous()
    group = dataclasses.replace(group, s_q=inputs.cu_seqlens_q.diff().long()[:, None, None, None])
    rows = inputs.cu_seqlens_q[:-1, None].long() + torch.arange(group.rows, device=b.device)
    out, lse = _attend_group(inputs, spec, group, inputs.q[rows.clamp(max=inputs.q.shape[0] - 1)])
    sequence, i = kv_cache.packed_positions(inputs)
    return out[sequence, i].to(inputs.q.dtype), _as_lse(lse[sequence, i], inputs)


def _prompt(
    inputs: CacheInputs, spec: AttentionSpec, forward: Dense, sequence: tuple[int, int], q: Tensor
) -> tuple[Tensor, Tensor]:
    """A sequence with many query rows, as the dense problem that it is."""
    b, s_kv = sequence
    begin, _ = tile_range(spec, 0, q.shape[0], q.shape[0], s_kv)
    one = torch.tensor([b])
    dtype = _compute_dtype(inputs) if inputs.is_fp8 else q.dtype
    span = (begin, s_kv)
    k_room, v_room = (_room(name, inputs, 1, [span], dtype) for name in ("k_cache", "v_cache"))
    piece = _piece(inputs, one, span)
    k, v = _read(inputs.k_cache, inputs.k_scale, piece, k_room), _read(inputs.v_cache, inputs.v_scale, piece, v_room)
    of_sequences = (inputs.bias, inputs.alibi_slopes, inputs.sinks)
    bias, alibi, sinks = (x if x is None or x.shape[0] == 1 else x[b : b + 1] for x in of_sequences)
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., begin:s_kv]
    # the diagonal is counted from the last key, so leaving out the first ones moves nothing
    dense = Inputs(q[None].to(dtype), k, v, bias, alibi_slopes=alibi, sinks=sinks)
    dense = dense.replace(max_seqlen_q=q.shape[0], max_seqlen_kv=k.shape[1])
    out, lse, _ = forward(dense, spec)
    return out.to(q.dtype), lse


# --- groups -------------------------------------------------------------------------------------------------------


def _groups(inputs: CacheInputs, spec: AttentionSpec, s_q: list[int], s_kv: list[int]) -> Iterator[Group]:
    """Groups of sequences with few query rows."""
    spans = [tile_range(spec, 0, rows, rows, length) for rows, length in zip(s_q, s_kv, strict=True)]
    todo = [b for b in range(inputs.batch) if 0 < s_q[b] <= _most_rows(inputs) and spans[b][0] < spans[b][1]]
    width = inputs.heads_kv * max(inputs.k_cache.shape[-1], inputs.v_cache.shape[-1])
    is_copied = not _is_view(inputs)
    members: list[int] = []
    for b in sorted(todo, key=lambda b: (s_q[b], spans[b][1])):
        ends = [spans[n] for n in (members[0], members[-1], b)] if members else []
        if members and (s_q[members[0]] != s_q[b] or not _fit(ends, len(members), width, is_copied)):
            yield _group(members, spec, spans, s_q, s_kv)
            members = []
        members.append(b)
    if members:
        yield _group(members, spec, spans, s_q, s_kv)


def _fit(spans: list[tuple[int, int]], members: int, width: int, is_copied: bool) -> bool:
    """Whether one more sequence joins a group: by the spans of the first, the last and the new one, ordered by end.

    It does if no position is read in vain, or few are, or the group is small.
    """
    first, last, new = spans
    if first == last == new:
        return True
    reach = new[1] - first[0]
    return (members + 1) * reach * width <= SMALL or (is_copied and reach <= WASTE * (first[1] - first[0]))


def _group(
    members: list[int], spec: AttentionSpec, spans: list[tuple[int, int]], s_q: list[int], s_kv: list[int]
) -> Group:
    members = sorted(members)
    rows, lengths = s_q[members[0]], [s_kv[b] for b in members]
    begins, ends = zip(*(spans[b] for b in members), strict=True)
    full = [full_range(spec, 0, rows, rows, length) for length in lengths]
    of_all = max(begin for begin, _ in full), min(end for _, end in full)
    length = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths)[:, None, None, None]
    in_a_row = members[-1] - members[0] + 1 == len(members)
    index = slice(members[0], members[-1] + 1) if in_a_row else torch.tensor(members)
    return Group(index, len(members), rows, rows, length, (min(begins), max(ends)), of_all)


# --- pieces -------------------------------------------------------------------------------------------------------


def _attend_group(inputs: CacheInputs, spec: AttentionSpec, group: Group, q: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` ``[n, rows, H_q, D_v]`` and ``lse`` ``[n, rows, H_q]`` of ``q`` ``[n, rows, H_q, D]``.

    A weight of 0 does not keep NaN out. On a CPU a result that is not finite tells of that, and is computed again.
    """
    if q.device.type != "cpu":
        return _attend_pieces(inputs, spec, group, q, is_careful=True)
    out, lse = _attend_pieces(inputs, spec, group, q, is_careful=False)
    is_finite = bool((out.sum() + lse.sum()).isfinite())
    return (out, lse) if is_finite else _attend_pieces(inputs, spec, group, q, is_careful=True)


def _attend_pieces(
    inputs: CacheInputs, spec: AttentionSpec, group: Group, q: Tensor, *, is_careful: bool
) -> tuple[Tensor, Tensor]:
    """As ``_attend_group``; carefully, no key or value reaches a row that does not keep it, whatever it holds."""
    dtype = _compute_dtype(inputs)
    n, rows = q.shape[:2]
    q = _grouped(q.to(dtype), inputs.heads_kv)
    parts: list[Part] = []
    spans = list(_pieces(inputs, group))
    k_room, v_room = (_room(name, inputs, n, spans, dtype) for name in ("k_cache", "v_cache"))
    for span in spans:
        piece, sizes = _piece(inputs, group.index, span), (n, rows, span[1] - span[0])
        k = _read(inputs.k_cache, inputs.k_scale, piece, k_room)
        v = _read(inputs.v_cache, inputs.v_scale, piece, v_room)
        kept = None
        if not (group.full[0] <= span[0] and span[1] <= group.full[1]):
            kept = group.kept(spec, span, q.device)
            unused = ~kept.any(2)[:, 0, :, None, None]  # may hold NaN, and 0 * NaN is NaN
            k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
        mask = _as_rows(_mask(inputs, spec, group, span, kept, dtype), inputs, sizes)
        operands = q, k.transpose(1, 2), v.transpose(1, 2), mask
        if is_careful:
            parts.append(_attend_by_pairs(*operands, spec, kept=None if mask is None else mask != NEVER))
        else:
            parts.append(_attend_piece(*operands, spec, inputs.bias is not None))
    if inputs.sinks is not None:
        parts.append(_sink(inputs.sinks, group, parts[0]))
    out, lse = _joined(parts)
    return _by_rows(out, rows), _by_rows(lse, rows)


def _grouped(q: Tensor, heads_kv: int) -> Tensor:
    """``[n, rows, H_q, D]`` -> ``[n, H_kv, G * rows, D]``: all that read the same keys are rows of one product."""
    if q.shape[1] == 1:
        return q.reshape(q.shape[0], heads_kv, -1, q.shape[3])
    return q.unflatten(2, (heads_kv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_rows(x: Tensor, rows: int) -> Tensor:
    """``[n, H_kv, G * rows, ...]`` -> ``[n, rows, H_q, ...]``."""
    if rows == 1:
        return x.reshape(x.shape[0], 1, -1, *x.shape[3:])
    return x.unflatten(2, (-1, rows)).movedim(3, 1).flatten(2, 3)


def _pieces(inputs: CacheInputs, group: Group) -> Iterator[tuple[int, int]]:
    """Spans of positions, each in one page, or ending with one but for the last."""
    begin, end = group.span
    width = inputs.heads_kv * max(inputs.k_cache.shape[-1], inputs.v_cache.shape[-1])
    size, page_size = max(64, PIECE // (group.count * width)), inputs.page_size
    if inputs.block_table is None and _is_view(inputs) and isinstance(group.index, slice):
        size = end - begin
    if inputs.block_table is None or page_size > size:
        while begin < end:
            stop = min(begin + size, end)
            if inputs.block_table is not None:
                stop = min(stop, (begin // page_size + 1) * page_size)
            yield begin, stop
            begin = stop
        return
    step, first = size // page_size * page_size, begin // page_size * page_size
    yield from ((max(at, begin), min(at + step, end)) for at in range(first, end, step))


def _is_view(inputs: CacheInputs) -> bool:
    """Whether a contiguous cache can be read in place, without a copy."""
    dims_agree = inputs.q.shape[-1] == inputs.v_cache.shape[-1]
    return inputs.block_table is None and inputs.k_cache.dtype == _compute_dtype(inputs) and dims_agree


def _room(
    name: str, inputs: CacheInputs, sequences: int, spans: Sequence[tuple[int, int]], dtype: torch.dtype
) -> Tensor:
    """Memory for the copies of one piece of ``k_cache`` or ``v_cache`` after the other."""
    store: Tensor = getattr(inputs, name)
    if _is_view(inputs):
        return store  # nothing is copied
    longest = max(_rows_copied(span, inputs) for span in spans)
    return _memory.room(name, sequences * longest * store.shape[2] * store.shape[3], dtype, store.device)


class _Memory(threading.local):
    """Host memory kept from call to call, since each new page costs more than filling it. One per thread."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least ``size`` elements, whose contents are the caller's until it asks for the same name again."""
        if device.type != "cpu" or size > 4 * PIECE:
            return torch.empty(size, dtype=dtype, device=device)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
        return kept


_memory = _Memory()


def _rows_copied(span: tuple[int, int], inputs: CacheInputs) -> int:
    """Rows of each sequence that reading ``span`` copies: whole pages, unless it lies inside one."""
    first, last = span[0] // inputs.page_size, (span[1] - 1) // inputs.page_size
    return span[1] - span[0] if first == last else (last - first + 1) * inputs.page_size


@dataclass(frozen=True)
class Piece:
    """The place of a span of positions of some sequences.

    Attributes:
        span: the positions.
        sequences: of a contiguous cache, which of its rows.
        rows: of its only page, or all those of its pages one after the other.
        pages: their numbers ``[n * m]`` in turn, or where they follow each other, which makes a view.
        shape: ``(n, m)``.
    """

    span: tuple[int, int]
    sequences: Tensor | slice
    rows: slice
    pages: Tensor | slice | None = None
    shape: tuple[int, int] = (1, 1)

    @property
    def is_inside_one(self) -> bool:
        """Whether one page holds it: then only its rows are touched, as a page may be long."""
        return self.shape[1] == 1


def _piece(inputs: CacheInputs, sequences: Tensor | slice, span: tuple[int, int]) -> Piece:
    (first, begin), (last, _) = page_and_row(span[0], inputs.page_size), page_and_row(span[1] - 1, inputs.page_size)
    rows = slice(begin, begin + span[1] - span[0])
    if inputs.block_table is None:
        return Piece(span, sequences, rows)
    count, table = inputs.k_cache.shape[0], inputs.block_table[sequences, first : last + 1]
    shape = (table.shape[0], table.shape[1])
    if table.device.type == "cpu" and 1 in shape:
        number = int(table[0, 0])
        in_a_row = table.numel() == 1 or bool((table.flatten().diff() == 1).all())
        if in_a_row and number >= 0 and number + table.numel() <= count:
            return Piece(span, sequences, rows, slice(number, number + table.numel()), shape)
    numbers = table.clamp(0, count - 1).flatten()  # of pages that are not in use they may be anything
    return Piece(span, sequences, rows, numbers, shape)


def _read(store: Tensor, scale: Tensor | None, piece: Piece, room: Tensor) -> Tensor:
    """The positions of a piece, ``[n, C, H_kv, D]`` in the dtype of ``room``: a view of the store, or a copy in it."""
    x = store[piece.sequences, piece.rows] if piece.pages is None else _pages(store, piece, room)
    if x.dtype != room.dtype:
        x = room[: x.numel()].view(x.shape).copy_(x)
    if scale is None:
        return x
    return x.mul_(_scales(scale, piece, store.shape[1]))  # scaled caches are e4m3, so this is a copy


def _pages(store: Tensor, piece: Piece, room: Tensor) -> Tensor:
    if piece.is_inside_one:
        store = store[:, piece.rows]
    if isinstance(piece.pages, slice):
        found = store[piece.pages]
    else:
        assert piece.pages is not None
        shape = (piece.pages.shape[0], *store.shape[1:])
        if room.dtype != store.dtype:
            room = _memory.room("pages", math.prod(shape), store.dtype, store.device)
        found = torch.index_select(store, 0, piece.pages, out=room[: math.prod(shape)].view(shape))
    found = found.unflatten(0, piece.shape).flatten(1, 2)
    return found if piece.is_inside_one else found[:, piece.rows]


def _scales(scale: Tensor, piece: Piece, page_size: int) -> Tensor:
    """``[1|n, 1|C, H_kv, 1]``."""
    if scale.shape[0] == 1:
        return scale[0, :, None]
    if piece.pages is None:
        return scale[piece.sequences][:, None, :, None]
    of_page = scale[piece.pages].unflatten(0, piece.shape)  # [n, m, H_kv]
    of_row = of_page if piece.is_inside_one else of_page.repeat_interleave(page_size, 1)[:, piece.rows]
    return of_row[..., None]


def _mask(
    inputs: CacheInputs,
    spec: AttentionSpec,
    group: Group,
    span: tuple[int, int],
    kept: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The additive mask of the scores ``[1|n, 1|H_q, 1|rows, 1|C]``, ``kept`` included."""
    result = None
    if inputs.bias is not None:
        result = inputs.bias[group.index] if inputs.bias.shape[0] > 1 else inputs.bias
        result = result.to(dtype)
        if result.shape[3] > 1:
            result = result[..., span[0] : span[1]]
            result = pad(result, (0, span[1] - span[0] - result.shape[3]))
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes if inputs.alibi_slopes.shape[0] == 1 else inputs.alibi_slopes[group.index]
        away = distance(spec, *group.positions(span, slopes.device), group.s_q, group.s_kv)
        alibi = -slopes.to(dtype)[:, :, None, None] * away.to(dtype)
        result = alibi if result is None else result + alibi
    if kept is not None:
        zeros = torch.zeros((), dtype=dtype, device=kept.device) if result is None else result
        result = torch.where(kept, zeros, NEVER)
    return result


def _as_rows(mask: Tensor | None, inputs: CacheInputs, sizes: tuple[int, int, int]) -> Tensor | None:
    """``[n, 1|H_kv, G * rows, C]``: a row for each query head of a group and each query row."""
    if mask is None:
        return None
    (n, rows, keys), group = sizes, inputs.heads_q // inputs.heads_kv
    if mask.shape[1] == 1:
        return mask.unsqueeze(2).expand(n, 1, group, rows, keys).reshape(n, 1, group * rows, keys)
    return mask.expand(n, -1, rows, keys).reshape(n, inputs.heads_kv, group * rows, keys)


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, has_bias: bool) -> Part:
    """The results of ``[n, H_kv, R, D]`` queries and ``[n, H_kv, C, D]`` keys.

    torch's kernel gives lse as one number, which is enough where no bias may move all scores of a row far away.
    """
    if q.device.type == "cpu" and spec.softcap is None and not has_bias and k.shape[2] >= FEW_KEYS:
        if mask is None and k[0].numel() >= LONG and k.shape[2] >= 2 * FOLD:
            return _attend_folded(q, k, v, spec)
        out, lse = flash.attend(q, k, v, mask, spec.scale)
        return out[None], lse[None], torch.zeros_like(lse)[None]
    return _attend_by_pairs(q, k, v, mask, spec, kept=None)


def _attend_by_pairs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, *, kept: Tensor | None
) -> Part:
    """By the formula, all scores at once. Where ``kept`` is False, neither key nor value is looked at."""
    scores = spec.scale * (q @ k.transpose(-1, -2))
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if mask is not None:
        scores = scores + mask
    if kept is not None:
        scores = torch.where(kept, scores, NEVER)
    largest = scores.amax(-1, keepdim=True)
    base = torch.where(largest == NEVER, 0, largest)
    p = torch.exp(scores - base)
    total = p.sum(-1, keepdim=True)
    lse, low = numerics.split_lse(base[..., 0], total[..., 0])
    product = p @ v if kept is None else numerics.kept_product(p, v, kept)
    return (product / torch.where(total == 0, 1, total))[None], lse[None], low[None]


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Part:
    """Each sequence as a batch of parts, of which the kernel takes all heads, which lie side by side in memory."""
    whole = k.shape[2] // FOLD * FOLD
    sequences = []
    for n in range(k.shape[0]):
        k_parts, v_parts = (x[n, :, :whole].unflatten(1, (-1, FOLD)).transpose(0, 1) for x in (k, v))
        sequences.append(flash.attend(q[n].expand(k_parts.shape[0], -1, -1, -1), k_parts, v_parts, None, spec.scale))
    out, lse = (torch.stack(x, 1) for x in zip(*sequences, strict=True))
    parts = [(out, lse, torch.zeros_like(lse))]
    if whole < k.shape[2]:
        parts.append(_attend_piece(q, k[:, :, whole:], v[:, :, whole:], None, spec, has_bias=False))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def _sink(sinks: Tensor, group: Group, like: Part) -> Part:
    """The sink's column as one more part, without values."""
    out, lse, _ = like
    logits = sinks if sinks.shape[0] == 1 else sinks[group.index]
    logits = logits.to(lse.dtype).unflatten(1, (lse.shape[2], -1))[..., None]  # [1|n, H_kv, G, 1]
    logits = logits.expand(lse.shape[1], -1, -1, group.rows).flatten(2)
    return torch.zeros_like(out[:1]), logits[None], torch.zeros_like(logits)[None]


def _joined(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """``[n, H_kv, R, D]`` and ``[n, H_kv, R]`` of all keys."""
    outs, lses, lows = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
    if len(lses) == 1:
        return outs[0], lses[0]
    lse, _, shares = numerics.merge_lse(lses, lows)
    return (outs * shares[..., None]).sum(0), lse


# --- dtypes and shapes --------------------------------------------------------------------------------------------


def _compute_dtype(inputs: CacheInputs) -> torch.dtype:
    return torch.float64 if inputs.q.dtype == torch.float64 else torch.float32


def _as_lse(lse: Tensor, inputs: CacheInputs) -> Tensor:
    """``[T, H_q]`` -> ``(B, H_q, S_q)``, or packed ``(H_q, T_q)``."""
    lse = lse.transpose(0, 1)
    if not inputs.is_packed:
        lse = lse.unflatten(1, (inputs.batch, -1)).transpose(0, 1)
    return lse.contiguous()
