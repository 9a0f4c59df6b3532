// Compile-time constants of the forward kernel: tile, flags, and the map of shared memory that follows from them.
#pragma once
#include "../common/params.h"

// The experiments of docs/measured.md, one macro each; the defaults are those of the shipped kernels.
#ifndef FA_EXP_OVERLAP
#define FA_EXP_OVERLAP \
  1  // exp/PV overlap barrier: keeps the exponentials under the P V product (ptx.cuh, pin_above_wait)
#endif

namespace fa::sm90 {

constexpr int kSharedLimit = 232448;  // bytes of shared memory that a block can have
constexpr int kWarpgroup = 128;       // threads

template <class T, int D_QK_, int D_V_, int BLOCK_M_, int BLOCK_N_, int STAGES_, bool PINGPONG_, bool BAND_,
          bool SOFTCAP_, bool TERMS_ = false>
struct ForwardTraits {
  using Element = T;
  static constexpr int D_QK = D_QK_, D_V = D_V_, BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  // With terms (terms.cuh) the kernel asks at run time whether there is a softcap.
  static constexpr bool PINGPONG = PINGPONG_, BAND = BAND_, SOFTCAP = SOFTCAP_ && !TERMS_, TERMS = TERMS_;
  static constexpr bool EXP_OVERLAP = FA_EXP_OVERLAP;

  // Warpgroup 0 is the producer; the others own 64 query rows each. They share the 65536 registers unevenly.
  static constexpr int CONSUMERS = BLOCK_M / 64, THREADS = kWarpgroup * (CONSUMERS + 1);
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;

  static constexpr int CHUNKS_QK = (D_QK + 63) / 64, CHUNKS_V = (D_V + 63) / 64;  // of 64 columns
  static constexpr int Q_BYTES = BLOCK_M * CHUNKS_QK * 128, OUT_BYTES = BLOCK_M * CHUNKS_V * 128;
  static constexpr int K_BYTES = BLOCK_N * CHUNKS_QK * 128, V_BYTES = BLOCK_N * CHUNKS_V * 128;

  static constexpr int Q = 0;  // and out, on its way to memory
  static constexpr int K = Q_BYTES > OUT_BYTES ? Q_BYTES : OUT_BYTES;
  static constexpr int V = K + STAGES * K_BYTES;
  static constexpr int TILE = V + STAGES * V_BYTES;  // the tile that the producer writes for the consumers (schedule.h)
  static constexpr int BARRIERS = TILE + 48;  // q full, q empty, then full and empty of K's and V's stages
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 4 * STAGES);

  static_assert(CONSUMERS == 2 || CONSUMERS == 3, "registers are shared out for 2 or 3 consumer warpgroups");
  static_assert(BLOCK_N % 16 == 0 && D_QK % 16 == 0 && D_V % 16 == 0, "wgmma works in steps of 16");
  static_assert(!TERMS || (BAND && BLOCK_N % 32 == 0), "dropout draws the numbers of 32 keys at a time");
  static_assert(SHARED_BYTES <= kSharedLimit, "more shared memory than a block can have");
};

}  // namespace fa::sm90
