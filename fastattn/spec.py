"""THE definition of attention. Every other file reads it; none restates it.

For one query row ``i`` of ``S_q`` and one key row ``j`` of ``S_kv``, with head dims ``D_qk`` and ``D_v``:

    scores = scale * q @ k^T                              (fp32, or fp64 for fp64 inputs)
    scores = softcap * tanh(scores / softcap)             if softcap
    scores = scores + bias + alibi                        if given; alibi = -slope * distance(i, j)
    scores = -inf where not keep(i, j)                    band, boolean mask, segments, intervals, lengths, bias = -inf
    p      = softmax(scores, plus one sink column per head if sinks are given)
    out    = dropout(p) @ v
    lse    = logsumexp(scores, plus the sink)             (natural log)

Heads: query head ``h`` reads key/value head ``h // G`` with ``G = H_q // H_kv``.

The band is the only comparison of positions. Causal masks and sliding windows are both bands:
``left`` keys before the diagonal and ``right`` keys after it are kept, the diagonal itself is extra, and
``None`` means unbounded. The anchor says where the diagonal lies when ``S_q != S_kv``: it ends in the
lower right corner (as in decoding, where the newest query sees every key) or begins in the upper left.

Causal, lower right, ``S_q = 2``, ``S_kv = 5`` (1 = attend):

    left=None right=0 anchor=lower_right
    1 1 1 1 0
    1 1 1 1 1

Causal, upper left, ``S_q = 2``, ``S_kv = 5``:

    left=None right=0 anchor=upper_left
    1 0 0 0 0
    1 1 0 0 0

Causal, lower right, ``S_q = 5``, ``S_kv = 2``: the first three rows are empty:

    left=None right=0 anchor=lower_right
    0 0
    0 0
    0 0
    1 0
    1 1

Window ``(1, 0)`` and window ``(1, 1)``, ``S_q = S_kv = 4``:

    left=1 right=0 anchor=lower_right
    1 0 0 0
    1 1 0 0
    0 1 1 0
    0 0 1 1

    left=1 right=1 anchor=lower_right
    1 1 0 0
    1 1 1 0
    0 1 1 1
    0 0 1 1

Segments (packed documents): a pair is kept only where ``segment_ids_q[i] == segment_ids_kv[j]``.

Intervals (masks as data): each query row has ``n`` half-open ranges ``[start, stop)`` of key positions, and a pair is
kept only where one of them holds ``j``: ``any(start <= j < stop)``. Ranges may overlap and stand in any order; one that
stops where it starts or before is empty, and what lies outside the keys is ignored.

Empty rows keep no key: ``out`` is 0, every gradient is 0, and ``lse`` is ``-inf`` (the sink's logit if there
is one).

NaN and infinity do not spread beyond the rows that keep them. A key or value may hold anything without effect on the
rows that do not keep it, on their ``out`` and on the gradients of what they keep. A row that keeps a NaN, or whose own
query is NaN, is NaN; a row that keeps an infinite value is infinite or NaN. Softmax does not depend on an offset that
all scores of a row share, however large (-1e9, finfo.min), and neither do the weights. GPU kernels ignore only what no
row keeps (docs/decisions/empty_rows.md).

Rounding: each product ``q @ k^T`` has an error of some units in its last place, and the weights are the softmax of the
rounded scores. It is invisible at usual scores, but at 1e8 neighbouring fp32 numbers are 8 apart: two keys whose exact
scores are equal may then differ by a factor of ``exp(8)`` in their weights. The weights of a row still add up to 1.
Scores of that size need fp64 inputs, or a smaller ``scale``.

Dropout is a pure function of ``(seed, offset, b, h, i, j)``: see ``fastattn/rng.py``.
In a packed batch ``b`` is the index of the sequence, and ``i`` and ``j`` count from its beginning.

Statistics (``return_stats=``) describe the weights ``p`` before dropout, without the matrix, for each query head:

    entropy        of each row, -sum_j p_ij log p_ij over its keys, in nats; the sink is no key
    largest_logit  of each row, the largest finished score of its keys; -inf where the row keeps none
    largest_key    its position, the first of equal ones; -1 where the row keeps none
    key_sum        of each key, sum_i p_ij
    key_max        of each key, max_i p_ij; 0 where no row keeps it

Entropy, largest logit (by its largest key) and key sums have gradients; the position and the maximum have none.

Caches (``fastattn.attention_with_kv_cache``) hold keys and values in pages, ``(P, page_size, H_kv, D)``: position ``j``
of sequence ``b`` lies at ``page_and_row(j, page_size)``, the first number of which is looked up in row ``b`` of a block
table. Without a block table each sequence owns one page: a contiguous cache. Before a call it holds
``cache_lengths[b]`` positions; the ``s_new`` new ones follow them, so ``S_kv = cache_lengths[b] + s_new``:

    page_size = 4, block_table[b] = [7, 2, ...], cache_lengths[b] = 5, one new token:

    page 7:  0 1 2 3        page 2:  4 [5] . .        S_kv = 6

Trees (``tree_mask=``): the new tokens of a call may be the nodes of a tree, the guesses of speculative decoding. Each
then sees all positions that the cache held before, and of the new tokens those whose bit is set in its row of int32
words: token ``n`` is bit ``n % 32`` of word ``n // 32`` (``tree_bit``). The bits take the place of the right side of
the band. A row has the bits of the token itself and of its ancestors; their number less 1 is its depth
(``tree_depth``). The position of a new token is ``cache_lengths[b]`` plus its depth, in its rotary embedding, its
window and its ALiBi distances, so that each path of the tree is computed as if it were alone; it is stored in the row
of its index:

    token     0  1  2  3  4        bits    1 0 0 0 0        words    1
    parent   -1  0  1  0  3                1 1 0 0 0                 3
    depth     0  1  2  1  2                1 1 1 0 0                 7
                                           1 0 0 1 0                 9
                                           1 0 0 1 1                25

Batch-invariant calls (``batch_invariant=``) cut the keys of each sequence at fixed positions. So the bits of its
results depend on its own queries, keys and values, not on the sequences beside it, their order, or pages.

Rotary embedding rotates query row ``i`` by the position of its diagonal, and new keys by their own positions before
they are stored. A page with scales holds ``stored = round(x / scale)``, clamped to the range of its dtype, and is read
as ``stored * scale``. Pages of which no query keeps a row are neither read nor looked up in the block table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Anchor = Literal["lower_right", "upper_left"]
ANCHORS: tuple[Anchor, ...] = ("lower_right", "upper_left")

# Dropout compares 16 random bits with an integer threshold, so probabilities are multiples of 2^-16.
DROPOUT_LEVELS = 1 << 16


@dataclass(frozen=True)
class AttentionSpec:
    """The scalar half of a problem; the tensors are in ``problem.Inputs``.

    Attributes:
        scale: factor on ``q @ k^T``; by convention ``D_qk ** -0.5``.
        softcap: scores are squashed to ``(-softcap, softcap)``; None leaves them alone.
        left: keys kept before the diagonal; None keeps all of them.
        right: keys kept after the diagonal; None keeps all of them, 0 is causal.
        anchor: where the diagonal lies if ``S_q != S_kv``.
        dropout_p: probability, in [0, 1], that an attention weight is dropped.
    """

    scale: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    anchor: Anchor = "lower_right"
    dropout_p: float = 0.0

    @property
    def has_band(self) -> bool:
        return self.left is not None or self.right is not None

    @property
    def dropout_threshold(self) -> int:
        """A weight is dropped where its 16 random bits are below this."""
        return round(self.dropout_p * DROPOUT_LEVELS)

    @property
    def dropout_scale(self) -> float:
        """Factor on the surviving weights: the inverse of the exact probability of survival."""
        survivors = DROPOUT_LEVELS - self.dropout_threshold
        return DROPOUT_LEVELS / survivors if survivors else 0.0

    def transposed(self) -> AttentionSpec:
        """The same band seen from the keys: ``keep(i, j)`` of one is ``keep(j, i)`` of the other."""
        return dataclasses.replace(self, left=self.right, right=self.left)


# The functions below take ints or integer tensors; positions broadcast.


def diagonal(spec: AttentionSpec, s_q: Any, s_kv: Any) -> Any:
    """The key on the diagonal of query row 0."""
    return s_kv - s_q if spec.anchor == "lower_right" else 0


def distance(spec: AttentionSpec, i: Any, j: Any, s_q: Any, s_kv: Any) -> Any:
    """Distance of key ``j`` from the diagonal of row ``i``; ALiBi's bias is ``-slope`` times this."""
    return abs(j - i - diagonal(spec, s_q, s_kv))


