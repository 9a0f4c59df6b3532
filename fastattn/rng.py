"""Random bits of dropout: Philox4x32 with 7 rounds, as a pure function of the element, in torch ops.

The random bits of element ``(b, h, i, j)`` depend on ``(seed, offset, b, h, i, j)`` alone, so every backend, tile size
and pass drops the same elements. One Philox call gives four 32-bit words, that is eight 16-bit numbers:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (i, (j // 32) * 4 + (j % 8) // 2, b * H_q + h, offset & 0xffffffff)
    bits    = 16-bit half (j % 2) of word (j % 32) // 8

The eight columns that share a call are the ones that one thread of a tensor-core accumulator holds, so CUDA
kernels need no exchange between threads. Seven rounds are the fewest that pass BigCrush (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A call on a part of a larger problem, as in context parallel, draws that problem's numbers: its ``rng_state`` has six
numbers, ``(seed, offset, i0, j0, h0, H)``. Row ``i`` then counts as ``i0 + i``, column ``j`` as ``j0 + j``, and
``b * H + h0 + h`` takes the place of ``b * H_q + h``. Only these functions read them, so ``portable`` and ``eager``
alone serve such a call, which is never made through the public functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec

PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for each counter; every argument holds 32-bit values as int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps both halves right
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        hi0, lo0 = (product0 >> 32) & _WORD, product0 & _WORD
        hi1, lo1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _WORD, (k1 + PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def head_number(rng_state: Tensor, b: Tensor, h: Tensor, heads: int) -> Tensor:
    """``b * H_q + h``, the number of a head of a batch entry, of the ``heads`` that a call has."""
    return b * rng_state[5] + rng_state[4] + h if _is_placed(rng_state) else b * heads + h


def _is_placed(rng_state: Tensor) -> bool:
    """Whether a call is a part of a larger problem."""
    return rng_state.shape[0] == 6


def _words(rng_state: Tensor, head: Tensor, i: Tensor, call: Tensor) -> tuple[Tensor, ...]:
    """The four words of a call."""
    seed, offset = rng_state[0], rng_state[1]
    if _is_placed(rng_state):
        i = i + rng_state[2]
    return philox((i.long(), call, head.long(), offset & _WORD), (seed & _WORD, (seed >> 32) & _WORD))


def random_bits(rng_state: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The 16 random bits (int64, 0 .. 65535) of each element; ``head`` is ``head_number``. Arguments broadcast."""
    j = j.long() + rng_state[3] if _is_placed(rng_state) else j.long()
    words = _words(rng_state, head, i, (j // 32) * 4 + (j % 8) // 2)
    lane = (j % 32) // 8
    word = torch.where(lane < 2, torch.where(lane < 1, words[0], words[1]), torch.where(lane < 3, words[2], words[3]))
    return (word >> (16 * (j % 2))) & 0xFFFF


def random_bits_of_columns(rng_state: Tensor, head: Tensor, i: Tensor, begin: int, end: int) -> Tensor:
    """``random_bits`` of columns ``begin .. end - 1``, the last dimension, with one Philox call for eight of them."""
    if _is_placed(rng_state):  # where the calls begin is known on the device alone
        return random_bits(rng_state, head, i, torch.arange(begin, end, device=rng_state.device))
    first, last = begin // 32, -(-end // 32)
    words = _words(rng_state, head, i, torch.arange(4 * first, 4 * last, device=rng_state.device))
    lanes = torch.stack([word.unflatten(-1, (last - first, 4)) for word in words], dim=-2)  # [..., 32 columns, 4, 4]
    bits = torch.stack([lanes & 0xFFFF, lanes >> 16], dim=-1).flatten(-4)
    return bits[..., begin - 32 * first : end - 32 * first]


def dropout_keep(spec: AttentionSpec, rng_state: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """True where the attention weight of an element survives dropout."""
    return random_bits(rng_state, head, i, j) >= spec.dropout_threshold


def dropout_keep_columns(
    spec: AttentionSpec, rng_state: Tensor, head: Tensor, i: Tensor, begin: int, end: int
) -> Tensor:
    """``dropout_keep`` of the columns ``begin .. end - 1``, the last dimension."""
    return random_bits_of_columns(rng_state, head, i, begin, end) >= spec.dropout_threshold


def new_rng_state(device: torch.device) -> Tensor:
    """A fresh ``(seed, offset)`` from torch's generator of ``device``; follows torch.manual_seed, without a sync."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
