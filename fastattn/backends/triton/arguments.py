"""Arguments of the kernels: the tensors and numbers of one call as named tuples, and the compile-time ``Flags``.

Triton compiles a kernel anew when an int argument is 1 or a multiple of 16. Lengths and strides must not cause that.
``triton.jit(do_not_specialize=...)`` covers scalar arguments only: Triton 3.6 and 3.7 specialise ints inside tuples
even so (``tests/backends/triton/test_gates.py`` asserts it, and fails once that changes), and signatures of 60 scalars
would be unreadable. So an int in these tuples is passed as ``coded(n)``, which is odd and at least 3; kernels decode it
with ``tile.number``. Kernels are then compiled for their ``Flags`` and dtypes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.triton.configs import REGISTER_HEAVY

UNBOUNDED = 1 << 29  # longer than any sequence; coded, and added to a length, it fits an int32


def coded(n: int) -> int:
    """``n`` as an int that Triton does not specialise on; the inverse of ``tile.number``."""
    return 2 * n + 3


class Bshd(NamedTuple):
    """A ``(B, S, H, D)`` tensor; packed ``(T, H, D)`` with ``stride_b`` 0."""

    ptr: Any
    stride_b: Any
    stride_s: Any
    stride_h: Any
    stride_d: Any

    @classmethod
    def of(cls, x: Tensor) -> Bshd:
        stride_b = x.stride(0) if x.dim() == 4 and x.shape[0] > 1 else 0
        return cls(x, coded(stride_b), coded(x.stride(-3)), coded(x.stride(-2)), coded(x.stride(-1)))

    def vector(self, most: int = 8) -> int:
        """``most`` or 8, if all rows begin at a multiple of so many elements, and of 16 bytes; else 1."""
        x = self.ptr
        strides = x.stride()[1:-1] if x.dim() == 4 and x.shape[0] == 1 else x.stride()[:-1]
        if x.stride(-1) != 1 or x.data_ptr() % 16 != 0:
            return 1
        return next((n for n in (most, 8) if all(stride % n == 0 for stride in strides)), 1)


class Scores(NamedTuple):
    """A ``(B, H_q, S_q, S_kv)`` tensor; the stride of a dimension that broadcasts is 0."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_q: Any
    stride_kv: Any

    @classmethod
    def of(cls, x: Tensor) -> Scores:
        strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return cls(x, *map(coded, strides))


class PerRow(NamedTuple):
    """A number for each query row: ``(B, H_q, S_q)``; packed ``(H_q, T)`` with ``stride_b`` 0."""

    ptr: Any
    stride_b: Any
    stride_h: Any

    @classmethod
    def of(cls, x: Tensor) -> PerRow:
        return cls(x, coded(x.stride(0) if x.dim() == 3 else 0), coded(x.stride(-2)))


class Stats(NamedTuple):
    """The statistics of each query row for the backward kernels: three arrays with the shape and strides of ``PerRow``.

    ``lse`` is natural and ``+inf`` for an empty row; ``low_log2`` is ``lse_low`` in base 2; ``delta`` is
    ``rowsum(dout * out) - dlse``.
    """

    lse: Any
    low_log2: Any
    delta: Any
    stride_b: Any
    stride_h: Any

    @classmethod
    def like(cls, lse: Tensor) -> Stats:
        """Memory for the statistics of the rows of ``lse``."""
        arrays = [torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in range(3)]
        _, stride_b, stride_h = PerRow.of(arrays[0])
        return cls(arrays[0], arrays[1], arrays[2], stride_b, stride_h)


class PerHead(NamedTuple):
    """A number for each head: ``(1|B, H_q)``; of a cache, for each head of each page."""

    ptr: Any
    stride_b: Any
    stride_h: Any

    @classmethod
    def of(cls, x: Tensor) -> PerHead:
        return cls(x, coded(0 if x.shape[0] == 1 else x.stride(0)), coded(x.stride(1)))


class PerToken(NamedTuple):
    """A number for each token: ``(1|B, S)``."""

    ptr: Any
    stride_b: Any
    stride_s: Any

    @classmethod
    def of(cls, x: Tensor) -> PerToken:
        return cls(x, coded(0 if x.shape[0] == 1 else x.stride(0)), coded(x.stride(1)))


class Ranges(NamedTuple):
    """Intervals ``(1|B, 1|H_q, S_q, n, 2)``, packed ``(1, 1|H_q, T_q, n, 2)``; the n pairs of a row lie together."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any
    count: Any

    @classmethod
    def of(cls, x: Tensor) -> Ranges:
        x = x if x.stride()[-2:] == (2, 1) or x.shape[3] == 0 else x.contiguous()
        stride_b, stride_h = (0 if size == 1 else step for size, step in zip(x.shape[:2], x.stride()[:2], strict=True))
        return cls(x, coded(stride_b), coded(stride_h), coded(x.stride(2)), coded(x.shape[3]))


class Visits(NamedTuple):
    """A list of tiles for each block of rows of the kernel at hand, ``(1|B, 1|H, blocks, ...)`` int32."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_block: Any


