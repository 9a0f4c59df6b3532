// Runs the CPU kernels on random problems: check CASES SEED [MACHINE]. Exits with 1 if one is wrong.
//
// The program brings its own GOMP_parallel, with threads that a sanitizer knows.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "problem.h"

using namespace fa::check;

extern "C" long long fa_cpu_forward(const char*);
extern "C" long long fa_cpu_backward(const char*);
extern "C" const char* fa_cpu_machine(long long, int*);

extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> running;
  for (unsigned n = 1; n < threads; ++n) running.emplace_back(work, data);
  work(data);
  for (std::thread& thread : running) thread.join();
}

// Roundings of the dtype, and some for the arithmetic. Whether results are as good as they can be is for
// fastattn/testing/tolerance.py; here a wrong index has to show.
static double tolerance(int64 dtype) {
  return dtype == fa::cpu::kFloat64   ? 1e-11
         : dtype == fa::cpu::kFloat32 ? 2e-4
         : dtype == fa::cpu::kFloat16 ? 1e-2
                                      : 4e-2;
}

static bool is_right(char const* name, Tensor const& found, std::vector<double> const& exact, double limit) {
  double largest = 1, error = 0;
  for (double x : exact)
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  for (int64 n = 0; n < found.count; ++n) {
    double const x = found.get(n);
    bool const is_same = x == exact[n];  // infinities
    double const off = is_same ? 0 : std::abs(x - exact[n]);
    if (!(off <= error)) error = off;  // NaN stays
    if (std::isnan(error)) break;
  }
  if (error <= limit * largest) return true;
  std::printf("  %s is off by %g, of %g\n", name, error, largest);
  return false;
}

static bool run(Problem& problem) {
  char packed[sizeof problem.p];
  std::memcpy(packed, &problem.p, sizeof packed);
  if (fa_cpu_forward(packed) || fa_cpu_backward(packed)) return std::printf("  did not run\n"), false;
  Results const exact = problem.by_formula();
  double const limit = tolerance(problem.p.dtype);
  bool ok = is_right("out", problem.out, exact.out, limit);
  ok &= is_right("lse", problem.lse, exact.lse, limit);
  ok &= is_right("dq", problem.dq, exact.dq, limit);
  ok &= is_right("dk", problem.dk, exact.dk, limit);
  ok &= is_right("dv", problem.dv, exact.dv, limit);
  ok &= is_right("dbias", problem.dbias, exact.dbias, limit);
  return ok & is_right("dsinks", problem.dsinks, exact.dsinks, limit);
}

int main(int count, char** words) {
  int const cases = count > 1 ? std::atoi(words[1]) : 50;
  std::uint64_t const seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 0;
  int wrong = 0, runs = 0;
  for (int machine = 0; char const* name = fa_cpu_machine(machine, &runs); ++machine) {
    if (!runs) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    for (int n = 0; n < cases; ++n) {
      Problem problem(seed + n, machine, 1 + n % 3);
      if (run(problem)) continue;
      std::printf("%s, seed %llu: %s\n", name, static_cast<unsigned long long>(seed + n), problem.describe().c_str());
      ++wrong;
    }
    std::printf("%s: %d problems\n", name, cases);
  }
  std::printf("%d wrong\n", wrong);
  return wrong > 0;
}
