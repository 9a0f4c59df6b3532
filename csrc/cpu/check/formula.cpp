// Attention and its gradients as fastattn/spec.py and reference.py state them, pair by pair in fp64.
#include <cmath>

#include "problem.h"

namespace fa::check {

bool Problem::survives(int64 head, int64 i, int64 j) const {
  using Word = std::uint32_t;
  Word c[4] = {Word(i), Word(j / 32 * 4 + j % 8 / 2), Word(head), Word(rng_state[1])};
  Word key[2] = {Word(rng_state[0]), Word(std::uint64_t(rng_state[0]) >> 32)};
  for (int round = 0; round < 7; ++round) {
    std::uint64_t const x = std::uint64_t(c[0]) * 0xD2511F53u, y = std::uint64_t(c[2]) * 0xCD9E8D57u;
    Word const next[4] = {Word(y >> 32) ^ c[1] ^ key[0], Word(y), Word(x >> 32) ^ c[3] ^ key[1], Word(x)};
    for (int n = 0; n < 4; ++n) c[n] = next[n];
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return int64(c[j % 32 / 8] >> (16 * (j % 2)) & 0xffff) >= p.dropout_threshold;
}

// Arithmetic that takes tangents along.
static Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.moved + b.moved}; }
static Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.moved - b.moved}; }
static Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.moved * b.value + a.value * b.moved}; }
static Dual operator*(double a, Dual b) { return {a * b.value, a * b.moved}; }
static void operator+=(Dual& a, Dual b) { a = a + b; }
static Dual exponential(Dual x) { return {std::exp(x.value), std::exp(x.value) * x.moved}; }
static Dual logarithm(Dual x) { return {std::log(x.value), x.moved / x.value}; }
static Dual inverse(Dual x) { return {1 / x.value, -x.moved / (x.value * x.value)}; }
static Dual hyperbolic_tangent(Dual x) {
  double const t = std::tanh(x.value);
  return {t, (1 - t * t) * x.moved};
}

Dual Problem::number(Tensor Tensors::* x, int64 n) const {
  return {(at.*x).get(n), (tangent.*x).count ? (tangent.*x).get(n) : 0};
}

// The finished score, -inf if the pair is not kept; `slope` is its derivative with respect to scale * q k^T.
Dual Problem::score(int64 b, int64 h, int64 i, int64 j, Dual& slope) const {
  Band const band = make_band(int(p.left), int(p.right), p.lower_right, int(s_q(b)), int(s_kv(b)));
  auto const is_held = [&] {
    int64 const first = p.cu_seqlens_q ? first_q(b) : 0;
    int32 const* const at = p.intervals + b * p.intervals_batch + h * p.intervals_head + (first + i) * p.intervals_row;
    for (int64 n = 0; n < p.intervals_count; ++n)
      if (at[2 * n] <= j && j < at[2 * n + 1]) return true;
    return false;
  };
  bool const is_kept = keep(band, int(i), int(j)) && (!p.mask || mask[i * p.mask_row + j]) &&
                       (!p.segments_q || segments_q[i] == segments_kv[j]) && (!p.intervals || is_held());
  slope = {1, 0};
  if (!is_kept) return {-INFINITY, 0};
  int64 const row = ((first_q(b) + i) * p.heads_q + h) * p.head_dim_qk;
  int64 const key = ((first_kv(b) + j) * p.heads_kv + h / (p.heads_q / p.heads_kv)) * p.head_dim_qk;
  Dual x;
  for (int64 c = 0; c < p.head_dim_qk; ++c) x += number(&Tensors::q, row + c) * number(&Tensors::k, key + c);
  x = p.scale * x;
  if (p.softcap) {
    Dual const t = hyperbolic_tangent(1 / p.softcap * x);
    x = p.softcap * t;
    slope = Dual{1, 0} - t * t;
  }
  if (p.bias) x += number(&Tensors::bias, b * p.bias_batch + h * p.bias_head + i * p.bias_row + j * p.bias_key);
  if (p.slopes) x.value -= slopes.get(h) * std::abs(double(j - i - band.diagonal));
  return x;
}