def keep(spec: AttentionSpec, i: Any, j: Any, s_q: Any, s_kv: Any) -> Any:
    """True where query row ``i`` may attend to key row ``j``: inside the lengths and inside the band."""
    offset = j - i - diagonal(spec, s_q, s_kv)
    kept = (i >= 0) & (i < s_q) & (j >= 0) & (j < s_kv)
    if spec.left is not None:
        kept = kept & (offset >= -spec.left)
    if spec.right is not None:
        kept = kept & (offset <= spec.right)
    return kept


def in_intervals(ranges: Any, j: Any) -> Any:
    """True where one of the ranges, pairs ``(start, stop)``, holds key row ``j``."""
    held: Any = False
    for start, stop in ranges:
        held = held | ((start <= j) & (j < stop))
    return held


def page_and_row(j: Any, page_size: int) -> tuple[Any, Any]:
    """Place of position ``j`` of a sequence in a cache: the entry of its block table, and the row of that page."""
    return j // page_size, j % page_size


def tree_bit(n: Any) -> tuple[Any, Any]:
    """Place of new token ``n`` in a row of a tree mask: the word, and the bit of it."""
    return n // 32, n % 32


def tree_depth(count: Any) -> Any:
    """Depth in its tree of a new token whose row has ``count`` bits: 0 for a root, and for a token that sees none."""
    return count - 1 * (count > 0)


