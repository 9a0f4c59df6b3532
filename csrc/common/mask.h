// The mask: the transcription of keep, tile_range and full_range of fastattn/spec.py.
//
// Nothing else in csrc/ compares positions, but for ranges that are data (cpu/intervals.h); tests/backends/cuda/test_mask.py
// enumerates these functions against the spec. Plain C++: it compiles for the device, for the emulator and as a host
// library.
#pragma once

#ifdef __CUDACC__
#define FA_EVERYWHERE __host__ __device__ __forceinline__
#elif !defined(FA_EVERYWHERE)
#define FA_EVERYWHERE inline
#endif

namespace fa {

struct Range {  // [begin, end)
  int begin, end;
};

struct Band {
  int left, right;  // keys kept before and after the diagonal, kUnbounded where there is no limit
  int diagonal;  // the key on the diagonal of query row 0
  int s_q, s_kv;
};

FA_EVERYWHERE int smaller(int a, int b) { return a < b ? a : b; }
FA_EVERYWHERE int larger(int a, int b) { return a > b ? a : b; }

FA_EVERYWHERE Band make_band(int left, int right, bool lower_right, int s_q, int s_kv) {
  return {left, right, lower_right ? s_kv - s_q : 0, s_q, s_kv};
}

// The transposed band: keep(i, j) of one is keep(j, i) of the other.
FA_EVERYWHERE Band transposed(Band const& band) { return {band.right, band.left, -band.diagonal, band.s_kv, band.s_q}; }

// The smallest range of keys outside which rows i0 .. i1 - 1 keep nothing.
FA_EVERYWHERE Range tile_range(Band const& band, int i0, int i1) {
  Range const keys = {larger(0, i0 + band.diagonal - band.left), smaller(band.s_kv, i1 + band.diagonal + band.right)};
  return keys.begin < keys.end && i0 < i1 ? keys : Range{0, 0};
}

// The keys that every one of the rows i0 .. i1 - 1 keeps: no masking needed there.
FA_EVERYWHERE Range full_range(Band const& band, int i0, int i1) {
  Range const keys = {larger(0, i1 - 1 + band.diagonal - band.left),
                      smaller(band.s_kv, i0 + 1 + band.diagonal + band.right)};
  return keys.begin < keys.end && i0 < i1 ? keys : Range{0, 0};
}

// Whether j is inside the range, in one comparison; the range must not end before it begins.
FA_EVERYWHERE bool contains(Range keys, int j) {
  return static_cast<unsigned>(j - keys.begin) < static_cast<unsigned>(keys.end - keys.begin);
}

FA_EVERYWHERE bool contains(Range outer, Range inner) { return inner.begin >= outer.begin && inner.end <= outer.end; }

// keep, pair by pair, for tests. Kernels compute the range of a row once and compare its keys with that.
FA_EVERYWHERE bool keep(Band const& band, int i, int j) {
  return i >= 0 && i < band.s_q && contains(tile_range(band, i, i + 1), j);
}

}  // namespace fa
