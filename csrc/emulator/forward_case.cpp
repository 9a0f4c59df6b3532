// Random forward problems and their check. The reference is written from the docstring of fastattn/spec.py alone: it
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

// ---- cases -----------------------------------------------------------------------------------------------------------
struct Random {
  std::mt19937 engine;
  int between(int low, int high) { return low + static_cast<int>(engine() % static_cast<unsigned>(high - low + 1)); }
  bool one_in(int n) { return engine() % static_cast<unsigned>(n) == 0; }
};

static int random_length(Random& random, ForwardInstance const& instance, int most_blocks) {
  if (random.one_in(12)) return 0;
  if (random.one_in(6)) return random.between(1, 3);
  if (random.one_in(4)) return instance.block_n * random.between(1, 3);  // exactly full blocks
  return random.between(1, most_blocks * instance.block_n);
}

ForwardCase random_case(ForwardInstance const& instance, uint32_t seed) {
  Random random{std::mt19937(seed)};
  ForwardCase c{};
  c.seed = seed;
  c.is_packed = random.one_in(2);
  c.batch = c.is_packed ? random.between(1, 4) : random.between(1, 2);
  c.heads_kv = random.between(1, 2);
  c.group = random.one_in(3) ? random.between(2, 3) : 1;
  c.d_qk = random.one_in(2) ? instance.d_qk : random.between(1, instance.d_qk / 8) * 8;
  c.d_v = random.one_in(2) ? instance.d_v : random.between(1, instance.d_v / 8) * 8;
  int const s_q = random_length(random, instance, 3);
  int const s_kv = random.one_in(3) ? s_q : random_length(random, instance, 6);
  for (int n = 0; n < c.batch; ++n) {
    c.s_q.push_back(c.is_packed ? random_length(random, instance, 3) / 2 : s_q);
    c.s_kv.push_back(c.is_packed ? (random.one_in(3) ? c.s_q[n] : random_length(random, instance, 4)) : s_kv);
  }
  c.left = c.right = -1;
  if (instance.has_band && !random.one_in(8)) {
    if (random.one_in(2)) c.left = random.between(0, random.one_in(2) ? 4 : 200);
    if (!random.one_in(4)) c.right = random.one_in(2) ? 0 : random.between(0, random.one_in(2) ? 4 : 100);
  }
  c.lower_right = !random.one_in(3);
  c.scale = random.between(1, 4) / std::sqrt(c.d_qk);
  c.softcap = instance.has_softcap ? random.between(1, 8) : 0;
  c.sinks = random.one_in(2) ? 0 : random.between(1, 2);
  c.heads_first = !c.is_packed && random.one_in(2);
  c.padding = random.between(0, 2);
  c.blocks = random.between(1, 3);
  c.heads_per_pass = random.between(1, 3) * c.group;
  return c;
}

std::string describe(ForwardCase const& c) {
  std::string lengths;
  for (int n = 0; n < c.batch && (c.is_packed || n == 0); ++n) {
    lengths += " " + std::to_string(c.s_q[n]) + "x" + std::to_string(c.s_kv[n]);
  }
  return "seed " + std::to_string(c.seed) + (c.is_packed ? " packed" : " dense B " + std::to_string(c.batch)) +
         ", S_q x S_kv" + lengths + ", H_kv " + std::to_string(c.heads_kv) + " G " + std::to_string(c.group) + ", D " +
         std::to_string(c.d_qk) + "/" + std::to_string(c.d_v) + ", band (" + std::to_string(c.left) + ", " +
         std::to_string(c.right) + ") " + (c.lower_right ? "lower right" : "upper left") + ", softcap " +
         std::to_string(static_cast<int>(c.softcap)) + ", sinks " + std::to_string(c.sinks) + ", blocks " +
         std::to_string(c.blocks);
}

