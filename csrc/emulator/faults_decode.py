"""Faults planted in the kernels of decoding, one at a time, as those of faults.py."""

from __future__ import annotations

from fault import Fault

DECODE_128 = ("DECODE", 128, 128, 0)
KERNEL, WORK, COMBINE = "sm90/decode.cuh", "sm90/decode.h", "sm90/combine.cuh"
APPEND = "sm90/append.cuh"

OWN_BARRIER = "named_sync(kOwnBarrier, kWarpgroup);"
QUERIES_STORED = "row % 8 * 16), x);\n  }\n  "
VALUES_CLEARED = "kept.end - keys.begin});\n  "


def fault(what: str, file: str, old: str, new: str, seed: int = 0) -> Fault:
    return Fault(f"decoding: {what}", file, old, new, DECODE_128, seed)


DECODE_FAULTS = [
    # What the producer may do when
    fault("blocks are loaded without waiting for room", KERNEL, "mbarrier_wait(ring.empty(), ring.parity ^ 1);", ""),
    fault(
        "blocks are loaded with the wrong parity", KERNEL, "ring.empty(), ring.parity ^ 1", "ring.empty(), ring.parity"
    ),
    fault("every lane announces the block", KERNEL, "if (lane == 0) mbarrier_expect", "mbarrier_expect"),
    fault(
        "fewer bytes are expected than come", KERNEL, "C::BLOCK_N * CHUNKS * kRowBytes);", "C::BLOCK_N * kRowBytes);"
    ),
    fault(
        "a split without keys loads",
        WORK,
        "larger(first, smaller(first + blocks, end))",
        "smaller(first + blocks, end)",
    ),
    # What it loads, and where
    fault("small boxes past the first 32 are left out", KERNEL, "at += 32 * rows", "at += C::BLOCK_N"),
    fault(
        "pages that nobody keeps are looked up", KERNEL, "if (key < kept.end && key + rows > kept.begin)", "if (true)"
    ),
    fault("a box that begins outside is left out", KERNEL, "key + rows > kept.begin", "key >= kept.begin"),
    fault("every box begins its page", KERNEL, "row = key - entry * page_size;", "row = 0;"),
    fault("every sequence has the first one's table", KERNEL, "work.sequence * p.table_stride + entry", "entry"),
    fault("every sequence has the first one's cache", KERNEL, ": work.sequence;", ": 0;"),
    fault("K and V of the first head", KERNEL, "row, work.head_kv,", "row, 0,"),
    fault("the second chunk brings the first columns", KERNEL, "chunk * kChunkColumns, row", "0, row"),
    fault("chunks lie as close as boxes", KERNEL, "(chunk * C::BLOCK_N + at)", "(chunk * rows + at)"),
    # New keys and values
    fault("new rows are not stored", APPEND, "store_global(stored + piece, load_global(pieces + piece));", ""),
    fault("new rows are stored over the first", APPEND, " + row - first;", ";"),
    fault("new rows go to the pages of the first sequence", APPEND, "sequence * p.table_stride + entry", "entry"),
    fault(
        "new rows of all heads are stored in one",
        APPEND,
        "in_page * cache.row + head * cache.head",
        "in_page * cache.row",
    ),
    fault("new keys are stored as values", APPEND, "copy(p.new_v, ", "copy(p.new_k, "),
    fault("packed new rows go to the sequence before", APPEND, "+ middle) <= row", "+ middle) < row"),
    # Queries
    fault("q is not swizzled", KERNEL, "(piece % 8 * 16 ^ row % 8 * 16)", "piece % 8 * 16"),
    fault("q is not fenced", KERNEL, f"{QUERIES_STORED}fence_proxy_async();", QUERIES_STORED),
    fault(
        "q is used before all of it is there",
        KERNEL,
        f"{QUERIES_STORED}fence_proxy_async();\n  {OWN_BARRIER}",
        f"{QUERIES_STORED}fence_proxy_async();",
    ),
    fault("q ignores where its sequence begins", KERNEL, "? work.first_q * p.q_strides.row :", "? 0 :"),
    fault(
        "heads and positions change places",
        KERNEL,
        "work.first_head + row - position * heads",
        "work.first_head + position",
    ),
    fault("rows past the sequence are written", KERNEL, "query.position < positions_of(p, work).end &&", ""),
    fault("heads past the group are written", KERNEL, "&& query.head < work.end_head", "", 96),
    fault("every part of a group has its first heads", WORK, "* group + part * heads", "* group", 96),
    # Values and scores that the tile does not keep
    fault("unkept values are not cleared", KERNEL, "if (contains(kept, keys)) return;", "return;"),
    fault(
        "values are cleared before they arrive",
        KERNEL,
        "mbarrier_wait(v.full(), v.parity);\n  clear_rows",
        "clear_rows",
    ),
    fault("cleared values are not fenced", KERNEL, f"{VALUES_CLEARED}fence_proxy_async();", VALUES_CLEARED),
    fault(
        "cleared values are used before all are",
        KERNEL,
        f"{VALUES_CLEARED}fence_proxy_async();\n  {OWN_BARRIER}",
        f"{VALUES_CLEARED}fence_proxy_async();",
    ),
    fault("the mask takes one row for both", KERNEL, "at.first_row() + 8).position", "at.first_row()).position"),
    fault(
        "a block too many goes without mask",
        WORK,
        "larger(first_full, full.end / N)",
        "larger(first_full, full.end / N + 1)",
    ),
    # Work
    fault(
        "new keys are not counted",
        WORK,
        "load_global(p.cache_lengths + work.sequence) + new_keys",
        "load_global(p.cache_lengths + work.sequence)",
    ),
    fault("packed sequences share a tile", WORK, "(p.positions_per_tile) + n;", "(p.positions_per_tile);"),
    fault("splits overlap", WORK, "smaller(first + blocks, end)", "end"),
    fault(
        "every split has the first one's place",
        KERNEL,
        "store_global(partial + work.split *",
        "store_global(partial + 0 *",
    ),
    fault("every split counts the sink", KERNEL, "p.sinks && work.split == 0", "p.sinks"),
    fault("lse is laid out as out", WORK, "(sequence * p.heads_q + head) * p.seqlen_q +", "head + p.heads_q *"),
    # Splits together
    fault(
        "low parts of lse are left out",
        COMBINE,
        "(lse[i].high - top.high) + (lse[i].low - top.low)",
        "lse[i].high - top.high",
    ),
    fault(
        "lanes disagree about the largest lse",
        COMBINE,
        "mask > 0; mask /= 2) top.high",
        "mask > 1; mask /= 2) top.high",
    ),
    fault("the total misses lanes", COMBINE, "mask > 0; mask /= 2) total", "mask > 1; mask /= 2) total"),
    fault("out of splits without keys is read", COMBINE, "if (weight == 0.f || !exists)", "if (!exists)"),
    fault("splits past the first 32 are those again", COMBINE, "(32 * i + lane) * outputs", "lane * outputs"),
    fault("columns past the head dim are written", COMBINE, "4 * piece < p.head_dim_v;", "true;"),
    fault(
        "a row without keys divides by 0",
        COMBINE,
        "total > 0.f ? weights.of[i] / total : 0.f",
        "weights.of[i] / total",
        41,
    ),
    # Set-up
    fault("a stage counts one warp", KERNEL, "(C::STAGES + stage), 4)", "(C::STAGES + stage), 1)"),
    fault("the barriers' initialisation is not fenced", KERNEL, "mbarrier_fence_init();", ""),
    fault("roles begin before the barriers are there", KERNEL, "block_sync();", ""),
]
