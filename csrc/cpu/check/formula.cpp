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

// The finished score, -inf if the pair is not kept; `slope` is its derivative with respect to scale * q k^T.
double Problem::score(int64 b, int64 h, int64 i, int64 j, double& slope) const {
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
  slope = 1;
  if (!is_kept) return -INFINITY;
  int64 const row = ((first_q(b) + i) * p.heads_q + h) * p.head_dim_qk;
  int64 const key = ((first_kv(b) + j) * p.heads_kv + h / (p.heads_q / p.heads_kv)) * p.head_dim_qk;
  double x = 0;
  for (int64 c = 0; c < p.head_dim_qk; ++c) x += q.get(row + c) * k.get(key + c);
  x *= p.scale;
  if (p.softcap) {
    double const t = std::tanh(x / p.softcap);
    x = p.softcap * t;
    slope = 1 - t * t;
  }
  if (p.bias) x += bias.get(b * p.bias_batch + h * p.bias_head + i * p.bias_row + j * p.bias_key);
  if (p.slopes) x -= slopes.get(h) * std::abs(double(j - i - band.diagonal));
  return x;
}

void Problem::row_by_formula(int64 b, int64 h, int64 i, Results& r) const {
  int64 const keys = s_kv(b), at = lse_at(b, h, i), dim = p.head_dim_v;
  int64 const row = (first_q(b) + i) * p.heads_q + h, kv_head = h / (p.heads_q / p.heads_kv);
  double const sink = p.sinks ? sinks.get(b * p.heads_q + h) : -INFINITY;
  std::vector<double> weights(keys), derivatives(keys), dropped(keys, 1);
  double most = sink, total = 0, delta = 0;
  for (int64 j = 0; j < keys; ++j) most = std::max(most, weights[j] = score(b, h, i, j, derivatives[j]));
  for (int64 j = 0; j < keys; ++j) total += most == -INFINITY ? 0 : std::exp(weights[j] - most);
  if (most > -INFINITY) total += std::exp(sink - most);
  r.lse[at] = total ? most + std::log(total) : -INFINITY;
  for (int64 j = 0; j < keys; ++j) {
    weights[j] = total ? std::exp(weights[j] - most) / total : 0;
    if (p.dropout_threshold) dropped[j] = survives(b * p.heads_q + h, i, j) ? p.dropout_scale : 0;
    int64 const key = ((first_kv(b) + j) * p.heads_kv + kv_head) * dim;
    for (int64 c = 0; c < dim; ++c) {
      r.out[row * dim + c] += weights[j] * dropped[j] * v.get(key + c);
      r.dv[key + c] += weights[j] * dropped[j] * dout.get(row * dim + c);
    }
  }
  for (int64 c = 0; c < dim; ++c) delta += r.out[row * dim + c] * dout.get(row * dim + c);
  delta -= dlse.get(at);
  if (p.sinks && total) r.dsinks[b * p.heads_q + h] -= std::exp(sink - r.lse[at]) * delta;
  for (int64 j = 0; j < keys; ++j) {
    int64 const key = (first_kv(b) + j) * p.heads_kv + kv_head, width = p.head_dim_qk;
    double dp = 0;
    for (int64 c = 0; c < dim; ++c) dp += dout.get(row * dim + c) * v.get(key * dim + c);
    double const dscore = weights[j] ? weights[j] * (dropped[j] * dp - delta) : 0;
    if (p.bias) r.dbias[b * p.bias_batch + h * p.bias_head + i * p.bias_row + j * p.bias_key] += dscore;
    for (int64 c = 0; c < width; ++c) {
      r.dq[row * width + c] += p.scale * derivatives[j] * dscore * k.get(key * width + c);
      r.dk[key * width + c] += p.scale * derivatives[j] * dscore * q.get(row * width + c);
    }
  }
}

Results Problem::by_formula() const {
  Results r;
  for (auto [values, like] : {std::pair{&r.out, &out},
                              {&r.lse, &lse},
                              {&r.dq, &dq},
                              {&r.dk, &dk},
                              {&r.dv, &dv},
                              {&r.dbias, &dbias},
                              {&r.dsinks, &dsinks}})
    values->assign(like->count, 0);
  for (int64 b = 0; b < p.batch; ++b)
    for (int64 h = 0; h < p.heads_q; ++h)
      for (int64 i = 0; i < s_q(b); ++i) row_by_formula(b, h, i, r);
  return r;
}

}  // namespace fa::check