// ---- tensors ---------------------------------------------------------------------------------------------------------
struct Tensor {  // 16-bit, (batch, row, head, column) with strides in elements
  std::vector<uint16_t> storage;
  uint16_t* data;
  int batch, rows, heads, columns;
  Strides strides;
  uint16_t& at(int b, int row, int head, int column) {
    return data[b * strides.batch + row * strides.row + head * strides.head + column];
  }
};

static Tensor make_tensor(int batch, int rows, int heads, int columns, bool heads_first, int padding, uint16_t fill) {
  Tensor t;
  t.batch = batch, t.rows = rows, t.heads = heads, t.columns = columns;
  int64 const width = columns + 8 * padding;
  t.strides = heads_first ? Strides{heads * rows * width, width, rows * width}
                          : Strides{rows * heads * width, heads * width, width};
  t.storage.assign(static_cast<size_t>(batch * rows * heads * width + 16), fill);
  auto const address = reinterpret_cast<uintptr_t>(t.storage.data());
  t.data = t.storage.data() + (32 - address % 32) % 32 / 2;
  return t;
}

static Map map_of(Tensor const& t, int64 first_row, int64 end_row, int box_rows) {
  auto const bytes = [](int64 stride) { return stride * 2; };
  return {t.data + first_row * t.strides.row,
          {t.columns, end_row - first_row, t.heads, t.batch},
          {2, bytes(t.strides.row), bytes(t.strides.head), bytes(t.strides.batch)},
          {64, box_rows, 1, 1}};
}

// ---- the reference ---------------------------------------------------------------------------------------------------
static bool sees(ForwardCase const& c, int n, int i, int j) {
  int const beyond = j - (i + (c.lower_right ? c.s_kv[n] - c.s_q[n] : 0));
  return (c.left < 0 || beyond >= -c.left) && (c.right < 0 || beyond <= c.right);
}

struct Problem {
  ForwardInstance const& instance;
  ForwardCase const& c;
  Tensor q, k, v, out;
  std::vector<float> lse, sinks;
  std::vector<int> cu_q, cu_kv;

  float const* value;  // of a 16-bit number
  uint16_t encode(double x) const { return instance.is_half ? to_half(float(x)) : to_bf16(float(x)); }
};

static Problem make_problem(ForwardInstance const& instance, ForwardCase const& c) {
  Problem p{instance, c, {}, {}, {}, {}, {}, {}, {0}, {0}, decoder(instance.is_half)};
  for (int n = 0; n < c.batch; ++n) p.cu_q.push_back(p.cu_q[n] + c.s_q[n]), p.cu_kv.push_back(p.cu_kv[n] + c.s_kv[n]);
  int const batch = c.is_packed ? 1 : c.batch, heads_q = c.heads_kv * c.group;
  int const rows_q = c.is_packed ? p.cu_q.back() : c.s_q[0], rows_kv = c.is_packed ? p.cu_kv.back() : c.s_kv[0];
  uint16_t const nan = p.encode(NAN);
  p.q = make_tensor(batch, rows_q, heads_q, c.d_qk, c.heads_first, c.padding, nan);
  p.k = make_tensor(batch, rows_kv, c.heads_kv, c.d_qk, c.heads_first, c.padding, nan);
  p.v = make_tensor(batch, rows_kv, c.heads_kv, c.d_v, c.heads_first, c.padding, nan);
  p.out = make_tensor(batch, rows_q, heads_q, c.d_v, false, 0, nan);
  p.lse.assign(static_cast<size_t>(batch * heads_q * rows_q), NAN);
  std::mt19937 engine(c.seed + 1);
  std::normal_distribution<double> normal;
  auto const fill = [&](Tensor& t, int b, int row) {
    for (int h = 0; h < t.heads; ++h)
      for (int d = 0; d < t.columns; ++d) t.at(b, row, h, d) = p.encode(normal(engine));
  };
  for (int n = 0; n < c.batch; ++n) {
    int const b = c.is_packed ? 0 : n, q0 = c.is_packed ? p.cu_q[n] : 0, kv0 = c.is_packed ? p.cu_kv[n] : 0;
    for (int i = 0; i < c.s_q[n]; ++i) fill(p.q, b, q0 + i);
    for (int j = 0; j < c.s_kv[n]; ++j) {  // rows that nobody sees stay NaN
      bool is_seen = false;
      for (int i = 0; i < c.s_q[n]; ++i) is_seen = is_seen || sees(c, n, i, j);
      if (is_seen) fill(p.k, b, kv0 + j), fill(p.v, b, kv0 + j);
    }
  }
  for (int i = 0; c.sinks && i < (c.sinks == 2 ? c.batch : 1) * heads_q; ++i) p.sinks.push_back(float(2 * normal(engine)));
  return p;
}

