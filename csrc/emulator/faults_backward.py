"""Faults planted in the backward kernels, one at a time; as faults.py has those of the forward kernel."""

from __future__ import annotations

from fault import Fault

FUSED_64 = ("BACKWARD_DKDV", 64, 64, 0, 128, 128, 2, 1)
FUSED_96 = ("BACKWARD_DKDV", 96, 96, 0, 64, 128, 2, 1)
FUSED_128 = ("BACKWARD_DKDV", 128, 128, 0, 64, 128, 2, 1)
CAPPED_64 = ("BACKWARD_DKDV", 64, 64, 1, 128, 128, 2, 1)
STAGED = ("-DFA_STAGED=1",)
SPLIT_192 = ("BACKWARD_DKDV", 192, 128, 0)
DQ_128, DQ_256 = ("BACKWARD_DQ", 128, 128, 0), ("BACKWARD_DQ", 256, 256, 0)

DKDV, DQ = "sm90/backward_dkdv.cuh", "sm90/backward_dq.cuh"
PREPROCESS, POSTPROCESS = "sm90/backward_preprocess.cuh", "sm90/backward_postprocess.cuh"
WIDE_192 = ("BACKWARD_DKDV", 192, 128, 0, 64, 128, 2, 1)
SUM_HEADS = "sm90/backward_sum_heads.cuh"
BACKWARD, FRAGMENT, GRADIENT, MASK = "sm90/backward.h", "sm90/fragment.cuh", "common/gradient.h", "common/mask.h"

