// The check of a backward problem. The reference is the closed form that fastattn/reference.py states, in double
// precision, pair by pair, from the same out and lse that the kernels are given.
#include "backward_case.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace fa::emu {

std::vector<BackwardInstance>& backward_instances() {
  static std::vector<BackwardInstance> all;
  return all;
}

struct BackwardProblem : Problem {
  Tensor out, dout, dq, dk, dv;
  std::vector<float> lse, lse_low, dlse, dsinks, dbias, lse_parts, delta, dq_sums, dk_parts, dv_parts;
  double whole_lse(int n, int h, int i) const { return double{lse[row(n, h, i)]} + lse_low[row(n, h, i)]; }
  int64 padded_q, padded_kv;
  size_t row(int n, int h, int i) const { return static_cast<size_t>((of(n) * q.heads + h) * q.rows + first_q(n) + i); }
};

// ---- the reference ---------------------------------------------------------------------------------------------------
struct Sums {  // an exact result and how far a kernel may be from it, element by element of a tensor
  std::vector<double> exact, tolerance;
  explicit Sums(size_t size) : exact(size), tolerance(size) {}
};

struct Reference {
  Sums dq, dk, dv, dsinks, dbias;
};

static size_t place(Tensor const& t, int b, int row, int head) {
  return static_cast<size_t>(((b * t.rows + row) * t.heads + head) * t.columns);
}

static double raw_score(BackwardProblem& p, int n, int h, int i, int j) {
  uint16_t const* q = &p.q.at(p.of(n), p.first_q(n) + i, h, 0);
  uint16_t const* k = &p.k.at(p.of(n), p.first_kv(n) + j, h / p.c.group, 0);
  double s = 0;
  for (int d = 0; d < p.c.d_qk; ++d) s += double{p.value[q[d]]} * p.value[k[d]];
  return s;
}

static double capped_score(Case const& c, double raw) {
  return c.softcap > 0 ? c.softcap * std::tanh(c.scale * raw / c.softcap) : c.scale * raw;
}

// out and lse of a row, rounded as a forward pass stores them.
static void attend(BackwardProblem& p, int n, int h, int i) {
  Case const& c = p.c;
  std::vector<double> weights(c.s_kv[n], -INFINITY), out(c.d_v);
  double top = c.sinks ? p.sink(n, h) : -INFINITY, sum = 0;
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!p.keeps(n, h, i, j)) continue;
    weights[j] = capped_score(c, raw_score(p, n, h, i, j)) + p.added(n, h, i, j);
    top = std::max(top, weights[j]);
  }
  if (c.sinks) sum = std::exp(p.sink(n, h) - top);
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (weights[j] == -INFINITY) continue;
    double const weight = std::exp(weights[j] - top);
    sum += weight;
    uint16_t const* v = &p.v.at(p.of(n), p.first_kv(n) + j, h / c.group, 0);
    for (int d = 0; d < c.d_v; ++d) out[d] += weight * p.factor(n, h, i, j) * p.value[v[d]];
  }
  float const lse = sum > 0 ? float(top + std::log(sum)) : -INFINITY;
  p.lse[p.row(n, h, i)] = lse;
  p.lse_low[p.row(n, h, i)] = sum > 0 ? float((top - lse) + std::log(sum)) : 0;
  for (int d = 0; d < c.d_v; ++d) p.out.at(p.of(n), p.first_q(n) + i, h, d) = p.encode(sum > 0 ? out[d] / sum : 0);
}