struct Row {
  std::vector<double> out, tolerance;
  double lse;
};

// One row of the definition, with what rounding P and out to 16 bits may change at most.
static Row reference_row(Problem& p, int n, int h, int i) {
  ForwardCase const& c = p.c;
  int const b = c.is_packed ? 0 : n, q0 = c.is_packed ? p.cu_q[n] : 0, kv0 = c.is_packed ? p.cu_kv[n] : 0;
  double const sink = c.sinks ? p.sinks[(c.sinks == 2 ? n * p.q.heads : 0) + h] : -INFINITY;
  std::vector<double> weights(c.s_kv[n], -INFINITY);  // first scores
  double top = sink, sum = 0;
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!sees(c, n, i, j)) continue;
    double s = 0;
    uint16_t const *q = &p.q.at(b, q0 + i, h, 0), *k = &p.k.at(b, kv0 + j, h / c.group, 0);
    for (int d = 0; d < c.d_qk; ++d) s += double{p.value[q[d]]} * p.value[k[d]];
    weights[j] = c.softcap > 0 ? c.softcap * std::tanh(c.scale * s / c.softcap) : c.scale * s;
    top = std::max(top, weights[j]);
  }
  for (double& weight : weights) sum += weight = weight > -INFINITY ? std::exp(weight - top) : 0;
  if (sink > -INFINITY) sum += std::exp(sink - top);
  Row row{std::vector<double>(c.d_v), std::vector<double>(c.d_v), sum > 0 ? top + std::log(sum) : -INFINITY};
  std::vector<double> spread(c.d_v), total(c.d_v);  // sums of weight |v| and |v|
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!sees(c, n, i, j)) continue;
    uint16_t const* v = &p.v.at(b, kv0 + j, h / c.group, 0);
    for (int d = 0; d < c.d_v; ++d) {
      double const x = p.value[v[d]], weight = weights[j] / sum;
      row.out[d] += weight * x;
      spread[d] += weight * std::fabs(x);
      total[d] += std::fabs(x);
    }
  }
  double const half_ulp = p.instance.is_half ? 0x1p-11 : 0x1p-8, smallest = p.instance.is_half ? 0x1p-25 : 0;
  for (int d = 0; d < c.d_v; ++d) {
    row.tolerance[d] = half_ulp * (spread[d] + std::fabs(row.out[d])) + smallest * (1 + total[d]) + 2e-5 * spread[d];
  }
  return row;
}