def tile_range(spec: AttentionSpec, i0: int, i1: int, s_q: int, s_kv: int) -> tuple[int, int]:
    """The smallest ``[begin, end)`` of keys outside which rows ``i0 .. i1 - 1`` keep nothing."""
    d = diagonal(spec, s_q, s_kv)
    begin = 0 if spec.left is None else max(0, i0 + d - spec.left)
    end = s_kv if spec.right is None else min(s_kv, i1 + d + spec.right)
    return (begin, end) if begin < end and i0 < i1 else (0, 0)


def full_range(spec: AttentionSpec, i0: int, i1: int, s_q: int, s_kv: int) -> tuple[int, int]:
    """The ``[begin, end)`` of keys that every one of the rows ``i0 .. i1 - 1`` keeps: no masking needed there."""
    d = diagonal(spec, s_q, s_kv)
    begin = 0 if spec.left is None else max(0, i1 - 1 + d - spec.left)
    end = s_kv if spec.right is None else min(s_kv, i0 + 1 + d + spec.right)
    return (begin, end) if begin < end and i0 < i1 else (0, 0)


def kept_pairs(spec: AttentionSpec, s_q: int, s_kv: int) -> int:
    """Number of pairs ``(i, j)`` that the band keeps, per head and batch entry; FLOP counts come from here.

    A forward pass costs ``2 * (D_qk + D_v)`` FLOPs for each kept pair, a backward pass 2.5 times as much for
    ``D_qk == D_v`` (five products instead of two).
    """
    d = diagonal(spec, s_q, s_kv)
    after_left = 0 if spec.left is None else _pairs_below(d - spec.left - 1, s_q, s_kv)
    up_to_right = s_q * s_kv if spec.right is None else _pairs_below(d + spec.right, s_q, s_kv)
    return max(0, up_to_right - after_left)


def _pairs_below(c: int, s_q: int, s_kv: int) -> int:
    """The number of pairs with ``j - i <= c``: row ``i`` has ``clamp(i + c + 1, 0, s_kv)`` of them."""
    first = min(max(-c, 0), s_q)  # first row with any
    full = min(max(s_kv - c - 1, first), s_q)  # first row with all s_kv
    growing = full - first
    return growing * (first + c + 1) + growing * (growing - 1) // 2 + (s_q - full) * s_kv