// The contribution of row i to every gradient. Roundings to 16 bits: of P for dv, of dS (and of P within it) for dq and
// dk.
static void differentiate(BackwardProblem& p, int n, int h, int i, Reference& to) {
  Case const& c = p.c;
  int const b = p.of(n), head_kv = h / c.group;
  double const half_ulp = p.shape.is_half ? 0x1p-11 : 0x1p-8, smallest = p.shape.is_half ? 0x1p-25 : 0;
  uint16_t const *q = &p.q.at(b, p.first_q(n) + i, h, 0), *dout = &p.dout.at(b, p.first_q(n) + i, h, 0);
  uint16_t const* out = &p.out.at(b, p.first_q(n) + i, h, 0);
  double const lse = p.whole_lse(n, h, i), dlse = p.dlse.empty() ? 0 : p.dlse[p.row(n, h, i)];
  double delta = -dlse, size = std::fabs(dlse);  // sums of terms, and of their sizes
  for (int d = 0; d < c.d_v; ++d) {
    double const term = double{p.value[dout[d]]} * p.value[out[d]];
    delta += term, size += std::fabs(term);
  }
  if (c.sinks) {
    double const weight = lse == -INFINITY ? 0 : std::exp(p.sink(n, h) - lse);
    size_t const at = static_cast<size_t>(n * p.q.heads + h);
    to.dsinks.exact[at] -= weight * delta;
    to.dsinks.tolerance[at] += 2e-5 * weight * size;
  }
  size_t const at_q = place(p.dq, b, p.first_q(n) + i, h);
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!p.keeps(n, h, i, j)) continue;
    double const score = capped_score(c, raw_score(p, n, h, i, j)), factor = p.factor(n, h, i, j);
    double const weight = std::exp(score + p.added(n, h, i, j) - lse);
    double const slope = c.softcap > 0 ? 1 - (score / c.softcap) * (score / c.softcap) : 1;
    uint16_t const* v = &p.v.at(b, p.first_kv(n) + j, head_kv, 0);
    uint16_t const* k = &p.k.at(b, p.first_kv(n) + j, head_kv, 0);
    double dp = 0, size_dp = size;
    for (int d = 0; d < c.d_v; ++d) {
      double const term = factor * p.value[dout[d]] * p.value[v[d]];
      dp += term, size_dp += std::fabs(term);
    }
    double const ds = weight * slope * (dp - delta);
    double const ds_error = 2 * half_ulp * std::fabs(ds) + 2e-5 * weight * size_dp + smallest * (1 + size_dp);
    double const p_error = factor * ((half_ulp + 2e-5) * weight + smallest);
    if (!p.dbias.empty()) {
      size_t const at = static_cast<size_t>(((int64{n} * p.q.heads + h) * c.s_q[n] + i) * c.s_kv[n] + j);
      to.dbias.exact[at] = weight * (dp - delta);
      to.dbias.tolerance[at] = 2e-5 * weight * size_dp;
    }
    size_t const at_v = place(p.dv, b, p.first_kv(n) + j, head_kv), at_k = place(p.dk, b, p.first_kv(n) + j, head_kv);
    for (int d = 0; d < c.d_v; ++d) {
      to.dv.exact[at_v + d] += weight * factor * p.value[dout[d]];
      to.dv.tolerance[at_v + d] += p_error * std::fabs(p.value[dout[d]]);
    }
    for (int d = 0; d < c.d_qk; ++d) {
      to.dk.exact[at_k + d] += c.scale * ds * p.value[q[d]];
      to.dk.tolerance[at_k + d] += c.scale * ds_error * std::fabs(p.value[q[d]]);
      to.dq.exact[at_q + d] += c.scale * ds * p.value[k[d]];
      to.dq.tolerance[at_q + d] += c.scale * ds_error * std::fabs(p.value[k[d]]);
    }
  }
}

static Reference reference(BackwardProblem& p) {
  auto const size = [](Tensor const& t) { return static_cast<size_t>(t.batch * t.rows * t.heads * t.columns); };
  Reference to{Sums(size(p.dq)), Sums(size(p.dk)), Sums(size(p.dv)), Sums(p.dsinks.size()), Sums(p.dbias.size())};
  for (int n = 0; n < p.c.batch; ++n) {
    for (int h = 0; h < p.q.heads; ++h) {
      for (int i = 0; i < p.c.s_q[n]; ++i) differentiate(p, n, h, i, to);
    }
  }
  return to;
}

// ---- tensors ---------------------------------------------------------------------------------------------------------
static int64 rounded_up(int64 rows) { return (rows + kPaddedRows - 1) / kPaddedRows * kPaddedRows; }

