"""Faults planted in the kernels of decoding, one at a time, as those of faults.py."""

from __future__ import annotations

from fault import Fault

DECODE_128 = ("DECODE", 128, 128, 0)
E4M3_128, ROWS_128 = ("DECODE_GATHERED", 128, 128, 2, 8), ("DECODE_GATHERED", 128, 128, 4, 0)
KERNEL, WORK, COMBINE, GATHERED = "sm90/decode.cuh", "sm90/decode.h", "sm90/combine.cuh", "sm90/decode_gathered.cuh"
APPEND, TERMS = "sm90/append.cuh", "sm90/decode_terms.cuh"

OWN_BARRIER = "named_sync(kOwnBarrier, kWarpgroup);"
QUERIES_STORED = "row % 8 * 16), x);\n  }\n  "
VALUES_CLEARED = "kept.end - keys.begin});\n  "


def fault(what: str, file: str, old: str, new: str, seed: int = 0, kernel: tuple[str | int, ...] = DECODE_128) -> Fault:
    return Fault(f"decoding: {what}", file, old, new, kernel, seed)


def of_rows(what: str, old: str, new: str, kernel: tuple[str | int, ...] = ROWS_128, seed: int = 0) -> Fault:
    return fault(what, GATHERED, old, new, seed, kernel)


def of_terms(what: str, old: str, new: str, seed: int = 0) -> Fault:
    return fault(what, TERMS, old, new, seed, ROWS_128)


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
    fault("new keys are stored as values", APPEND, "copy(p.new_v, ", "copy(p.new_k, ", 6),
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
    fault("the mask takes one row for both", KERNEL, "at.first_row() + 8)};", "at.first_row())};"),
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
    # Trees
    fault("rows of a tree end where their position does", WORK, "p.tree ? Positions{0, work.s_q} :", ""),
    fault("every sequence has the first one's tree", KERNEL, "(p.shares_tree ? 0 : work.first_q)", "0"),
    fault("a shared tree is looked for in each sequence", KERNEL, "(p.shares_tree ? 0 : work.first_q)", "work.first_q"),
    fault("bits of a tree are read from the end", KERNEL, ">> key % 32 & 1", ">> (31 - key % 32) & 1"),
    fault(
        "both rows of a thread have the upper one's bits",
        KERNEL,
        "scores, lower, 1, column",
        "scores, upper, 1, column",
        10,
    ),
    fault("a window begins at the row's position", KERNEL, "+ depth - band.left", "+ position - band.left", 200),
    # ALiBi and bias
    of_terms("finished scores are scaled again", "has_terms(p) ? 1.f : static_cast<float>", "static_cast<float>"),
    of_terms("scores are not scaled before terms", " *= scale;", " *= 1.f;"),
    of_terms("lower rows are scaled as upper ones", "2 * lower + i % 2] *= scale;", "i % 2] *= scale;"),
    of_terms(
        "rows that a bias leaves to nobody are copied", "!= negative_infinity()) return true;", "!= 0) return true;"
    ),
    of_terms("a bias is asked of positions whose band hides the key", "is_kept = p.tree ||", "is_kept = true ||"),
    of_terms("a bias is asked of one position alone", "++position) {", "position = rows.end) {", 8),
    of_terms("every sequence has the first one's bias", "work.sequence * p.bias_strides.batch +", ""),
    of_terms("all heads have the first one's bias", " + head * p.bias_strides.head", ""),
    of_terms("all queries have the first one's bias", " + position * p.bias_strides.query", ""),
    of_terms("a bias is not added", "bias : score + bias", "bias : score"),
    of_terms("a bias in 16 bits is read as one of 32", "if (p.bias_is_float) {", "if (true) {"),
    of_terms("every sequence has the first one's slopes", "work.sequence * p.slopes_batch_stride + head", "head"),
    of_terms("ALiBi grows to the right", "larger(distance, -distance)", "distance"),
    of_terms("ALiBi counts positions in a tree", "(is_in_tree ?", "(false ?"),
    fault("blocks without mask have no terms", WORK, "|| has_terms(p)))", "))", 0, ROWS_128),
    # Rows that threads copy
    of_rows("the last values come in turn", "number == last || (number > 0", "(number > 0"),
    of_rows("rows that the tile does not keep are looked up", "if (!contains(kept, key))", "if (false)"),
    of_rows("every row begins its page", "key - entry * page_size", "0"),
    of_rows("every sequence has the first one's pages", "work.sequence * p.table_stride + entry", "entry"),
    of_rows(
        "K and V have the first head",
        "row, work.head_kv, C::E4M3 ? slot(number) : shared.v",
        "row, 0, C::E4M3 ? slot(number) : shared.v",
    ),
    of_rows("rows are not swizzled", "(piece % 8 * 16 ^ row % 8 * 16)", "piece % 8 * 16"),
    of_rows("columns past the head dim are copied", "at.exists && piece * kColumns < cache.columns", "at.exists"),
    of_rows("copies run ahead of free stages", "mbarrier_wait(ring.empty(), ring.parity ^ 1);", ""),
    of_rows("copies are not fenced", "fence_proxy_async();\n  warp_sync();", "warp_sync();"),
    of_rows("a stage is handed over before all lanes have their copies", "warp_sync();", ""),
    of_rows("one group too few is waited for", "copies_wait<C::AHEAD>()", "copies_wait<C::AHEAD + 1>()"),
    of_rows("a stage counts one arrival", "if (thread_index() % 32 == 0) mbarrier_arrive", "mbarrier_arrive"),
    fault("more copies than stages are begun", WORK, "2 * STAGES_ - 2;", "2 * STAGES_ - 1;", 0, ROWS_128),
    fault("softcap is left out", KERNEL, "if (C::GATHERED && p.has_softcap)", "if (false)", 0, ROWS_128),
    fault(
        "blocks without mask are not capped",
        WORK,
        "if (C::GATHERED && (p.has_softcap || has_terms(p)))",
        "if (false)",
        0,
        ROWS_128,
    ),
    of_rows("scales are left out", "pack(T{}, low(F16{}, halves) * scale,", "pack(T{}, low(F16{}, halves),", E4M3_128),
    of_rows("all pages have the first one's scales", "at.page * cache.scale_stride", "0", E4M3_128, 3),
    of_rows("all heads have the first one's scale", ": 0) + head;", ": 0);", E4M3_128),
    of_rows(
        "slots are used again too early", "number % (C::E4M3 ? C::SLOTS", "number % (C::E4M3 ? C::SLOTS - 1", E4M3_128
    ),
    of_rows("halves of a row change places", "2 * (2 * i + half)", "2 * (2 * i + 1 - half)", E4M3_128),
    of_rows("numbers of a word change places", "word(x.x, 0), word(x.x, 16)", "word(x.x, 16), word(x.x, 0)", E4M3_128),
]