// ---- the run ---------------------------------------------------------------------------------------------------------
static sm90::ForwardArgs arguments(Problem& p) {
  ForwardCase const& c = p.c;
  ForwardParams f{};
  f.version = kForwardVersion;
  f.q = p.q.data, f.k = p.k.data, f.v = p.v.data, f.out = p.out.data, f.lse = p.lse.data();
  f.sinks = c.sinks ? p.sinks.data() : nullptr;
  f.cu_seqlens_q = c.is_packed ? p.cu_q.data() : nullptr;
  f.cu_seqlens_kv = c.is_packed ? p.cu_kv.data() : nullptr;
  f.q_strides = p.q.strides, f.k_strides = p.k.strides, f.v_strides = p.v.strides;
  f.sinks_batch_stride = c.sinks == 2 ? p.q.heads : 0;
  f.dtype = p.instance.is_half ? kFloat16 : kBfloat16;
  f.batch = c.batch, f.heads_q = p.q.heads, f.heads_kv = c.heads_kv;
  f.head_dim_qk = c.d_qk, f.head_dim_v = c.d_v;
  f.seqlen_q = p.q.rows, f.seqlen_kv = p.k.rows;
  f.key_begin = 0, f.key_end = p.k.rows;
  if (!c.is_packed) {  // the keys that some query sees
    auto const seen = [&](int j) {
      for (int i = 0; i < c.s_q[0]; ++i) if (sees(c, 0, i, j)) return true;
      return false;
    };
    while (f.key_begin < f.key_end && !seen(int(f.key_begin))) ++f.key_begin;
    while (f.key_begin < f.key_end && !seen(int(f.key_end) - 1)) --f.key_end;
  }
  f.left = c.left < 0 ? kUnbounded : c.left, f.right = c.right < 0 ? kUnbounded : c.right;
  f.lower_right = c.lower_right;
  f.has_band = c.left >= 0 || c.right >= 0, f.has_softcap = c.softcap > 0;
  double const log2e = 1.4426950408889634;
  f.scale_log2 = (c.softcap > 0 ? c.softcap : c.scale) * log2e;
  f.cap_scale = c.softcap > 0 ? c.scale / c.softcap : 0;
  f.heads_per_pass = c.heads_per_pass;
  f.blocks = c.blocks;
  bool const any_keys = f.key_begin < f.key_end;
  Map const q = map_of(p.q, 0, p.q.rows, p.instance.block_m), out = map_of(p.out, 0, p.out.rows, 64);
  return {q, any_keys ? map_of(p.k, f.key_begin, f.key_end, p.instance.block_n) : q,
          any_keys ? map_of(p.v, f.key_begin, f.key_end, p.instance.block_n) : q, out, f};
}

static std::string compare(Problem& p) {
  ForwardCase const& c = p.c;
  for (int n = 0; n < c.batch; ++n) {
    int const b = c.is_packed ? 0 : n, q0 = c.is_packed ? p.cu_q[n] : 0;
    for (int h = 0; h < p.q.heads; ++h) {
      for (int i = 0; i < c.s_q[n]; ++i) {
        Row const row = reference_row(p, n, h, i);
        std::string const where = "n " + std::to_string(n) + " h " + std::to_string(h) + " i " + std::to_string(i);
        double const lse = p.lse[static_cast<size_t>((b * p.q.heads + h) * p.q.rows + q0 + i)];
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

std::string check_forward(ForwardInstance const& instance, ForwardCase const& c, Report& report) {
  Problem p = make_problem(instance, c);
  if (p.q.rows == 0) return "";  // the host code launches nothing
  sm90::ForwardArgs const args = arguments(p);
  forget_global();
  allow_global(p.out.data, static_cast<size_t>(p.out.batch * p.out.strides.batch * 2));
  allow_global(p.lse.data(), p.lse.size() * sizeof(float));
  allow_global(p.sinks.data(), p.sinks.size() * sizeof(float));
  for (auto const* cu_seqlens : {&p.cu_q, &p.cu_kv}) allow_global(cu_seqlens->data(), cu_seqlens->size() * sizeof(int));
  std::vector<int> order(static_cast<size_t>(c.blocks));
  for (int block = 0; block < c.blocks; ++block) order[static_cast<size_t>(block)] = block;
  std::shuffle(order.begin(), order.end(), std::mt19937(c.seed));
  for (int block : order) {
    run_block(instance.threads, block, c.blocks, c.seed * 77 + static_cast<uint32_t>(block),
              [&] { instance.kernel(args); }, report);
    if (!report.error.empty()) return report.error;
  }
  return compare(p);
}

}  // namespace fa::emu
