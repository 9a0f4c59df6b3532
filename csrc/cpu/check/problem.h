// A random problem for the CPU kernels, in memory that ends where its tensors do, and what it comes to by the formula.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../params.h"
#include "../../common/mask.h"

namespace fa::check {

using cpu::AttentionParams;
using cpu::int32;
using cpu::int64;

// Numbers as a dtype stores them, each tensor a block of its own: a sanitizer sees what is read beyond its end.
struct Tensor {
  int64 dtype = 0, count = 0;
  std::unique_ptr<unsigned char[]> bytes;

  Tensor() = default;
  Tensor(int64 dtype, int64 count);
  double get(int64 n) const;
  void set(int64 n, double x);
  void* data() const { return bytes.get(); }
};

// A number, and how it moves when the inputs move along their tangents.
struct Dual {
  double value = 0, moved = 0;
};

struct Results {
  std::vector<Dual> out, lse, dq, dk, dv, dbias, dsinks, entropy, largest_logit, key_sum;
};

// Differentiable inputs of the passes, and results.
struct Tensors {
  Tensor q, k, v, bias, sinks, dout, dlse, out, lse, dq, dk, dv, dbias, dsinks;
};

struct Problem {
  AttentionParams p{}, moved{}, products{};  // of the passes; tangents; of their Jacobian-vector products
  Tensors at, tangent;
  Tensor slopes, low;
  std::unique_ptr<unsigned char[]> mask;
  std::vector<int32> segments_q, segments_kv, intervals, cu_q, cu_kv;
  std::vector<int64> rng_state;

  Problem(std::uint64_t seed, int64 machine, int64 threads);
  Tensor normal(int64 dtype, int64 count);
  std::string describe() const;
  Results by_formula() const;

  int64 s_q(int64 b) const { return p.cu_seqlens_q ? cu_q[b + 1] - cu_q[b] : p.rows_q; }
  int64 s_kv(int64 b) const { return p.cu_seqlens_kv ? cu_kv[b + 1] - cu_kv[b] : p.rows_kv; }
  int64 first_q(int64 b) const { return p.cu_seqlens_q ? cu_q[b] : b * p.rows_q; }
  int64 first_kv(int64 b) const { return p.cu_seqlens_kv ? cu_kv[b] : b * p.rows_kv; }
  int64 lse_at(int64 b, int64 h, int64 i) const {
    return p.cu_seqlens_q ? h * p.rows_q + first_q(b) + i : (b * p.heads_q + h) * p.rows_q + i;
  }
  int64 key_at(int64 b, int64 h, int64 j) const {
    return p.cu_seqlens_kv ? h * p.rows_kv + first_kv(b) + j : (b * p.heads_q + h) * p.rows_kv + j;
  }
  int64 keys() const { return (p.cu_seqlens_kv ? 1 : p.batch) * p.heads_q * p.rows_kv; }

 private:
  std::mt19937_64 random_;
  int64 below(int64 n) { return int64(random_() % std::uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
  void draw_sizes();
  void draw_terms();
  void draw_intervals();
  void draw_tangents();
  void make_results();
  Dual number(Tensor Tensors::* x, int64 n) const;
  bool survives(int64 head, int64 i, int64 j) const;
  Dual score(int64 b, int64 h, int64 i, int64 j, Dual& slope) const;
  void row_by_formula(int64 b, int64 h, int64 i, Results& r) const;
};

// Whether results are near those of the formula; says so where they are not.
bool is_right(char const* name, Tensor const& found, std::vector<Dual> const& exact, double Dual::* part, double limit);

// Statistics of the weights, the weights, and the gradients of both along the tangents.
bool check_statistics(Problem& problem, Results const& exact, double limit);

}  // namespace fa::check
