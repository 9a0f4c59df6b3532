"""Faults planted in the forward kernel, one at a time. The emulator has to report every one of them.

A fault is tried on one line of ``instances.inc``: the causal kernel for head dim 128, or the one where it can show.
"""

from __future__ import annotations

from fault import Fault

FULL_128 = ("FORWARD", 128, 128, 0, 0)
CAPPED_64 = ("FORWARD", 64, 64, 1, 1)

PRODUCER, CONSUMER, SHARED = "sm90/producer.cuh", "sm90/consumer.cuh", "sm90/shared.h"
FORWARD, SCHEDULE, TRAITS = "sm90/forward.cuh", "sm90/schedule.h", "sm90/traits.h"
FRAGMENT = "sm90/fragment.cuh"
SOFTMAX, MASK = "common/softmax.h", "common/mask.h"

OWN_BARRIER = "named_sync(kOwnBarrier + consumer, kWarpgroup);"
FINISH_STEP = "wgmma_wait<0>(out);\n    release(v);\n    pack_fragment<typename C::Element>(p, scores);"

FAULTS = [
    # What the producer may do when
    Fault("K is loaded with the wrong parity", PRODUCER, "k.empty(), k.parity ^ 1", "k.empty(), k.parity"),
    Fault("V is loaded with the wrong parity", PRODUCER, "v.empty(), v.parity ^ 1", "v.empty(), v.parity"),
    Fault("the parity of Q never flips", PRODUCER, "q_parity ^= 1;", ""),
    Fault(
        "more bytes are expected than come", FRAGMENT, "ROWS * CHUNKS * kRowBytes)", "ROWS * CHUNKS * kRowBytes + 16)"
    ),
    Fault("fewer bytes are expected than come", FRAGMENT, "ROWS * CHUNKS * kRowBytes)", "ROWS * kRowBytes)"),
    # What it loads, and where
    Fault("V goes to the stage of K", PRODUCER, "shared.v(v.stage)", "shared.v(k.stage)"),
    Fault("V is loaded one block off", PRODUCER, "load_v(block + 1)", "load_v(block)"),
    Fault("the second chunk brings the first columns", FRAGMENT, "chunk * kChunkColumns", "0"),
    Fault("K and V of the query head's number", PRODUCER, "tile.head / group", "tile.head"),
    Fault("K ignores where its sequence begins", PRODUCER, "k.full(), tile.first_kv + block", "k.full(), block"),
    Fault("Q ignores where its sequence begins", PRODUCER, "tile.first_q + tile.row, tile.head", "tile.row, tile.head"),
    # Products in flight
    Fault(
        "K is released before its product is done",
        CONSUMER,
        "wgmma_wait<1>(scores);\n    release(k);",
        "release(k);\n    wgmma_wait<1>(scores);",
    ),
    Fault(
        "V is released before its product is done",
        CONSUMER,
        FINISH_STEP,
        "release(v);\n    wgmma_wait<0>(out);\n    pack_fragment<typename C::Element>(p, scores);",
    ),
    Fault(
        "P is packed while the product reads it",
        CONSUMER,
        FINISH_STEP,
        "pack_fragment<typename C::Element>(p, scores);\n    wgmma_wait<0>(out);\n    release(v);",
    ),
    Fault(
        "out is cleared while the product adds to it",
        CONSUMER,
        "    wgmma_wait<0>(out);\n    release(v);\n    pack",
        "    out[0] = 0;\n    wgmma_wait<0>(out);\n    release(v);\n    pack",
    ),
    Fault("the scores are not committed", FRAGMENT, "c != 0);\n  }\n  wgmma_commit();", "c != 0);\n  }"),
    Fault(
        "the output is not committed",
        FRAGMENT,
        "b + n_major_step(row), 1);\n  }\n  wgmma_commit();",
        "b + n_major_step(row), 1);\n  }",
    ),
    Fault(
        "no wgmma.fence before the first scores",
        CONSUMER,
        "wgmma_fence();\n  issue_scores<C>(scores, shared, consumer, k.stage);\n  wgmma_wait<0>",
        "issue_scores<C>(scores, shared, consumer, k.stage);\n  wgmma_wait<0>",
    ),
    Fault("no wait for K", CONSUMER, "2 * kWarpgroup);\n    mbarrier_wait(k.full(), k.parity);", "2 * kWarpgroup);"),
    Fault("no wait for V", CONSUMER, "k.stage);\n    mbarrier_wait(v.full(), v.parity);", "k.stage);"),
    Fault("every lane releases a stage", FRAGMENT, "if (thread_index() % 32 == 0) mbarrier", "mbarrier"),
    Fault("the first scores add to what was there", FRAGMENT, "c != 0);", "1);"),
    Fault("out is not cleared", CONSUMER, "++i) out[i] = 0.f;", "++i) out[i] = 1.f;"),
    # Layouts
    Fault(
        "the leading offset of V is wrong",
        CONSUMER,
        "n_major(shared.v(stage), C::BLOCK_N)",
        "n_major(shared.v(stage), 8)",
    ),
    Fault("V is read as K-major", FRAGMENT, "wgmma_rs<1>", "wgmma_rs<0>"),
    Fault("K steps by the chunks of Q", FRAGMENT, "k_major_step(ROWS_B, c)", "k_major_step(ROWS_A, c)", FULL_128),
    Fault(
        "every consumer takes the first rows of Q",
        CONSUMER,
        "k_major(recomputed(shared.q() + consumer * 64 * kRowBytes))",
        "k_major(shared.q())",
    ),
    Fault("P is taken in the wrong order", FRAGMENT, "a[i + 1], a[i + 2]", "a[i + 2], a[i + 1]"),
    Fault("out is staged without swizzle", FRAGMENT, " ^ swizzle;", ";"),
    # Ping-pong, and the way of out to memory
    Fault(
        "no consumer may issue first",
        CONSUMER,
        "if (C::PINGPONG && consumer == 0) named_arrive",
        "if (false) named_arrive",
    ),
    Fault("a consumer hands ping-pong to itself", CONSUMER, "(consumer + 1) % C::CONSUMERS", "consumer"),
    Fault(
        "out is staged while other warps read Q", CONSUMER, OWN_BARRIER + "  // all four warps have read their Q", ""
    ),
    Fault(
        "out is stored before all warps have staged it",
        CONSUMER,
        "fence_proxy_async();\n    " + OWN_BARRIER,
        "fence_proxy_async();",
    ),
    Fault(
        "no proxy fence before the store of out",
        CONSUMER,
        "kRowBytes, packed);\n    fence_proxy_async();",
        "kRowBytes, packed);",
    ),
    Fault(
        "the block ends before out has arrived",
        CONSUMER,
        "if (warp_uniform(this_place().warp()) == 0 && elect_one()) tma_store_wait();",
        "",
    ),
    Fault("the last rows of a sequence overwrite the next", CONSUMER, "|| first + 64 <= tile.s_q", "|| true"),
    # Values that a packed sequence does not keep
    Fault("unkept values are not cleared", CONSUMER, "if (!args.p.cu_seqlens_q) return;", "return;"),
    Fault(
        "unkept values of the first block are not cleared",
        CONSUMER,
        "if (blocks.all.end - blocks.all.begin > 1)",
        "if (false)",
    ),
    Fault(
        "cleared values are not fenced",
        CONSUMER,
        "fence_proxy_async();\n  named_sync(kConsumersBarrier",
        "named_sync(kConsumersBarrier",
    ),
    Fault(
        "values are cleared before they arrive",
        CONSUMER,
        "mbarrier_wait(v.full(), v.parity);\n  clear_rows",
        "clear_rows",
    ),
    Fault("values that are kept are cleared", FRAGMENT, "if (contains(kept, row)) continue;", ""),
    # Softmax
    Fault(
        "no guard for rows that keep nothing yet",
        SOFTMAX,
        "largest[r] == negative_infinity() ? 0.f : largest[r]",
        "largest[r]",
    ),
    Fault(
        "the maximum is not shared by a row's threads",
        SOFTMAX,
        "largest[r] = maximum(largest[r], shuffle_xor(largest[r], 2));",
        "",
    ),
    Fault("the sum is not rescaled", SOFTMAX, "state.sum[r] * rescale[r]", "state.sum[r]"),
    Fault("rescale takes the wrong row", CONSUMER, "rescale[i / 2 % 2]", "rescale[i % 2]"),
    Fault("the sum is not shared by a row's threads", CONSUMER, "state.sum[r] += shuffle_xor(state.sum[r], 1);", ""),
    Fault(
        "the mask takes one row for both",
        SOFTMAX,
        "tile_range(band, row + 8, row + 9)",
        "tile_range(band, row, row + 1)",
    ),
    Fault(
        "the sink is left out of the sum",
        SOFTMAX,
        "multiply_add(sum, shrink, is_sink ? 1.f : exp2_approx((sink - of_keys - rest) * kLog2E))",
        "sum * shrink",
    ),
    Fault(
        "an empty row forgets its sink",
        SOFTMAX,
        "in_parts(is_sink ? sink : of_keys, small)",
        "in_parts(of_keys, small)",
    ),
    # Scores of any size
    Fault(
        "scores are scaled before their maximum is subtracted",
        SOFTMAX,
        "(scores[i] - shift[i / 2 % 2]) * scale_log2",
        "multiply_add(scores[i], scale_log2, -(shift[i / 2 % 2] * scale_log2))",
    ),
    Fault("the low part of lse is lost", SOFTMAX, "return {high, (large - high) + small};", "return {high, 0.f};"),
    Fault(
        "the largest score is rounded in lse",
        SOFTMAX,
        "multiply_add(log2_approx(total), kLn2, is_sink ? 0.f : rest)",
        "log2_approx(total) * kLn2",
    ),
    Fault("softcap without its scale", SOFTMAX, "(2 * kLog2E * cap_scale)", "(2 * kLog2E)", CAPPED_64),
    # Positions
    Fault(
        "causal is off by one",
        MASK,
        "smaller(band.s_kv, i1 + band.diagonal",
        "smaller(band.s_kv, i1 + 1 + band.diagonal",
    ),
    Fault(
        "the window is off by one",
        MASK,
        "larger(0, i0 + band.diagonal - band.left)",
        "larger(0, i0 + 1 + band.diagonal - band.left)",
    ),
    Fault("the anchor is always the upper left", MASK, "lower_right ? s_kv - s_q : 0", "0"),
    Fault(
        "a block too many goes without mask",
        SHARED,
        "larger(first_full, full.end / COLUMNS)",
        "larger(first_full, full.end / COLUMNS + 1)",
    ),
    Fault(
        "blocks without mask, backwards",
        SHARED,
        "larger(first_full, full.end / COLUMNS)",
        "full.end / COLUMNS",
        seed=108,
    ),
    Fault("no masks within the loop", CONSUMER, "C::BAND && !contains(blocks.unmasked, block)", "false"),
    # Tiles
    Fault("the last pass is as wide as the others", SCHEDULE, "left < wanted ? left : wanted", "wanted"),
    Fault("a drawn tile is that of another block", SCHEDULE, "block_count() + (p.counter", "(p.counter"),
    Fault("the counter is left where it is", SCHEDULE, "tiles + block_count() - 1", "tiles + block_count()"),
    Fault("sequences before are forgotten", SCHEDULE, "tiles_before += blocks * heads;", ""),
    Fault("lse of the wrong head", CONSUMER, "tile.map_batch * p.heads_q + tile.head)", "tile.map_batch * p.heads_q)"),
    # Set-up
    Fault("a stage counts consumers, not warps", FORWARD, "4 * C::CONSUMERS", "C::CONSUMERS"),
    Fault("the producer keeps too many registers", TRAITS, "CONSUMERS == 2 ? 24 : 32", "CONSUMERS == 2 ? 40 : 32"),
]
