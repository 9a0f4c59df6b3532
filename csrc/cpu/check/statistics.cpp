// Statistics of the weights by the kernels against the formula, and their gradients: along the tangents of the inputs they
// give what the formula's statistics move by.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "problem.h"

extern "C" long long fa_cpu_statistics(const char*, const char*);
extern "C" long long fa_cpu_statistics_backward(const char*, const char*);

namespace fa::check {

using cpu::StatisticsParams;

static constexpr int64 kRows = 48, kBehind = 64;  // of a part; words behind gradients of key sums

static bool ran(long long (*pass)(const char*, const char*), AttentionParams const& p, StatisticsParams const& of) {
  char packed[sizeof p], more[sizeof of];
  std::memcpy(packed, &p, sizeof p);
  std::memcpy(more, &of, sizeof of);
  if (!pass(packed, more)) return true;
  return std::printf("  statistics did not run\n"), false;
}

static Tensor zeros(int64 dtype, int64 count) {
  Tensor found(dtype, count);
  for (int64 n = 0; n < count; ++n) found.set(n, 0);
  return found;
}

// The sum of products, of as many numbers as `weights` counts; and of their magnitudes.
struct Sum {
  double value = 0, magnitude = 0;

  void add(double x) {
    value += x;
    magnitude += std::abs(x);
  }
  void add(Tensor const& gradient, Tensor const& tangent) {
    for (int64 n = 0; n < tangent.count && n < gradient.count; ++n) add(gradient.get(n) * tangent.get(n));
  }
  void add(Tensor const& gradient, std::vector<Dual> const& moved) {
    for (std::size_t n = 0; n < moved.size(); ++n) add(gradient.get(int64(n)) * moved[n].moved);
  }
};

static bool check_gradients(Problem& problem, Results const& exact, int64 parts, double limit) {
  int64 const words = problem.at.lse.dtype, rows = problem.at.lse.count;
  AttentionParams p = problem.p;
  Tensor lse(words, rows), low(words, rows), dlse(words, rows), dq(p.dtype, problem.at.q.count),
      dk(p.dtype, problem.at.k.count), dbias = zeros(p.dbias_dtype, problem.at.dbias.count),
                                       dsinks(words, problem.at.dsinks.count);
  Tensor const dentropy = problem.normal(words, rows), dlargest = problem.normal(words, rows),
               dkey_sum = problem.normal(words, problem.keys() + kBehind);
  std::vector<int64> key(rows + 1);
  p.lse = lse.data(), p.lse_low = low.data(), p.dq = dq.data(), p.dk = dk.data(), p.dv = nullptr;
  p.dbias = p.bias ? dbias.data() : nullptr, p.dsinks = p.sinks ? dsinks.data() : nullptr;
  p.out = nullptr, p.dout = p.dlse = nullptr;
  StatisticsParams of{kRows,   parts,   0,           nullptr,         nullptr,         key.data(),
                      nullptr, nullptr, dlse.data(), dentropy.data(), dlargest.data(), dkey_sum.data()};
  if (!ran(fa_cpu_statistics, p, of)) return false;
  p.dlse = dlse.data();
  if (!ran(fa_cpu_statistics_backward, p, of)) return false;
  Sum found, expected;
  found.add(dq, problem.tangent.q);
  found.add(dk, problem.tangent.k);
  if (p.bias) found.add(dbias, problem.tangent.bias);
  for (int64 n = 0; p.sinks && n < problem.tangent.sinks.count; ++n)
    found.add(dsinks.get(n) * problem.tangent.sinks.get(n));
  expected.add(dentropy, exact.entropy);
  expected.add(dlargest, exact.largest_logit);
  expected.add(dkey_sum, exact.key_sum);
  double const off = std::abs(found.value - expected.value), size = 1 + found.magnitude + expected.magnitude;
  if (off <= limit * size) return true;
  std::printf("  gradients of statistics are off by %g, of %g\n", off, size);
  return false;
}

bool check_statistics(Problem& problem, Results const& exact, double limit) {
  int64 const words = problem.at.lse.dtype, rows = problem.at.lse.count, keys = problem.keys();
  int64 longest = 0;
  for (int64 b = 0; b < problem.p.batch; ++b) longest = std::max(longest, problem.s_q(b));
  int64 const parts = std::max<int64>(1, (longest + kRows - 1) / kRows);
  Tensor entropy(words, rows), largest(words, rows), sums = zeros(words, parts * keys),
                                                     most = zeros(words, parts * keys);
  std::vector<int64> key(rows + 1);
  AttentionParams p = problem.p;
  p.out = p.lse = p.lse_low = nullptr;
  StatisticsParams const of{kRows,       parts,       keys,    entropy.data(), largest.data(), key.data(),
                            sums.data(), most.data(), nullptr, nullptr,        nullptr,        nullptr};
  if (!ran(fa_cpu_statistics, p, of)) return false;
  for (int64 n = keys; n < parts * keys; ++n) sums.set(n % keys, sums.get(n % keys) + sums.get(n));
  sums.count = keys;
  bool ok = is_right("entropy", entropy, exact.entropy, &Dual::value, limit);
  ok &= is_right("largest_logit", largest, exact.largest_logit, &Dual::value, limit);
  ok &= is_right("key_sum", sums, exact.key_sum, &Dual::value, limit);
  return check_gradients(problem, exact, parts, limit) && ok;
}

}  // namespace fa::check
