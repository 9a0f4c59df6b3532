// The check of a forward problem. The reference is written from the docstring of fastattn/spec.py alone: it
// loops over pairs in double precision and shares no code with the kernel, its masks included.
#include "forward_case.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace fa::emu {

std::vector<ForwardInstance>& forward_instances() {
  static std::vector<ForwardInstance> all;
  return all;
}

struct ForwardProblem : Problem {
  Tensor out;
  std::vector<float> lse, lse_low;
  int32 counter = 0;
};

struct Row {
  std::vector<double> out, tolerance;
  double lse;
};

// One row of the definition, with what rounding P and out to 16 bits may change at most.
static Row reference_row(ForwardProblem& p, int n, int h, int i) {
  Case const& c = p.c;
  int const b = p.of(n), q0 = p.first_q(n), kv0 = p.first_kv(n);
  double const sink = c.sinks ? p.sink(n, h) : -INFINITY;
  std::vector<double> weights(c.s_kv[n], -INFINITY);  // first scores
  double top = sink, sum = 0;
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!p.keeps(n, h, i, j)) continue;
    double s = 0;
    uint16_t const *q = &p.q.at(b, q0 + i, h, 0), *k = &p.k.at(b, kv0 + j, h / c.group, 0);
    for (int d = 0; d < c.d_qk; ++d) s += double{p.value[q[d]]} * p.value[k[d]];
    weights[j] = c.softcap > 0 ? c.softcap * std::tanh(c.scale * s / c.softcap) : c.scale * s;
    weights[j] += p.added(n, h, i, j);
    top = std::max(top, weights[j]);
  }
  for (double& weight : weights) sum += weight = weight > -INFINITY ? std::exp(weight - top) : 0;
  if (sink > -INFINITY) sum += std::exp(sink - top);
  Row row{std::vector<double>(c.d_v), std::vector<double>(c.d_v), sum > 0 ? top + std::log(sum) : -INFINITY};
  std::vector<double> spread(c.d_v), total(c.d_v);  // sums of weight |v| and |v|
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!p.keeps(n, h, i, j)) continue;
    uint16_t const* v = &p.v.at(b, kv0 + j, h / c.group, 0);
    for (int d = 0; d < c.d_v; ++d) {
      double const x = p.value[v[d]], weight = weights[j] / sum * p.factor(n, h, i, j);
      row.out[d] += weight * x;
      spread[d] += weight * std::fabs(x);
      total[d] += std::fabs(x);
    }
  }
  // What is less than the least normal number may be taken for 0.
  double const half_ulp = p.shape.is_half ? 0x1p-11 : 0x1p-8, smallest = p.shape.is_half ? 0x1p-25 : 0x1p-126;
  for (int d = 0; d < c.d_v; ++d) {
    row.tolerance[d] = half_ulp * (spread[d] + std::fabs(row.out[d])) + smallest * (1 + total[d]) + 2e-5 * spread[d];
  }
  return row;
}

// ---- the run ---------------------------------------------------------------------------------------------------------
static sm90::ForwardArgs arguments(ForwardProblem& p) {
  Case const& c = p.c;
  ForwardParams f{};
  fill_common(p, f);
  f.version = kForwardVersion;
  f.out = p.out.data, f.lse = p.lse.data(), f.lse_low = p.lse_low.data();
  f.counter = c.seed % 3 ? &p.counter : nullptr;
  f.has_band = c.left >= 0 || c.right >= 0;
  f.blocks = c.blocks;
  sm90::ForwardArgs args;
  args.p = f;
  make_maps(f, p.shape.block_m, p.shape.block_n, args);
  return args;
}

static std::string compare(ForwardProblem& p) {
  Case const& c = p.c;
  for (int n = 0; n < c.batch; ++n) {
    int const b = p.of(n), q0 = p.first_q(n);
    for (int h = 0; h < p.q.heads; ++h) {
      for (int i = 0; i < c.s_q[n]; ++i) {
        Row const row = reference_row(p, n, h, i);
        std::string const where = "n " + std::to_string(n) + " h " + std::to_string(h) + " i " + std::to_string(i);
        size_t const at = static_cast<size_t>((b * p.q.heads + h) * p.q.rows + q0 + i);
        double const lse = double{p.lse[at]} + p.lse_low[at];
        if (!(std::isinf(row.lse) ? lse == row.lse : std::fabs(lse - row.lse) < 1e-4)) {
          return "lse of " + where + ": " + std::to_string(lse) + ", should be " + std::to_string(row.lse);
        }
        for (int d = 0; d < c.d_v; ++d) {
          double const got = p.value[p.out.at(b, q0 + i, h, d)];
          if (!(std::fabs(got - row.out[d]) <= row.tolerance[d])) {
            return "out of " + where + " d " + std::to_string(d) + ": " + std::to_string(got) + ", should be " +
                   std::to_string(row.out[d]) + " to within " + std::to_string(row.tolerance[d]);
          }
        }
      }
    }
  }
  return "";
}

std::string check_forward(ForwardInstance const& instance, Case const& c, Report& report) {
  ForwardProblem p{make_problem(instance.shape, c), {}, {}, {}, 0};
  p.out = make_tensor(p.batch(), p.q.rows, p.q.heads, c.d_v, false, 0, p.encode(NAN));
  p.lse.assign(static_cast<size_t>(p.batch() * p.q.heads * p.q.rows), NAN);
  p.lse_low = p.lse;
  if (p.q.rows == 0) return "";  // the host code launches nothing
  sm90::ForwardArgs const args = arguments(p);
  forget_global();
  allow_global(p.out.data, static_cast<size_t>(p.out.batch * p.out.strides.batch * 2));
  for (auto const* x : {&p.lse, &p.lse_low}) allow_global(x->data(), x->size() * sizeof(float));
  allow_global(p.sinks.data(), p.sinks.size() * sizeof(float));
  allow_global(&p.counter, sizeof(p.counter));
  for (auto const* cu_seqlens : {&p.cu_q, &p.cu_kv}) allow_global(cu_seqlens->data(), cu_seqlens->size() * sizeof(int));
  allow_terms(p);
  if (int64 const blocks = instance.shape.has_terms ? sm90::prepare_blocks(args.p) : 0) {
    run_grid(sm90::kPrepareThreads, blocks, c.seed, [&] { instance.prepare(args.p); }, report);
  }
  if (report.error.empty()) run_grid(instance.threads, c.blocks, c.seed, [&] { instance.kernel(args); }, report);
  if (!report.error.empty()) return report.error;
  return p.counter ? "the counter is left at " + std::to_string(p.counter) : compare(p);
}

}  // namespace fa::emu
