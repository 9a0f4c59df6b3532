// One forward problem for the emulator: the run, and the comparison with plain attention.
#pragma once
#include "../sm90/prepare_terms.cuh"
#include "problem.h"

namespace fa::emu {

// A kernel under test. Instances register themselves (forward_instance.cpp).
struct ForwardInstance {
  std::string name;
  Shape shape;
  int threads;
  void (*kernel)(sm90::ForwardArgs);
  void (*prepare)(ForwardParams);  // before it, with terms
};
std::vector<ForwardInstance>& forward_instances();

// Empty if the results are right and the machine reports nothing; else the error.
std::string check_forward(ForwardInstance const& instance, Case const& c, Report& report);

}  // namespace fa::emu
