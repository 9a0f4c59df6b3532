"""Faults in terms that are looked up pair by pair: bias, ALiBi, masks, segments, dropout."""

from __future__ import annotations

from fault import Fault

FORWARD = ("FORWARD", 64, 64, 1, 1, 128, 128, 2, 1, 1)
KEYS, QUERIES = ("BACKWARD_DKDV", 64, 64, 1, 64, 128, 2, 0, 1), ("BACKWARD_DQ", 64, 64, 1, 64, 2, 2, 1)
TERMS, PREPARE, DQ = "sm90/terms.cuh", "sm90/prepare_terms.cuh", "sm90/backward_dq.cuh"
DKDV = "sm90/backward_dkdv.cuh"

TERM_FAULTS = [
    Fault("terms: ALiBi goes on after the diagonal", TERMS, "larger(distance, -distance)", "distance", FORWARD),
    Fault("terms: ALiBi forgets the diagonal", TERMS, "at.query(e) - diagonal", "at.query(e)", FORWARD),
    Fault("terms: ids of 32 bits", TERMS, "if (a != b)", "if (static_cast<int>(a) != static_cast<int>(b))", FORWARD),
    Fault("terms: ids past the end are read", TERMS, "of_q + smaller(at.query(e), tile.s_q - 1)",
          "of_q + at.query(e)", FORWARD),
    Fault("terms: blocks begin at the last rows' segment", TERMS, "smaller(some.begin, found.x)", "found.x", FORWARD),
    Fault("terms: the band is forgotten where segments are full", TERMS, "larger(full.begin, found.y)", "found.y",
          FORWARD, seed=103),
    Fault("terms: nothing is masked where there are segments", TERMS, "if (is_full) return;",
          "if (is_full || p.terms.segment_ids_q) return;", FORWARD),
    Fault("terms: mask and bias of another head", TERMS, "return tile.batch * s.batch + head * s.head;",
          "return tile.batch * s.batch;", FORWARD),
    Fault("terms: a transposed mask", TERMS, "int const row_stride = static_cast<int>(TRANSPOSED ? s.key : s.query);",
          "int const row_stride = static_cast<int>(s.query);", KEYS),
    Fault("terms: weights are not scaled after dropout", "sm90/consumer.cuh",
          "row.factor *= static_cast<float>(p.numbers.dropout_scale)", "row.factor *= 1.f", FORWARD),
    Fault("terms: six rounds of Philox", "common/philox.h", "round < 7", "round < 6", FORWARD),
    Fault("terms: dropout of another head", TERMS, "tile.batch * static_cast<int>(p.heads_q) + head)", "head)",
          FORWARD),
    Fault("terms: two keys share random bits", TERMS, "(words.word[i / 2] >> (i % 2 * 16) & 0xffff)",
          "(words.word[i / 2] & 0xffff)", FORWARD),
    Fault("terms: random bits of other keys in dk", TERMS, "is_upper ? words.word[2 + r] : words.word[r]",
          "words.word[r]", KEYS),
    Fault("terms: dv is not scaled after dropout", DKDV, "dv[i] *= scale;", "dv[i] *= 1.f;", KEYS),
    Fault("terms: gradients of weights are not scaled", DKDV, "dp[e] * scale : 0.f", "dp[e] : 0.f", KEYS),
    Fault("terms: lse in one float", "sm90/backward_preprocess.cuh", "p.has_softcap && !p.numbers.has_terms",
          "p.has_softcap", KEYS),
    Fault("terms: the slope of softcap is forgotten", DQ, "dp[i] *= i % 2 ? high(T{}, slopes[i / 2])",
          "dp[i] *= i % 2 ? 1.f", QUERIES),
    Fault("terms: the gradient of a bias past the end", DQ, "if (j < tile.s_kv) store_global", "store_global", QUERIES),
    Fault("terms: a fourth of the queries is asked", PREPARE, "part * kSegmentRows + row", "row", FORWARD),
    Fault("terms: the first head decides for its group", PREPARE, "head < (head_kv + 1) * group",
          "head <= head_kv * group", FORWARD),
]  # fmt: skip