static BackwardProblem make_backward(BackwardInstance const& instance, Case const& c) {
  BackwardProblem p{};
  static_cast<Problem&>(p) = make_problem(instance.shape, c);
  uint16_t const nan = p.encode(NAN);
  int const rows_q = p.q.rows, rows_kv = p.k.rows, heads = p.q.heads;
  p.out = make_tensor(p.batch(), rows_q, heads, c.d_v, false, 0, nan);
  p.dout = make_tensor(p.batch(), rows_q, heads, c.d_v, c.heads_first, (c.padding + 1) % 3, nan);
  p.dq = make_tensor(p.batch(), rows_q, heads, c.d_qk, false, 0, nan);
  p.dk = make_tensor(p.batch(), rows_kv, c.heads_kv, c.d_qk, false, 0, nan);
  p.dv = make_tensor(p.batch(), rows_kv, c.heads_kv, c.d_v, false, 0, nan);
  p.lse.assign(static_cast<size_t>(p.batch() * heads * rows_q), NAN);
  p.lse_low = p.lse;
  p.padded_q = rounded_up(rows_q + (c.is_packed ? c.batch * kPaddedRows : 0));
  p.padded_kv = rounded_up(rows_kv + (c.is_packed ? c.batch * kPaddedRows : 0));
  size_t const padded = static_cast<size_t>(p.batch() * heads * p.padded_q);
  p.lse_parts.assign(2 * padded + 4, NAN), p.delta.assign(padded, NAN);
  if (instance.is_fused) p.dq_sums.assign(padded * instance.shape.d_qk + 4, NAN);
  if (!instance.of_queries && c.group > 1 && c.seed % 2) {
    size_t const padded_keys = static_cast<size_t>(p.batch() * heads * p.padded_kv);
    p.dk_parts.assign(padded_keys * instance.shape.d_qk + 4, NAN);
    p.dv_parts.assign(padded_keys * instance.shape.d_v + 4, NAN);
  }
  if (c.bias && instance.of_queries) p.dbias.assign(static_cast<size_t>(c.batch * heads * rows_q * rows_kv), 0.f);
  if (c.sinks) p.dsinks.assign(static_cast<size_t>(c.batch * heads), NAN);
  std::mt19937 engine(c.seed + 2);
  std::normal_distribution<double> normal;
  if (engine() % 2) p.dlse.resize(p.lse.size());
  for (float& x : p.dlse) x = float(normal(engine));
  for (int n = 0; n < c.batch; ++n) {
    bool const counts = c.s_kv[n] > 0 || c.sinks || !c.is_packed;  // else q and dout count for nothing: NaN
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < c.s_q[n]; ++i) {
        int const row = p.first_q(n) + i;
        for (int d = 0; counts && d < c.d_v; ++d) p.dout.at(p.of(n), row, h, d) = p.encode(normal(engine));
        for (int d = 0; !counts && d < c.d_qk; ++d) p.q.at(p.of(n), row, h, d) = nan;
        attend(p, n, h, i);
      }
    }
  }
  return p;
}

// 16 bytes divide the address of what is read in pieces of 16.
static float* aligned(std::vector<float>& x) {
  return x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / 4;
}

static sm90::BackwardArgs arguments(BackwardInstance const& instance, BackwardProblem& p) {
  BackwardParams f{};
  fill_common(p, f);
  f.version = kBackwardVersion;
  f.out = p.out.data, f.dout = p.dout.data, f.dout_strides = p.dout.strides;
  f.lse = p.lse.data(), f.lse_low = p.lse_low.data(), f.dlse = p.dlse.empty() ? nullptr : p.dlse.data();
  f.dq = p.dq.data, f.dk = p.dk.data, f.dv = p.dv.data, f.dsinks = p.c.sinks ? p.dsinks.data() : nullptr;
  f.lse_parts = aligned(p.lse_parts), f.delta = p.delta.data();
  f.padded_q = p.padded_q, f.padded_kv = p.padded_kv;
  if (instance.is_fused) f.dq_sums = aligned(p.dq_sums), f.sum_columns = instance.shape.d_qk;
  f.dbias = p.dbias.empty() ? nullptr : p.dbias.data();
  if (!p.dk_parts.empty()) f.dk_parts = aligned(p.dk_parts), f.dv_parts = aligned(p.dv_parts);
  f.scale = p.c.scale;
  f.kv_heads_per_pass = p.c.heads_per_pass / p.c.group;
  sm90::BackwardArgs args;
  args.p = f;
  make_backward_maps(f, p.shape.block_m, p.shape.block_n, args);
  return args;
}

static void allow_all(BackwardProblem& p) {
  forget_global();
  for (Tensor* t : {&p.out, &p.dout, &p.dq, &p.dk, &p.dv}) allow_global(t->storage.data(), t->storage.size() * 2);
  for (auto* x : {&p.lse, &p.lse_low, &p.dlse, &p.sinks, &p.dsinks, &p.dbias, &p.lse_parts, &p.delta, &p.dq_sums,
                  &p.dk_parts, &p.dv_parts}) {
    allow_global(x->data(), x->size() * sizeof(float));
  }
  for (auto const* x : {&p.cu_q, &p.cu_kv}) allow_global(x->data(), x->size() * sizeof(int));
  allow_terms(p);
}

