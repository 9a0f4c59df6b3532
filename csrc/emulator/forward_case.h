// One forward problem for the emulator: random tensors, the run, and the comparison with plain attention.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "../sm90/shared.h"
#include "machine.h"

namespace fa::emu {

// A kernel under test. Instances register themselves (FA_EMULATED_FORWARD in forward_instance.cpp).
struct ForwardInstance {
  std::string name;
  int d_qk, d_v, block_m, block_n, threads;
  bool is_half, has_band, has_softcap;
  void (*kernel)(sm90::ForwardArgs);
};
std::vector<ForwardInstance>& forward_instances();

struct ForwardCase {
  int batch, heads_kv, group, d_qk, d_v;
  bool is_packed;
  std::vector<int> s_q, s_kv;  // of each sequence; all the same if dense
  int left, right;             // -1: unbounded
  bool lower_right;
  double scale, softcap;       // softcap 0: none
  int sinks;                   // 0 none, 1 shared by the batch, 2 for each sequence
  bool heads_first;            // order of q, k, v in memory, dense only: (B, H, S, D) instead of (B, S, H, D)
  int padding;                 // elements between rows, times 8
  int blocks, heads_per_pass;
  uint32_t seed;
};

ForwardCase random_case(ForwardInstance const& instance, uint32_t seed);
std::string describe(ForwardCase const& c);

// Empty if the kernel computes the case rightly and the machine has nothing to report; else what is wrong.
std::string check_forward(ForwardInstance const& instance, ForwardCase const& c, Report& report);

}  // namespace fa::emu
