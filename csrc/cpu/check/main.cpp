// Runs the CPU kernels on random problems: check CASES SEED [MACHINE]. Exits with 1 if one is wrong.
//
// The program brings its own GOMP_parallel, with threads that a sanitizer knows.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <tuple>

#include "problem.h"

using namespace fa::check;

extern "C" long long fa_cpu_forward(const char*);
extern "C" long long fa_cpu_backward(const char*);
extern "C" long long fa_cpu_jvp(const char*, const char*);
extern "C" long long fa_cpu_backward_jvp(const char*, const char*);
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

bool fa::check::is_right(char const* name, Tensor const& found, std::vector<Dual> const& exact, double Dual::* part,
                         double limit) {
  double largest = 1, error = 0;
  for (Dual const& x : exact)
    if (std::isfinite(x.*part)) largest = std::max(largest, std::abs(x.*part));
  for (int64 n = 0; n < found.count; ++n) {
    double const x = found.get(n);
    bool const is_same = x == exact[n].*part;  // infinities
    double const off = is_same ? 0 : std::abs(x - exact[n].*part);
    if (!(off <= error)) error = off;  // NaN stays
    if (std::isnan(error)) break;
  }
  if (error <= limit * largest) return true;
  std::printf("  %s is off by %g, of %g\n", name, error, largest);
  return false;
}

static bool run(Problem& problem) {
  char p[sizeof problem.p], moved[sizeof p], products[sizeof p];
  std::memcpy(p, &problem.p, sizeof p);
  std::memcpy(moved, &problem.moved, sizeof p);
  std::memcpy(products, &problem.products, sizeof p);
  if (fa_cpu_forward(p) || fa_cpu_backward(p) || fa_cpu_jvp(p, moved) || fa_cpu_backward_jvp(products, moved))
    return std::printf("  did not run\n"), false;
  Results const exact = problem.by_formula();
  double const limit = tolerance(problem.p.dtype);
  bool ok = true;
  for (auto const& [name, x, values] : {std::tuple{"out", &Tensors::out, &exact.out},
                                        {"lse", &Tensors::lse, &exact.lse},
                                        {"dq", &Tensors::dq, &exact.dq},
                                        {"dk", &Tensors::dk, &exact.dk},
                                        {"dv", &Tensors::dv, &exact.dv},
                                        {"dbias", &Tensors::dbias, &exact.dbias},
                                        {"dsinks", &Tensors::dsinks, &exact.dsinks}}) {
    ok &= is_right(name, problem.at.*x, *values, &Dual::value, limit);
    ok &= is_right((std::string(name) + "'").c_str(), problem.tangent.*x, *values, &Dual::moved,
                   4 * limit);  // out' was rounded, too
  }
  return check_statistics(problem, exact, limit) && ok;
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