BACKWARD_FAULTS = [
    # What the producers may do when
    Fault(
        "backward: Q is loaded with the wrong parity", DKDV, "q.empty(), q.parity ^ 1", "q.empty(), q.parity", FUSED_128
    ),
    Fault(
        "backward: bytes of lse come unannounced",
        DKDV,
        "mbarrier_expect(q.full(), C::LSE_BYTES);",
        "mbarrier_arrive(q.full());",
        FUSED_128,
    ),
    Fault(
        "backward: bytes of delta are announced twice",
        DKDV,
        "mbarrier_expect(dout_full, C::DELTA_BYTES);",
        "mbarrier_expect(dout_full, 2 * C::DELTA_BYTES);",
        FUSED_128,
    ),
    Fault("backward: a stage counts consumers, not warps", DKDV, "4 * C::CONSUMERS", "C::CONSUMERS", FUSED_128),
    Fault(
        "backward: V is loaded with the wrong parity",
        DQ,
        "v.empty(), v.parity ^ 1",
        "v.empty(), v.parity",
        DQ_128,
    ),
    # What they load
    Fault(
        "backward: lse of the first rows",
        DKDV,
        "lse_parts + 2 * (statistics + first)",
        "lse_parts + 2 * statistics",
        FUSED_128,
    ),
    Fault("backward: delta of the first rows", DKDV, "delta + statistics + first", "delta + statistics", FUSED_128),
    Fault(
        "backward: statistics of the first head of the group",
        DKDV,
        "padded_row(args.p, tile, head);\n    for",
        "padded_row(args.p, tile, heads.first);\n    for",
        FUSED_128,
    ),
    Fault(
        "backward: K and V ignore where their sequence begins",
        DKDV,
        "row = tile.first_kv + tile.row;",
        "row = tile.row;",
        FUSED_128,
    ),
    Fault(
        "backward: dout ignores where its sequence begins",
        DKDV,
        "args.dout, dout_full, tile.first_q + first",
        "args.dout, dout_full, first",
        FUSED_128,
    ),
    Fault(
        "backward: K and V of the query head's number",
        DQ,
        "tile.head / static_cast<int>(args.p.heads_q / args.p.heads_kv)",
        "tile.head",
        DQ_128,
    ),
    Fault(
        "backward: keys that are kept are looked for at row 0",
        BACKWARD,
        "tile.first_kv = -static_cast<int>(p.key_begin);",
        "",
        FUSED_128,
    ),
    # Waits of backward_dkdv
    Fault("backward: no wait for Q", DKDV, "mbarrier_wait(q.full(), q.parity);\n      clear", "clear", FUSED_128),
    Fault(
        "backward: no wait for dout",
        DKDV,
        "mbarrier_wait(shared.dout_full(q.stage), q.parity);\n      if",
        "if",
        FUSED_128,
    ),
    Fault("backward: dP is used before the wait", DKDV, "wgmma_wait<OF_V ? 1 : 0>(dp);", "", FUSED_128),
    Fault(
        "backward: Q is released before its products are done",
        DKDV,
        "wgmma_wait<0>(dk);\n        release(q);",
        "release(q);\n        wgmma_wait<0>(dk);",
        FUSED_128,
    ),
    Fault(
        "backward: a stage is never released",
        DKDV,
        "wgmma_wait<0>(dk);\n        release(q);",
        "wgmma_wait<0>(dk);\n        q.advance();",
        FUSED_128,
    ),
    Fault(
        "backward: dout is released before its product is done, dv apart",
        DKDV,
        "wgmma_wait<0>(dv);\n        release(q);",
        "release(q);\n        wgmma_wait<0>(dv);",
        SPLIT_192,
    ),
    Fault(
        "backward: the consumer of dv never releases",
        DKDV,
        "wgmma_wait<0>(dv);\n        release(q);",
        "wgmma_wait<0>(dv);\n        q.advance();",
        SPLIT_192,
    ),
    Fault(
        "backward: the consumer of dk releases too early",
        DKDV,
        "wgmma_wait<0>(dk);\n        release(q);",
        "release(q);\n        wgmma_wait<0>(dk);",
        SPLIT_192,
    ),
    # The way of dS to dq
    Fault(
        "backward: dS is used before both consumers have staged it",
        DKDV,
        "named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);  // dS^T of both is there",
        "",
        FUSED_128,
    ),
    Fault("backward: no proxy fence after dS", DKDV, "ds);\n          fence_proxy_async();", "ds);", FUSED_128),
    Fault("backward: dS has one buffer", DKDV, "buffer ^= 1;", ";", FUSED_128),
    Fault("backward: dS is staged without swizzle", FRAGMENT, " ^ swizzle;", ";", FUSED_128),
    Fault("backward: dS is read as K-major", DKDV, "wgmma_ss<1, 1>", "wgmma_ss<0, 1>", FUSED_128),
    Fault("backward: K is read as K-major for dq", DKDV, "wgmma_ss<1, 1>", "wgmma_ss<1, 0>", FUSED_128),
    Fault(
        "backward: both consumers compute the left columns of dq",
        DKDV,
        "consumer * C::BLOCK_N * kRowBytes",
        "0",
        FUSED_128,
    ),
    Fault(
        "backward: both consumers compute the upper rows of dq",
        DKDV,
        "C::DQ_BY_ROWS ? consumer * 64 * kRowBytes : 0",
        "0",
        FUSED_64,
    ),
    Fault(
        "backward: dq takes the first consumer's dS for both",
        DKDV,
        "(key / 64 * (C::BLOCK_M / 64)",
        "(0 * (C::BLOCK_M / 64)",
        FUSED_128,
    ),
    Fault(
        "backward: both consumers add to the same sums",
        DKDV,
        "row * C::D_QK + part * 64 * 64;",
        "row * C::D_QK;",
        FUSED_128,
    ),
    Fault(
        "backward: dq of the wrong head's rows",
        DKDV,
        "padded_row(args.p, tile, head) + block",
        "padded_row(args.p, tile, tile.head) + block",
        FUSED_128,
    ),
    Fault(
        "backward: columns that dq does not have are added",
        DKDV,
        "if (C::D_QK % 64 && part * 64 + 8 * j >= C::D_QK) continue;",
        "",
        FUSED_96,
    ),
    Fault("backward: the sums for dq are not cleared", PREPROCESS, "if (!p.dq_sums) return;", "return;", FUSED_128),
    Fault("backward: dq takes one row of its fragment for both", POSTPROCESS, " + row / 8 % 2 * 2;", ";", FUSED_128),
    Fault("backward: dq ignores the part of the second consumer", POSTPROCESS, "part * 64 * 64", "0", FUSED_128),
    Fault("backward: dq is not scaled", POSTPROCESS, "x.x * scale", "x.x", FUSED_128),
    # Weights and gradients of scores
    Fault("backward: the gradient of the scores forgets delta", DKDV, "(dp[i] - delta.x)", "dp[i]", FUSED_128),
    Fault(
        "backward: statistics are those of the first columns",
        DKDV,
        " + this_place().first_column() * bytes",
        "",
        FUSED_128,
    ),
    Fault(
        "backward: delta of the first stage",
        DKDV,
        "of_columns(shared.delta(stage), 4)",
        "of_columns(shared.delta(0), 4)",
        FUSED_128,
    ),
    Fault(
        "backward: dk of the weights",
        DKDV,
        "add_product<T>(dk, ds, n_major(shared.q(q.stage), N));\n          wgmma",
        "add_product<T>(dk, p, n_major(shared.q(q.stage), N));\n          wgmma",
        FUSED_128,
    ),
    Fault(
        "backward: the third chunk from the keys of one consumer",
        DKDV,
        "(2 * C::BLOCK_N + keys)",
        "2 * C::BLOCK_N",
        WIDE_192,
    ),
    Fault("backward: parts of the first head alone", SUM_HEADS, "from += head_step", "++head", FUSED_128, 1),
    Fault(
        "backward: parts of the wrong head",
        BACKWARD,
        "(tile.map_batch * p.heads_q + head_q) * p.padded_kv",
        "0",
        FUSED_128,
        1,
    ),
    Fault("backward: dq is added before its product is done", DKDV, "wgmma_wait<1>(dq);", "", FUSED_128),
    Fault(
        "backward: weights in fp32 are not masked", DKDV, "else mask_weights(scores, band, row, column);", "", FUSED_128
    ),
    Fault("backward: weights in 16 bits are not masked", DKDV, "mask_packed(p, band, row, column);\n", "", FUSED_128),
    Fault(
        "backward: weights that dS takes in 16 bits are not masked",
        DKDV,
        "if (C::SLOPED_IN_16_BITS) mask_packed(sloped, band, row, column);\n  else",
        "if (!C::SLOPED_IN_16_BITS)",
        FUSED_64,
    ),
    Fault("backward: one half of a pair is not masked", GRADIENT, "weights[i] &= 0x0000ffffu;", ";", FUSED_128),
    Fault(
        "backward: the mask takes one row for both",
        GRADIENT,
        "kept_columns(band, row + 8)};\n  FA_UNROLL\n  for (int i = 0; i < N; ++i) {\n    int",
        "kept_columns(band, row)};\n  FA_UNROLL\n  for (int i = 0; i < N; ++i) {\n    int",
        FUSED_128,
    ),
    Fault(
        "backward: the band is not transposed",
        DKDV,
        "Band const band = transposed(band_of(args.p, tile));",
        "Band const band = band_of(args.p, tile);",
        FUSED_128,
    ),
    Fault(
        "backward: the transposed band keeps its sides",
        MASK,
        "{band.right, band.left, -band",
        "{band.left, band.right, -band",
        FUSED_128,
    ),
    Fault("backward: the transposed band keeps its diagonal", MASK, "-band.diagonal", "band.diagonal", FUSED_128),
    Fault("backward: softcap has no slope", GRADIENT, "score = p * multiply_add(-t, t, 1.f);", "score = p;", CAPPED_64),
    Fault(
        "backward: the dq kernel masks nothing",
        DQ,
        "if (contains(read_blocks(shared.tile()).unmasked, block)) return;",
        "return;",
        DQ_128,
    ),
    Fault(
        "backward: lse of one row for both", DQ, "args.p.lse_parts) + row + 8 * r", "args.p.lse_parts) + row", DQ_128
    ),
    # Rows that count for nothing
    Fault(
        "backward: rows past the end of a sequence are not cleared",
        DKDV,
        "if (rows >= C::BLOCK_M) return;",
        "return;",
        FUSED_128,
        seed=278,
    ),
    Fault(
        "backward: rows past the end are cleared without a fence",
        DKDV,
        "{0, rows});\n  fence_proxy_async();",
        "{0, rows});",
        FUSED_128,
    ),
    Fault(
        "backward: unkept rows of K are not cleared",
        DKDV,
        "clear_rows<C::BLOCK_N, C::CHUNKS_QK, C::CONSUMERS>(shared.k(), kept);",
        "",
        FUSED_128,
    ),
    Fault(
        "backward: unkept rows of V are not cleared",
        DKDV,
        "clear_rows<C::BLOCK_N, C::CHUNKS_V, C::CONSUMERS>(shared.v(), kept);",
        "",
        FUSED_128,
    ),
    Fault(
        "backward: the dq kernel clears nothing",
        DQ,
        "if (!args.p.cu_seqlens_q) return;",
        "return;",
        DQ_128,
    ),
    # Products and results
    Fault(
        "backward: V is released before its product is done",
        DQ,
        "wgmma_wait<0>(dp);\n    release(v);",
        "release(v);\n    wgmma_wait<0>(dp);",
        DQ_256,
    ),
    Fault(
        "backward: K is released before its product is done",
        DQ,
        "wgmma_wait<0>(dq);\n    release(k);",
        "release(k);\n    wgmma_wait<0>(dq);",
        DQ_128,
    ),
    Fault(
        "backward: dq is staged while other warps read Q",
        DQ,
        "named_sync(kOwnBarrier + consumer, kWarpgroup);  // all four warps have read their Q",
        "",
        DQ_128,
    ),
    Fault(
        "backward: no proxy fence before the store of dq",
        DQ,
        "packed);\n  fence_proxy_async();",
        "packed);",
        DQ_128,
    ),
    Fault(
        "backward: dk and dv are staged while K and V are read",
        DKDV,
        "named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);  // nobody reads K and V any more",
        "",
        FUSED_128,
    ),
    Fault(
        "backward: the block ends before dk has arrived",
        DKDV,
        "tma_store_commit();\n    tma_store_wait();",
        "tma_store_commit();",
        FUSED_128,
    ),
    Fault(
        "backward: the last rows of dk overwrite the next sequence",
        DKDV,
        "p.cu_seqlens_q && first + 64 > tile.s_kv",
        "false",
        FUSED_128,
    ),
    Fault(
        "backward: the last rows of dq overwrite the next sequence",
        DQ,
        "p.cu_seqlens_q && first + 64 > tile.s_q",
        "false",
        DQ_128,
    ),
    Fault("backward: dk is not scaled", DKDV, "dk[i] *= scale", "dk[i] *= 1", FUSED_128),
    # Before and after
    Fault(
        "backward: delta forgets the gradient of lse",
        PREPROCESS,
        "if (p.dlse) sum -= load_global(p.dlse + of_row);",
        "",
        FUSED_128,
    ),
    Fault(
        "backward: delta of half a row",
        PREPROCESS,
        "for (int mask = 1; mask < 8; mask *= 2)",
        "for (int mask = 1; mask < 4; mask *= 2)",
        FUSED_128,
    ),
    Fault(
        "backward: the product of score and scale is rounded",
        GRADIENT,
        "multiply_add(multiply_add(x, scale, -lse), kLog2E, -low_log2)",
        "multiply_add(multiply_add(x, scale, 0.f) - lse, kLog2E, -low_log2)",
        FUSED_128,
    ),
    Fault("backward: the low part of lse is left out", GRADIENT, "kLog2E, -low_log2)", "kLog2E, 0.f)", FUSED_128),
    Fault("backward: the low part of lse stays natural", PREPROCESS, "of_row) * kLog2E;", "of_row);", FUSED_128),
    Fault(
        "backward: statistics of the next sequence",
        PREPROCESS,
        "bool const exists = i < tile.s_q;",
        "bool const exists = true;",
        FUSED_128,
    ),
    Fault(
        "backward: the gradient of a sink has the wrong sign",
        PREPROCESS,
        "sum -= weight *",
        "sum += weight *",
        FUSED_128,
    ),
    Fault("backward: the gradient of a sink is one warp's", PREPROCESS, "warp < kRowWarps", "warp < 1", FUSED_128),
    Fault(
        "backward: padded sequences overlap",
        BACKWARD,
        "(begin + n * kPaddedRows) / kPaddedRows",
        "begin / kPaddedRows",
        FUSED_128,
    ),
    Fault(
        "backward: keys are looked for among the queries",
        BACKWARD,
        "OF_KEYS ? p.cu_seqlens_kv : p.cu_seqlens_q;",
        "p.cu_seqlens_q;",
        FUSED_128,
    ),
    Fault(
        "backward: a sequence begins one row late", BACKWARD, "middle) <= padded_row", "middle) < padded_row", FUSED_128
    ),
    Fault(
        "backward: the last pass is as wide as the others",
        BACKWARD,
        "smaller(pairs - pass * wanted, wanted)",
        "wanted",
        FUSED_128,
    ),
    # Sums for dq by way of shared memory
    Fault(
        "backward: staged dq is added without a fence",
        DKDV,
        "fence_proxy_async();\n  named_arrive(kPartStagedBarrier",
        "named_arrive(kPartStagedBarrier",
        FUSED_128,
        options=STAGED,
    ),
    Fault(
        "backward: dq is staged before there is room",
        DKDV,
        "if (C::STAGED) named_sync(kPartFreeBarrier + part, kWarpgroup + 32);",
        "if (C::STAGED) named_arrive(kPartFreeBarrier + part, kWarpgroup + 32);",
        FUSED_128,
        options=STAGED,
    ),
    Fault(
        "backward: staged dq is not committed",
        DKDV,
        "columns * 64 * 4);\n        tma_store_commit();",
        "columns * 64 * 4);",
        FUSED_128,
        options=STAGED,
    ),
    Fault(
        "backward: the block ends before staged dq has arrived",
        DKDV,
        "if (elect_one()) tma_store_wait();",
        "",
        FUSED_96,
        options=STAGED,
    ),
]