// ---- the run ---------------------------------------------------------------------------------------------------------
static std::string compare(char const* name, Tensor& t, Sums const& sums, Problem const& p) {
  double const half_ulp = p.shape.is_half ? 0x1p-11 : 0x1p-8, smallest = p.shape.is_half ? 0x1p-25 : 1e-30;
  for (int b = 0; b < t.batch; ++b) {
    for (int row = 0; row < t.rows; ++row) {
      for (int head = 0; head < t.heads; ++head) {
        for (int d = 0; d < t.columns; ++d) {
          size_t const at = place(t, b, row, head) + d;
          double const got = p.value[t.at(b, row, head, d)], exact = sums.exact[at];
          double const tolerance = sums.tolerance[at] + half_ulp * std::fabs(exact) + smallest;
          if (std::fabs(got - exact) <= tolerance) continue;
          return std::string(name) + " of b " + std::to_string(b) + " row " + std::to_string(row) + " head " +
                 std::to_string(head) + " d " + std::to_string(d) + ": " + std::to_string(got) + ", should be " +
                 std::to_string(exact) + " to within " + std::to_string(tolerance);
        }
      }
    }
  }
  return "";
}

static std::string compare_floats(char const* name, std::vector<float> const& found, Sums const& sums) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::fabs(found[i] - sums.exact[i]) <= sums.tolerance[i] + 1e-6) continue;
    return std::string(name) + " " + std::to_string(i) + ": " + std::to_string(found[i]) + ", should be " +
           std::to_string(sums.exact[i]);
  }
  return "";
}

void BackwardInstance::run_after(BackwardParams const& p, uint32_t seed, Report& report) const {
  if (report.error.empty() && is_fused) {
    int64 const row_tiles = sm90::tile_count<kPaddedRows, sm90::Of::kQueries>(p);
    run_grid(row_threads, row_tiles, seed, [&] { finish(p); }, report);
  }
  if (report.error.empty() && !of_queries && p.dk_parts) {
    int64 const key_tiles = sm90::tile_count<kPaddedRows, sm90::Of::kSharedKeys>(p);
    run_grid(row_threads, key_tiles, seed + 1, [&] { sum_heads(p); }, report);
  }
}

std::string run_backward(BackwardInstance const& instance, sm90::BackwardArgs const& args, uint32_t seed,
                         Report& report) {
  BackwardParams const& p = args.p;
  int64 const row_tiles = sm90::tile_count<kPaddedRows, sm90::Of::kQueries>(p);
  run_grid(instance.row_threads, row_tiles, seed, [&] { instance.prepare(p); }, report);
  if (report.error.empty() && p.dsinks) {
    run_grid(instance.row_threads, p.batch * p.heads_q, seed + 1, [&] { instance.sinks(p); }, report);
  }
  if (int64 const blocks = instance.shape.has_terms && report.error.empty() ? sm90::prepare_blocks(p) : 0) {
    run_grid(sm90::kPrepareThreads, blocks, seed, [&] { instance.prepare_keys(p); }, report);
  }
  if (report.error.empty()) {
    run_grid(instance.threads, instance.tiles(p), seed + 2, [&] { instance.kernel(args); }, report);
  }
  instance.run_after(p, seed + 3, report);
  return report.error;
}

std::string check_backward(BackwardInstance const& instance, Case const& c, Report& report) {
  BackwardProblem p = make_backward(instance, c);
  if (p.q.rows == 0 || p.k.rows == 0) return "";  // the host code launches nothing
  sm90::BackwardArgs const args = arguments(instance, p);
  allow_all(p);
  std::string const wrong_run = run_backward(instance, args, c.seed, report);
  if (!wrong_run.empty()) return wrong_run;
  Reference const exact = reference(p);
  std::string wrong = compare_floats("dsinks", p.dsinks, exact.dsinks);
  if (wrong.empty()) wrong = compare_floats("dbias", p.dbias, exact.dbias);
  if (wrong.empty() && (instance.of_queries || instance.is_fused)) wrong = compare("dq", p.dq, exact.dq, p);
  if (wrong.empty() && !instance.of_queries) wrong = compare("dk", p.dk, exact.dk, p);
  if (wrong.empty() && !instance.of_queries) wrong = compare("dv", p.dv, exact.dv, p);
  return wrong;
}

}  // namespace fa::emu
