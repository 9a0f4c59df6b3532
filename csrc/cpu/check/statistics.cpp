// Statistics of the weights by the kernels against the formula, and their gradients: along the tangents of the inputs they
// give what the formula's statistics move by. The weights themselves, whose sums are known, and their gradients likewise.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "problem.h"

extern "C" long long fa_cpu_statistics(const char*, const char*);
extern "C" long long fa_cpu_statistics_backward(const char*, const char*);
extern "C" long long fa_cpu_weights(const char*, const char*);
extern "C" long long fa_cpu_weights_backward(const char*, const char*);

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

// Gradients of statistics, or of the weights alone: for each key and head that of its sum.
static bool check_gradients(Problem& problem, Results const& exact, int64 parts, bool are_of_weights, double limit) {
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
  StatisticsParams of{};
  of.rows_per_part = kRows, of.parts = parts, of.dlse = dlse.data(), of.dweights = dkey_sum.data();
  of.dweights_batch = p.cu_seqlens_kv ? 0 : p.heads_q * p.rows_kv, of.dweights_head = p.rows_kv;
  if (!are_of_weights) of.largest_key = key.data(), of.dentropy = dentropy.data(), of.dlargest_logit = dlargest.data();
  if (!are_of_weights && !ran(fa_cpu_statistics, p, of)) return false;
  p.dlse = dlse.data();
  if (!ran(are_of_weights ? fa_cpu_weights_backward : fa_cpu_statistics_backward, p, of)) return false;
  Sum found, expected;
  found.add(dq, problem.tangent.q);
  found.add(dk, problem.tangent.k);
  if (p.bias) found.add(dbias, problem.tangent.bias);
  for (int64 n = 0; p.sinks && n < problem.tangent.sinks.count; ++n)
    found.add(dsinks.get(n) * problem.tangent.sinks.get(n));
  if (!are_of_weights) expected.add(dentropy, exact.entropy);
  if (!are_of_weights) expected.add(dlargest, exact.largest_logit);
  expected.add(dkey_sum, exact.key_sum);
  double const off = std::abs(found.value - expected.value), size = 1 + found.magnitude + expected.magnitude;
  if (off <= limit * size) return true;
  std::printf("  gradients of %s are off by %g, of %g\n", are_of_weights ? "weights" : "statistics", off, size);
  return false;
}

// Weights of all heads and their averages, added up over the rows.
static bool check_weights(Problem& problem, Results const& exact, double limit) {
  AttentionParams p = problem.p;
  if (p.cu_seqlens_q) return true;
  p.out = p.lse = p.lse_low = nullptr;
  bool ok = true;
  for (int64 const heads : {p.heads_q, int64(1)}) {
    bool const averages = heads < p.heads_q;
    Tensor weights(problem.at.lse.dtype, p.batch * heads * p.rows_q * p.rows_kv);
    Tensor sums = zeros(weights.dtype, p.batch * heads * p.rows_kv);
    StatisticsParams of{};
    of.weights = weights.data(), of.weights_dtype = weights.dtype, of.averages = averages;
    if (!ran(fa_cpu_weights, p, of)) return false;
    for (int64 n = 0; n < weights.count; ++n) {
      int64 const at = n / (p.rows_q * p.rows_kv) * p.rows_kv + n % p.rows_kv;
      sums.set(at, sums.get(at) + weights.get(n));
    }
    std::vector<Dual> expected(averages ? sums.count : exact.key_sum.size());
    for (std::size_t n = 0; n < exact.key_sum.size(); ++n) {
      int64 const sequence = int64(n) / (p.heads_q * p.rows_kv);
      int64 const at = averages ? sequence * p.rows_kv + int64(n) % p.rows_kv : int64(n);
      expected[at].value += exact.key_sum[n].value / (averages ? double(p.heads_q) : 1);
    }
    ok &= is_right(averages ? "averaged weights" : "weights", sums, expected, &Dual::value, limit);
  }
  return check_gradients(problem, exact, 1, true, limit) && ok;
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
  StatisticsParams of{};
  of.rows_per_part = kRows, of.parts = parts, of.share = keys;
  of.entropy = entropy.data(), of.largest_logit = largest.data(), of.largest_key = key.data();
  of.key_sum = sums.data(), of.key_max = most.data();
  if (!ran(fa_cpu_statistics, p, of)) return false;
  for (int64 n = keys; n < parts * keys; ++n) sums.set(n % keys, sums.get(n % keys) + sums.get(n));
  sums.count = keys;
  bool ok = is_right("entropy", entropy, exact.entropy, &Dual::value, limit);
  ok &= is_right("largest_logit", largest, exact.largest_logit, &Dual::value, limit);
  ok &= is_right("key_sum", sums, exact.key_sum, &Dual::value, limit);
  ok &= check_gradients(problem, exact, parts, false, limit);
  return check_weights(problem, exact, limit) && ok;
}

}  // namespace fa::check