class Terms(NamedTuple):
    """The optional tensors; None where not given.

    ``segment_columns`` holds, for each block of rows of the kernel at hand, the range of columns that share a segment
    with it, and inside it the range of those that need no mask: ``(B, blocks, 4)`` int32, see ``prescan.py``.
    """

    bias: Any = None
    mask: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    segment_ids_q: Any = None
    segment_ids_kv: Any = None
    segment_columns: Any = None
    intervals: Any = None
    visits: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_kv: Any = None
    rng_state: Any = None
    cache: Any = None


class Sizes(NamedTuple):
    """The numbers of a call. Ints are coded."""

    s_q: Any
    s_kv: Any
    heads_q: Any
    group: Any
    left: Any
    right: Any
    lower_right: Any
    dropout_threshold: Any
    scale: Any
    softcap: Any
    dropout_scale: Any


class Schedule(NamedTuple):
    """The work of a one-dimensional grid, divided by ``tile.scheduled``. Ints are coded.

    ``parts`` programs share a group of query heads; None: one has the whole group.
    """

    blocks: Any
    heads: Any
    heads_together: Any
    parts: Any = None


class Cache(NamedTuple):
    """Layout of the keys and values of a cache; all ints are coded.

    A sequence has ``lengths`` positions, to which ``new_rows`` are added, or ``new_queries`` (0 or 1) for each of its
    query rows. Its pages, of the ``pages`` that there are, are in ``block_table``, ``(B, max_pages)``; None: sequence
    ``b`` owns page ``b``. The scales of e4m3 caches are None if they are 1.

    ``tree`` are the words of a tree mask, of which a row has ``stride_s``; ``depths`` those of its tokens, None where
    no term counts positions. Both count packed rows over all sequences.
    """

    lengths: Any
    new_rows: Any
    new_queries: Any
    capacity: Any
    page_size: Any
    pages: Any
    block_table: Any = None
    k_scale: Any = None
    v_scale: Any = None
    tree: Any = None
    depths: Any = None


class Splits(NamedTuple):
    """The work of the decoding kernel, divided among its programs. Ints are coded.

    For each key/value head there are ``blocks`` of packed query rows, and for each of these the keys are cut into
    ``splits``, which lie ``stride_out`` and ``stride_lse`` apart in the results. They have
    ``tiles`` of keys if ``Flags.fixed``, else they are equally long.
    """

    blocks: Any
    splits: Any
    tiles: Any
    stride_out: Any
    stride_lse: Any


@dataclass(frozen=True)
class Flags:
    """Compile-time constants of a kernel, besides the dtypes and its configuration.

    Attributes:
        d_qk, d_v: head dims; tiles are padded to ``block_qk`` and ``block_v``, powers of two.
        vector: 8 if every row of q, k, v (and dout) begins at a multiple of 8 elements, else 1.
        contiguous: their last stride is 1.
        left, right: the band is bounded on that side.
        packed, softcap, alibi, sinks, segments, dropout: features in use.
        intervals: 0 if absent; the ranges of a row, rounded up to 1, 2 or 4; 8 for more, in a loop.
        bias, mask: 0 if absent, 8 if their rows are contiguous and begin at multiples of 8, else 1.
        plain: scores are ``scale * q @ k^T`` with a positive scale, so the maximum can be taken before scaling.
        precise: q, k and v are fp32.
        precision: of products of fp32 operands, "ieee" or "tf32".
        upcast: compute with fp32 operands: the interpreter has no bf16 arithmetic.
        cached: keys and values lie in a cache; ``vector_cache`` is ``vector`` of its rows, 16 if possible in e4m3.
        paged: they lie in pages of a block table.
        fp8: they are e4m3.
        tree: new tokens see each other by a tree mask.
        chunked: products run over parts of the head dim, though whole rows would do.
        opaque: left operands computed from scores are hidden from Triton, see ``operands.left_operand``.
        fixed: splits have so many tiles as ``Splits`` says, counted from position 0.
    """

    d_qk: int
    d_v: int
    block_qk: int
    block_v: int
    vector: int = 1
    contiguous: bool = True
    packed: bool = False
    left: bool = False
    right: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    segments: bool = False
    dropout: bool = False
    intervals: int = 0
    bias: int = 0
    mask: int = 0
    plain: bool = True
    precise: bool = False
    precision: str = "ieee"
    upcast: bool = False
    cached: bool = False
    vector_cache: int = 1
    paged: bool = False
    fp8: bool = False
    tree: bool = False
    chunked: bool = False
    opaque: bool = False
    fixed: bool = False

    @property
    def features(self) -> frozenset[str]:
        """The features in use on which the choice of a configuration depends."""
        several = self.intervals > 0  # they need the registers of both
        others = (("paged", self.paged), ("e4m3", self.fp8), ("segments", several), ("mask", several))
        others_used = {name for name, is_used in others if is_used}
        return frozenset(name for name in REGISTER_HEAVY if getattr(self, name)) | others_used

    @property
    def in_chunks(self) -> bool:
        """Whether products run over a part of the head dim at a time: see ``dot_in_chunks``.

        Whole rows would not fit into registers without tensor cores, nor, at 1 KB for each row, into shared memory.
        """
        return self.chunked or (self.precise and (self.precision == "ieee" or max(self.block_qk, self.block_v) > 128))

    @property
    def vector_out(self) -> int:
        """``vector`` of contiguous tensors with these head dims."""
        return 8 if self.d_qk % 8 == 0 and self.d_v % 8 == 0 else 1
