// emulate CASES SEED [SITE | --trace]: runs every linked kernel on CASES random problems, without the call at SITE if one is
// given. Exits with 1 at the first that is wrong. Prints the sites that kernels have come to (machine.h), or what they did.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "backward_case.h"
#include "decode_case.h"
#include "forward_case.h"

// Whether all instances are right.
template <class Instance, class MakeCase, class Check>
static bool run(std::vector<Instance> const& instances, MakeCase make_case, Check check, int cases, uint32_t seed) {
  for (Instance const& instance : instances) {
    auto const start = std::chrono::steady_clock::now();
    fa::emu::Report report;
    for (int i = 0; i < cases; ++i) {
      auto const c = make_case(instance.shape, seed + static_cast<uint32_t>(i));
      std::string const wrong = check(instance, c, report);
      if (wrong.empty()) continue;
      std::printf("FAILED  %s, %s\n%s\n", instance.name.c_str(), fa::emu::describe(c).c_str(), wrong.c_str());
      return false;
    }
    double const seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("ok  %-44s %3d cases, %6llu wgmma, %6llu loads, %5llu TMA stores, %.1f s\n", instance.name.c_str(),
                cases, static_cast<unsigned long long>(report.products),
                static_cast<unsigned long long>(report.loads + report.copies),
                static_cast<unsigned long long>(report.stores), seconds);
    std::fflush(stdout);
  }
  return true;
}

int main(int count, char** arguments) {
  if (count < 3 || count > 4) return std::fprintf(stderr, "usage: emulate CASES SEED [SITE | --trace]\n"), 2;
  int const cases = std::atoi(arguments[1]);
  uint32_t const seed = static_cast<uint32_t>(std::atoi(arguments[2]));
  using namespace fa::emu;
  bool const is_traced = count == 4 && arguments[3] == std::string("--trace");
  if (is_traced) trace_blocks();
  else if (count == 4) leave_out(arguments[3]);
  bool const is_right = run(forward_instances(), random_case, check_forward, cases, seed) &&
                        run(backward_instances(), random_case, check_backward, cases, seed) &&
                        run(decode_instances(), random_decode_case, check_decode, cases, seed);
  if (is_traced) std::printf("%s", take_trace().c_str());
  for (std::string const& site : sites()) std::printf("site %s\n", site.c_str());
  return !is_right;
}
