// One backward problem for the emulator: the runs of all its kernels, and the comparison with the closed form.
#pragma once
#include "../sm90/backward.h"
#include "../sm90/prepare_terms.cuh"
#include "problem.h"

namespace fa::emu {

// A kernel under test, with those that run before and after it. Instances register themselves (backward_instance.cpp).
struct BackwardInstance {
  std::string name;
  Shape shape;
  int threads, row_threads;
  bool of_queries, is_fused;  // computes dq alone; all three. Else dk and dv
  void (*kernel)(sm90::BackwardArgs);
  int64 (*tiles)(BackwardParams const&);
  void (*prepare)(BackwardParams);
  void (*prepare_keys)(BackwardParams);  // with terms
  void (*sinks)(BackwardParams);
  void (*finish)(BackwardParams);  // where it is fused
  void (*sum_heads)(BackwardParams);  // where it owns keys, and every query head has parts

  // The kernels after the large one.
  void run_after(BackwardParams const& p, uint32_t seed, Report& report) const;
};
std::vector<BackwardInstance>& backward_instances();

// Empty if the results are right and the machine reports nothing; else the error.
std::string check_backward(BackwardInstance const& instance, Case const& c, Report& report);

}  // namespace fa::emu
