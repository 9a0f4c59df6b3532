// emulate CASES SEED [SITE | --trace]: runs every linked kernel on CASES random problems, those with the least work first,
// without the call at SITE if one is given. Exits with 1 at the first that is wrong. Prints the sites that kernels have come
// to (machine.h), or what they did.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "backward_case.h"
#include "decode_case.h"
#include "forward_case.h"

// About what a problem takes: pairs of a query and a key, no fewer than a tile has.
static double work(fa::emu::Case const& c) {
  double pairs = 0;
  for (int n = 0; n < c.batch; ++n) pairs += (c.s_q[n] + 64.) * (c.s_kv[n] + 64.);
  return pairs * c.heads_kv * c.group * (c.d_qk + c.d_v);
}

static double work(fa::emu::DecodeCase const& c) {
  double pairs = 0;
  for (int n = 0; n < c.batch; ++n) pairs += (c.s_q[n] * c.group + 64.) * (c.s_kv[n] + 64. * c.splits);
  return pairs * c.heads_kv * (c.d_qk + c.d_v);
}

// The least work first, since small problems show most faults.
template <class MakeCase>
static auto by_work(fa::emu::Shape const& shape, MakeCase make_case, int count, uint32_t seed) {
  std::vector<decltype(make_case(shape, seed))> cases;
  for (int i = 0; i < count; ++i) cases.push_back(make_case(shape, seed + static_cast<uint32_t>(i)));
  std::stable_sort(cases.begin(), cases.end(), [](auto const& x, auto const& y) { return work(x) < work(y); });
  return cases;
}

// Whether all instances are right.
template <class Instance, class MakeCase, class Check>
static bool run(std::vector<Instance> const& instances, MakeCase make_case, Check check, int cases, uint32_t seed) {
  for (Instance const& instance : instances) {
    auto const start = std::chrono::steady_clock::now();
    fa::emu::Report report;
    for (auto const& c : by_work(instance.shape, make_case, cases, seed)) {
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
