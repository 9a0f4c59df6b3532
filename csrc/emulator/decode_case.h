// One decoding problem for the emulator: random tensors, the run, and the comparison with plain attention.
#pragma once
#include <string>
#include <vector>

#include "../sm90/decode.h"
#include "problem.h"

namespace fa::emu {

// Kernels under test. Instances register themselves (decode_instance.cpp).
struct DecodeInstance {
  std::string name;
  Shape shape;
  int threads, append_threads, combine_threads;
  void (*append)(DecodeParams);
  void (*kernel)(sm90::DecodeArgs);
  void (*combine)(DecodeParams);
  void (*gathered)(DecodeParams) = nullptr;  // in place of `kernel`
};
std::vector<DecodeInstance>& decode_instances();

struct DecodeCase {
  int batch, heads_kv, group, d_qk, d_v;
  bool is_packed;
  std::vector<int> s_q, s_kv;       // of each sequence, with new keys; s_q all the same if dense
  int new_keys;                     // as in DecodeParams
  bool stores;                      // the new keys and values are not in the caches yet
  bool has_table;                   // else contiguous
  int page_size, max_pages, spare;  // spare pages belong to nobody
  bool heads_first;  // order of the caches in memory: (P, H, page_size, D) instead of (P, page_size, H, D)
  int padding;  // elements between rows, times 8
  int left, right;  // -1: unbounded
  double scale, softcap;  // softcap 0: none
  int sinks;  // 0 none, 1 shared by the batch, 2 for each sequence
  int splits;
  bool has_equal_keys;  // as in Case
  std::vector<std::vector<int>> parents;  // of the new keys of each sequence in its tree, -1: none; empty: no tree
  bool shares_tree;
  int slopes;  // of ALiBi: as sinks
  int bias;  // 0 none; for each sequence, head and query 1 in fp32, 2 in the dtype of q; 3 shared by all of them
  int scales;  // of e4m3: 0 none, 1 shared by the pages, 2 for each page
  uint32_t seed;
};

DecodeCase random_decode_case(Shape const& shape, uint32_t seed);
std::string describe(DecodeCase const& c);

// Empty if the results are right and the machine reports nothing; else the error.
std::string check_decode(DecodeInstance const& instance, DecodeCase const& c, Report& report);

// All kernels, as the host code launches them. What they may touch besides the caches has been allowed before. Empty,
// or what the machine reports.
std::string run_decode(DecodeInstance const& instance, DecodeParams const& p, uint32_t seed, Report& report);

}  // namespace fa::emu
