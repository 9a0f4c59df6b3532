// Compile-time constants of the kernels of the backward pass: tile, flags, and the map of shared memory.
#pragma once
#include "traits.h"

#ifndef FA_STAGED
#define FA_STAGED 0  // dq of the fused kernel goes to its sums through shared memory, added by TMA, not from registers
#endif

namespace fa::sm90 {

// dk and dv of BLOCK_N keys; with FUSED also their part of dq. Either two consumers own 64 keys each and both sums, or
// (64 keys, for head dims whose sums do not fit) the first owns dv and the second dk of the same keys.
template <class T, int D_QK_, int D_V_, bool SOFTCAP_, int BLOCK_M_, int BLOCK_N_, int STAGES_, bool FUSED_,
          bool TERMS_ = false>
struct BackwardDkdvTraits {
  using Element = T;
  static constexpr int D_QK = D_QK_, D_V = D_V_, BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr bool SOFTCAP = SOFTCAP_ && !TERMS_, FUSED = FUSED_, TERMS = TERMS_, SPLIT = BLOCK_N == 64;
  // Where dk and dv leave few registers, dp is computed after the weights, not beside the scores. There, and with 128
  // queries, registers do not suffice to hold the weights (times the slope of softcap) in fp32 until dp is done.
  static constexpr bool LATE_DP = (!SPLIT && D_QK + D_V > 256) || (TERMS && D_QK > 192);
  static constexpr bool SLOPED_IN_16_BITS = BLOCK_M == 128 || (LATE_DP && !TERMS);

  static constexpr int CONSUMERS = 2, THREADS = kWarpgroup * (CONSUMERS + 1);
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

  static constexpr int CHUNKS_QK = (D_QK + 63) / 64, CHUNKS_V = (D_V + 63) / 64;  // of 64 columns
  static constexpr int K_BYTES = BLOCK_N * CHUNKS_QK * 128, V_BYTES = BLOCK_N * CHUNKS_V * 128;
  static constexpr int Q_BYTES = BLOCK_M * CHUNKS_QK * 128, DOUT_BYTES = BLOCK_M * CHUNKS_V * 128;
  static constexpr int DS_BYTES = FUSED ? BLOCK_N * BLOCK_M * 2 : 0, LSE_BYTES = BLOCK_M * 8, DELTA_BYTES = BLOCK_M * 4;

  // The sums of a block for dq, [BLOCK_M, D]: each consumer computes 64 rows x 64 columns of them, the second one the
  // lower rows if there are 128, else the right columns. Columns past D_QK are those of zeros. A third chunk of 64
  // columns both compute, each from its own keys.
  static constexpr bool DQ_BY_ROWS = BLOCK_M == 128, HAS_THIRD_CHUNK = FUSED && CHUNKS_QK == 3;
  static constexpr bool STAGED = FUSED && FA_STAGED && !HAS_THIRD_CHUNK;
  static constexpr int PART_BYTES = 64 * 64 * 4, PARTS_BYTES = STAGED ? CONSUMERS * PART_BYTES : 0;

  static constexpr int K = 0, V = K + K_BYTES;  // and dk, dv on their way to memory
  static constexpr int Q = V + V_BYTES, DOUT = Q + STAGES * Q_BYTES;
  static constexpr int DS = DOUT + STAGES * DOUT_BYTES;  // two buffers
  static constexpr int PARTS = DS + 2 * DS_BYTES;  // of dq, if staged
  static constexpr int LSE = PARTS + PARTS_BYTES, DELTA = LSE + STAGES * LSE_BYTES;
  static constexpr int TILE = DELTA + STAGES * DELTA_BYTES;
  static constexpr int BARRIERS = TILE + 48;  // K full, V full; of each stage: Q full, dout full, empty
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 3 * STAGES);

  static_assert(BLOCK_N == 128 || (BLOCK_N == 64 && !FUSED), "each consumer owns 64 keys, or half of the work on 64");
  static_assert(BLOCK_M == 64 || BLOCK_M == 128, "statistics are padded to 128 rows, swizzled chunks have 64 queries");
  static_assert(!FUSED || D_QK <= (DQ_BY_ROWS ? 64 : 192), "the consumers' parts of dq have 64 columns");
  static_assert(!TERMS || (BLOCK_M == 64 && !SLOPED_IN_16_BITS), "dropout keeps a bit for each of 32 scores");
  static_assert(SHARED_BYTES <= kSharedLimit, "more shared memory than a block can have");
};

// dq of 128 query rows, 64 for each consumer.
template <class T, int D_QK_, int D_V_, bool SOFTCAP_, int BLOCK_N_, int K_STAGES_, int V_STAGES_, bool TERMS_ = false>
struct BackwardDqTraits {
  using Element = T;
  static constexpr int D_QK = D_QK_, D_V = D_V_, BLOCK_M = 128, BLOCK_N = BLOCK_N_;
  static constexpr int K_STAGES = K_STAGES_, V_STAGES = V_STAGES_;
  // The overlap barrier needs values that are never negative; times the rounded slope of softcap, 1 - t^2, they may be.
  static constexpr bool SOFTCAP = SOFTCAP_ && !TERMS_, TERMS = TERMS_, EXP_OVERLAP = FA_EXP_OVERLAP && !SOFTCAP_;

  static constexpr int CONSUMERS = 2, THREADS = kWarpgroup * (CONSUMERS + 1);
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

  static constexpr int CHUNKS_QK = (D_QK + 63) / 64, CHUNKS_V = (D_V + 63) / 64;
  static constexpr int Q_BYTES = BLOCK_M * CHUNKS_QK * 128, DOUT_BYTES = BLOCK_M * CHUNKS_V * 128;
  static constexpr int K_BYTES = BLOCK_N * CHUNKS_QK * 128, V_BYTES = BLOCK_N * CHUNKS_V * 128;

  static constexpr int Q = 0, DOUT = Q + Q_BYTES;  // Q's rows also stage dq
  static constexpr int K = DOUT + DOUT_BYTES, V = K + K_STAGES * K_BYTES, TILE = V + V_STAGES * V_BYTES;
  static constexpr int BARRIERS = TILE + 48;  // Q full, dout full; full and empty of K's and of V's stages
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 2 * K_STAGES + 2 * V_STAGES);

  static_assert(!TERMS || BLOCK_N % 32 == 0, "dropout draws the numbers of 32 keys at a time");
  static_assert(SHARED_BYTES <= kSharedLimit, "more shared memory than a block can have");
};

}  // namespace fa::sm90
