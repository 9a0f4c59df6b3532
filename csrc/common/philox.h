// Dropout's random bits: Philox4x32 with 7 rounds, the transcription of fastattn/rng.py for GPU kernels.
#pragma once
#include "../sm90/ptx.cuh"

namespace fa {

struct PhiloxWords {
  uint32 word[4];
};

FA_DEVICE PhiloxWords philox(PhiloxWords c, uint32 key0, uint32 key1) {
  FA_UNROLL
  for (int round = 0; round < 7; ++round) {
    uint64 const first = uint64{c.word[0]} * 0xD2511F53u, second = uint64{c.word[2]} * 0xCD9E8D57u;
    c = {{static_cast<uint32>(second >> 32) ^ c.word[1] ^ key0, static_cast<uint32>(second),
          static_cast<uint32>(first >> 32) ^ c.word[3] ^ key1, static_cast<uint32>(first)}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fa