void Problem::row_by_formula(int64 b, int64 h, int64 i, Results& r) const {
  int64 const keys = s_kv(b), lse = lse_at(b, h, i), dim = p.head_dim_v;
  int64 const row = (first_q(b) + i) * p.heads_q + h, kv_head = h / (p.heads_q / p.heads_kv);
  Dual const sink = p.sinks ? number(&Tensors::sinks, b * p.heads_q + h) : Dual{-INFINITY, 0};
  std::vector<Dual> weights(keys), slope(keys);
  std::vector<double> dropped(keys, 1);
  double most = sink.value;
  Dual total, delta;
  Dual& largest = r.largest_logit[lse] = {-INFINITY, 0};
  for (int64 j = 0; j < keys; ++j) {
    weights[j] = score(b, h, i, j, slope[j]);
    most = std::max(most, weights[j].value);
    if (weights[j].value > largest.value) largest = weights[j];
  }
  bool const is_empty = most == -INFINITY;
  Dual const base{is_empty ? 0 : most, 0};
  for (int64 j = 0; j < keys; ++j) total += weights[j] = exponential(weights[j] - base);
  total += exponential(sink - base);
  r.lse[lse] = is_empty ? Dual{-INFINITY, 0} : base + logarithm(total);
  for (int64 j = 0; j < keys; ++j) {
    if (!is_empty) weights[j] = weights[j] * inverse(total);
    if (weights[j].value > 0) r.entropy[lse] += -1 * (weights[j] * logarithm(weights[j]));
    r.key_sum[key_at(b, h, j)] += weights[j];
    if (p.dropout_threshold) dropped[j] = survives(b * p.heads_q + h, i, j) ? p.dropout_scale : 0;
    int64 const key = ((first_kv(b) + j) * p.heads_kv + kv_head) * dim;
    for (int64 c = 0; c < dim; ++c) {
      r.out[row * dim + c] += dropped[j] * weights[j] * number(&Tensors::v, key + c);
      r.dv[key + c] += dropped[j] * weights[j] * number(&Tensors::dout, row * dim + c);
    }
  }
  for (int64 c = 0; c < dim; ++c) delta += r.out[row * dim + c] * number(&Tensors::dout, row * dim + c);
  delta = delta - number(&Tensors::dlse, lse);
  if (p.sinks && !is_empty) r.dsinks[b * p.heads_q + h] += -1 * (exponential(sink - r.lse[lse]) * delta);
  for (int64 j = 0; j < keys; ++j) {
    if (!weights[j].value) continue;
    int64 const key = (first_kv(b) + j) * p.heads_kv + kv_head, width = p.head_dim_qk;
    Dual dp;
    for (int64 c = 0; c < dim; ++c) dp += number(&Tensors::dout, row * dim + c) * number(&Tensors::v, key * dim + c);
    Dual const dscore = weights[j] * (dropped[j] * dp - delta), dproduct = p.scale * slope[j] * dscore;
    if (p.bias) r.dbias[b * p.bias_batch + h * p.bias_head + i * p.bias_row + j * p.bias_key] += dscore;
    for (int64 c = 0; c < width; ++c) {
      r.dq[row * width + c] += dproduct * number(&Tensors::k, key * width + c);
      r.dk[key * width + c] += dproduct * number(&Tensors::q, row * width + c);
    }
  }
}

Results Problem::by_formula() const {
  Results r;
  for (auto [values, like] : {std::pair{&r.out, &at.out},
                              {&r.lse, &at.lse},
                              {&r.dq, &at.dq},
                              {&r.dk, &at.dk},
                              {&r.dv, &at.dv},
                              {&r.dbias, &at.dbias},
                              {&r.dsinks, &at.dsinks},
                              {&r.entropy, &at.lse},
                              {&r.largest_logit, &at.lse}})
    values->assign(like->count, {});
  r.key_sum.assign(keys(), {});
  for (int64 b = 0; b < p.batch; ++b)
    for (int64 h = 0; h < p.heads_q; ++h)
      for (int64 i = 0; i < s_q(b); ++i) row_by_formula(b, h, i, r);
  return r;
}

}  // namespace fa::check
