// Random decoding problems and their check. The reference is written from the docstring of fastattn/spec.py alone: it
// loops over pairs in double precision and shares no code with the kernels.
//
// Every row of the caches that no query sees is NaN, and so are all other pages. Block table entries of pages without a
// row that some query sees are junk, and the machine reports a kernel that reads them.
#include "decode_case.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>

namespace fa::emu {

std::vector<DecodeInstance>& decode_instances() {
  static std::vector<DecodeInstance> all;
  return all;
}

// ---- the problem -----------------------------------------------------------------------------------------------------
struct Bytes {  // of a tensor in e4m3, with the strides of the one in 16 bits
  std::vector<uint8_t> storage;
  uint8_t* data;
  std::vector<float> scale;
};

struct DecodeProblem {
  Shape shape;
  DecodeCase const& c;
  Tensor q, k, v, out;  // q and out: all sequences one after the other, dense ones too
  Tensor new_k, new_v;  // likewise
  std::vector<float> lse, partial_out, partial_lse, sinks;
  std::vector<int> first_q, lengths, table, tree, depths;
  std::vector<bool> is_kept;  // entries of the table

  float const* value;  // of a 16-bit number
  Bytes k_bytes{}, v_bytes{};  // an e4m3 cache; k and v are then what its numbers stand for
  std::vector<float> slopes{}, bias{};
  std::vector<uint16_t> short_bias{};  // the same in the dtype of q
  uint16_t encode(double x) const { return shape.is_half ? to_half(float(x)) : to_bf16(float(x)); }
  bool is_new(int n, int j) const { return c.stores && j >= lengths[n] && j < c.s_kv[n]; }
  int first_new(int n) const { return c.is_packed ? first_q[n] : n * c.new_keys; }  // among all new rows
  int page_of(int n, int j) const { return table[n * c.max_pages + j / c.page_size]; }
};

static int depth_of(DecodeCase const& c, int n, int i) {
  int depth = 0;
  while ((i = c.parents[n][i]) >= 0) ++depth;
  return depth;
}

static bool follows(DecodeCase const& c, int n, int i, int j) {  // or is the same
  while (i > j) i = c.parents[n][i];
  return i == j;
}

static bool sees_in_tree(DecodeCase const& c, int n, int i, int j) {
  int const added = j - (c.s_kv[n] - c.s_q[n]);
  if (added >= 0 && !follows(c, n, i, added)) return false;
  int const beyond = (added < 0 ? added : depth_of(c, n, added)) - depth_of(c, n, i);
  return c.left < 0 || beyond >= -c.left;
}

static bool sees(DecodeCase const& c, int n, int i, int j) {
  if (!c.parents.empty()) return sees_in_tree(c, n, i, j);
  int const beyond = j - (i + c.s_kv[n] - c.s_q[n]);
  return (c.left < 0 || beyond >= -c.left) && (c.right < 0 || beyond <= c.right);
}

static int bias_columns(DecodeCase const& c) { return *std::max_element(c.s_kv.begin(), c.s_kv.end()); }

static float bias_of(DecodeProblem const& p, int n, int h, int i, int j) {
  DecodeCase const& c = p.c;
  int const row = c.bias == 3 ? 0 : (n * c.heads_kv * c.group + h) * c.s_q[0] + i;
  return c.bias ? p.bias[static_cast<size_t>(row * bias_columns(c) + j)] : 0;
}

// ALiBi's slope times the distance, between places in a tree if there is one.
static double alibi_of(DecodeProblem const& p, int n, int h, int i, int j) {
  DecodeCase const& c = p.c;
  if (!c.slopes) return 0;
  int const before = c.s_kv[n] - c.s_q[n];
  bool const is_tree = !c.parents.empty();
  int const query = before + (is_tree ? depth_of(c, n, i) : i);
  int const key = is_tree && j >= before ? before + depth_of(c, n, j - before) : j;
  return -double{p.slopes[static_cast<size_t>((c.slopes == 2 ? n * c.heads_kv * c.group : 0) + h)]} *
         std::abs(key - query);
}

static bool is_seen(DecodeCase const& c, int n, int j) {
  for (int i = 0; i < c.s_q[n]; ++i)
    if (sees(c, n, i, j)) return true;
  return false;
}

// Pages in random order, where some query sees a row of them; junk elsewhere.
static void fill_table(DecodeProblem& p, std::mt19937& engine) {
  DecodeCase const& c = p.c;
  int const pages = c.batch * c.max_pages + c.spare;
  std::vector<int> order(static_cast<size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  if (c.has_table) std::shuffle(order.begin(), order.end(), engine);
  p.table.assign(order.begin(), order.begin() + c.batch * c.max_pages);
  p.is_kept.assign(p.table.size(), false);
  for (int n = 0; n < c.batch; ++n) {
    for (int j = 0; j < c.s_kv[n]; ++j) {
      if (is_seen(c, n, j) || p.is_new(n, j)) p.is_kept[static_cast<size_t>(n * c.max_pages + j / c.page_size)] = true;
    }
  }
  for (size_t i = 0; c.has_table && i < p.table.size(); ++i) {
    int const junk[] = {-1, 1 << 30, order[0]};
    if (!p.is_kept[i]) p.table[i] = junk[engine() % 3];
  }
}

static int tree_words(DecodeCase const& c) { return (*std::max_element(c.s_q.begin(), c.s_q.end()) + 31) / 32; }

// Bits of keys that a sequence does not have are junk.
static void fill_trees(DecodeProblem& p) {
  DecodeCase const& c = p.c;
  for (int n = 0; n < static_cast<int>(c.parents.size()); ++n) {
    for (int i = 0; i < c.s_q[n]; ++i) {
      if (c.left >= 0 || c.slopes) p.depths.push_back(depth_of(c, n, i));
      for (int word = 0; word < tree_words(c) && !(c.shares_tree && n > 0); ++word) {
        uint32_t bits = 0;
        for (int bit = 0; bit < 32; ++bit) {
          int const j = 32 * word + bit;
          bits |= static_cast<uint32_t>(j >= c.s_q[n] || follows(c, n, i, j)) << bit;
        }
        p.tree.push_back(static_cast<int>(bits));
      }
    }
  }
}

// What is to be stored, out of the caches: NaN takes its place there.
static void move_new_rows(DecodeProblem& p, uint16_t nan) {
  for (int n = 0; n < p.c.batch; ++n) {
    for (int j = p.lengths[n]; j < p.c.s_kv[n]; ++j) {
      if (!p.is_new(n, j)) continue;
      int const page = p.page_of(n, j), row = j % p.c.page_size, at = p.first_new(n) + j - p.lengths[n];
      for (auto [cache, fresh] : {std::pair{&p.k, &p.new_k}, std::pair{&p.v, &p.new_v}}) {
        for (int h = 0; h < cache->heads; ++h) {
          for (int d = 0; d < cache->columns; ++d) {
            fresh->at(0, at, h, d) = std::exchange(cache->at(page, row, h, d), nan);
          }
        }
      }
    }
  }
}

static uint8_t to_e4m3(double x) {
  uint8_t best = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (std::fabs(e4m3_value(byte) - x) < std::fabs(e4m3_value(best) - x)) best = static_cast<uint8_t>(byte);
  }
  return best;
}

// The cache in e4m3, and in its 16-bit counterpart what it stands for: numbers times their scale, rounded.
static Bytes in_e4m3(DecodeProblem& p, Tensor& cache, std::mt19937& engine) {
  Bytes bytes{std::vector<uint8_t>(cache.storage.size() + 16), nullptr, {}};
  bytes.data = bytes.storage.data() + (16 - reinterpret_cast<uintptr_t>(bytes.storage.data()) % 16) % 16;
  for (int i = 0; i < (p.c.scales == 0 ? 0 : p.c.scales == 1 ? 1 : cache.batch) * cache.heads; ++i)
    bytes.scale.push_back(std::ldexp(1.f + float(engine() % 1000) / 1000.f, int(engine() % 5) - 4));
  for (int page = 0; page < cache.batch; ++page) {
    for (int row = 0; row < cache.rows; ++row) {
      for (int h = 0; h < cache.heads; ++h) {
        float const scale = p.c.scales ? bytes.scale[(p.c.scales == 2 ? page * cache.heads : 0) + h] : 1.f;
        for (int d = 0; d < cache.columns; ++d) {
          uint16_t& x = cache.at(page, row, h, d);
          float const value = p.value[x];
          uint8_t const byte = std::isnan(value) ? 0x7f : to_e4m3(value / scale);
          bytes.data[&x - cache.data] = byte;
          x = p.encode(e4m3_value(byte) * scale);
        }
      }
    }
  }
  return bytes;
}

static bool is_seen_with_bias(DecodeProblem const& p, int n, int j) {
  for (int i = 0; i < p.c.s_q[n]; ++i) {
    for (int h = 0; h < p.c.heads_kv * p.c.group; ++h) {
      if ((!p.c.parents.empty() || sees(p.c, n, i, j)) && bias_of(p, n, h, i, j) > -INFINITY) return true;
    }
  }
  return false;
}

// Slopes and biases; rows of the caches that a bias leaves to no query become NaN.
static void fill_terms(DecodeProblem& p, std::mt19937& engine, uint16_t nan) {
  DecodeCase const& c = p.c;
  int const heads = c.heads_kv * c.group;
  for (int i = 0; c.slopes && i < (c.slopes == 2 ? c.batch : 1) * heads; ++i)
    p.slopes.push_back(float(engine() % 1000) / 2000);
  if (!c.bias) return;
  std::normal_distribution<double> normal;
  int const columns = bias_columns(c), rows = c.bias == 3 ? 1 : c.batch * heads * c.s_q[0];
  for (int i = 0; i < rows * columns; ++i) {
    // The last key, which often the last query alone may see, is hidden from it.
    bool const is_last = i % columns == columns - 1 && i / columns % c.s_q[0] == c.s_q[0] - 1;
    bool const is_out = is_last || i % columns % 5 == 3 || engine() % 8 == 0;
    p.short_bias.push_back(p.encode(is_out ? -INFINITY : normal(engine)));
    p.bias.push_back(p.value[p.short_bias.back()]);
  }
  for (int n = 0; n < c.batch; ++n) {
    for (int j = 0; j < c.s_kv[n]; ++j) {
      if (!is_seen(c, n, j) || is_seen_with_bias(p, n, j)) continue;
      for (Tensor* cache : {&p.k, &p.v}) {
        for (int at = 0; at < cache->heads * cache->columns; ++at)
          cache->at(p.page_of(n, j), j % c.page_size, at / cache->columns, at % cache->columns) = nan;
      }
    }
  }
}

static DecodeProblem make_problem(Shape const& shape, DecodeCase const& c) {
  DecodeProblem p{shape, c, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {0}, {}, {}, {}, {}, {}, decoder(shape.is_half)};
  for (int n = 0; n < c.batch; ++n) {
    p.first_q.push_back(p.first_q[n] + c.s_q[n]);
    p.lengths.push_back(c.s_kv[n] - (c.new_keys < 0 ? c.s_q[n] : c.new_keys));
  }
  int const heads_q = c.heads_kv * c.group, rows = p.first_q.back(), pages = c.batch * c.max_pages + c.spare;
  uint16_t const nan = p.encode(NAN);
  std::mt19937 engine(c.seed + 1);
  fill_table(p, engine);
  p.q = make_tensor(1, rows, heads_q, c.d_qk, c.is_packed && c.heads_first, c.padding, nan);
  p.k = make_tensor(pages, c.page_size, c.heads_kv, c.d_qk, c.heads_first, c.padding, nan);
  p.v = make_tensor(pages, c.page_size, c.heads_kv, c.d_v, c.heads_first, c.padding, nan);
  p.out = make_tensor(1, rows, heads_q, c.d_v, false, 0, nan);
  int const new_rows = !c.stores ? 0 : c.is_packed ? rows : c.batch * c.new_keys;
  p.new_k = make_tensor(1, new_rows, c.heads_kv, c.d_qk, c.is_packed && c.heads_first, c.padding, nan);
  p.new_v = make_tensor(1, new_rows, c.heads_kv, c.d_v, c.is_packed && c.heads_first, c.padding, nan);
  size_t const outputs = static_cast<size_t>(rows) * static_cast<size_t>(heads_q);
  p.lse.assign(outputs, NAN);
  p.partial_lse.assign(2 * outputs * static_cast<size_t>(c.splits), NAN);
  p.partial_out.assign(outputs * static_cast<size_t>(c.splits * c.d_v), NAN);
  std::normal_distribution<double> normal;
  auto const fill = [&](Tensor& t, int b, int row) {
    bool const is_huge = c.has_equal_keys && &t != &p.v;
    for (int h = 0; h < t.heads; ++h)
      for (int d = 0; d < t.columns; ++d)
        t.at(b, row, h, d) = p.encode(is_huge ? huge_element(engine) : normal(engine));
  };
  std::vector<uint16_t> first_key;  // of all heads, which other keys equal
  for (int row = 0; row < rows; ++row) fill(p.q, 0, row);
  for (int n = 0; n < c.batch; ++n) {
    for (int j = 0; j < c.s_kv[n]; ++j) {  // rows that nobody sees stay NaN
      if (!is_seen(c, n, j)) continue;
      int const page = p.page_of(n, j), row = j % c.page_size;
      fill(p.k, page, row), fill(p.v, page, row);
      bool const is_first = first_key.empty();
      for (int h = 0; c.has_equal_keys && h < p.k.heads; ++h) {
        for (int d = 0; d < p.k.columns; ++d) {
          if (is_first) first_key.push_back(p.k.at(page, row, h, d));
          p.k.at(page, row, h, d) = first_key[static_cast<size_t>(h * p.k.columns + d)];
        }
      }
    }
  }
  fill_terms(p, engine, nan);
  move_new_rows(p, nan);
  fill_trees(p);
  if (shape.is_e4m3) p.k_bytes = in_e4m3(p, p.k, engine), p.v_bytes = in_e4m3(p, p.v, engine);
  for (int i = 0; c.sinks && i < (c.sinks == 2 ? c.batch : 1) * heads_q; ++i)
    p.sinks.push_back(float(2 * normal(engine)));
  return p;
}

// ---- the reference ---------------------------------------------------------------------------------------------------
struct CacheRow {
  std::vector<double> out, tolerance;
  double lse;
};

// One row of the definition, with what rounding P and out to 16 bits may change at most.
static CacheRow reference_row(DecodeProblem& p, int n, int h, int i) {
  DecodeCase const& c = p.c;
  double const sink = c.sinks ? p.sinks[static_cast<size_t>((c.sinks == 2 ? n * p.q.heads : 0) + h)] : -INFINITY;
  std::vector<double> weights(static_cast<size_t>(c.s_kv[n]), -INFINITY);  // first scores
  double top = sink, sum = 0;
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!sees(c, n, i, j)) continue;
    double s = 0;
    uint16_t const* q = &p.q.at(0, p.first_q[n] + i, h, 0);
    uint16_t const* k = &p.k.at(p.page_of(n, j), j % c.page_size, h / c.group, 0);
    for (int d = 0; d < c.d_qk; ++d) s += double{p.value[q[d]]} * p.value[k[d]];
    weights[j] = c.softcap > 0 ? c.softcap * std::tanh(c.scale * s / c.softcap) : c.scale * s;
    weights[j] += alibi_of(p, n, h, i, j) + bias_of(p, n, h, i, j);
    if (bias_of(p, n, h, i, j) == -INFINITY) weights[j] = -INFINITY;
    top = std::max(top, weights[j]);
  }
  for (double& weight : weights) sum += weight = weight > -INFINITY ? std::exp(weight - top) : 0;
  if (sink > -INFINITY) sum += std::exp(sink - top);
  size_t const columns = static_cast<size_t>(c.d_v);
  CacheRow row{std::vector<double>(columns), std::vector<double>(columns), sum > 0 ? top + std::log(sum) : -INFINITY};
  std::vector<double> spread(columns), total(columns);  // sums of weight |v| and |v|
  for (int j = 0; j < c.s_kv[n]; ++j) {
    if (!sees(c, n, i, j) || bias_of(p, n, h, i, j) == -INFINITY) continue;
    uint16_t const* v = &p.v.at(p.page_of(n, j), j % c.page_size, h / c.group, 0);
    for (int d = 0; d < c.d_v; ++d) {
      double const x = p.value[v[d]], weight = weights[j] / sum;
      row.out[d] += weight * x;
      spread[d] += weight * std::fabs(x);
      total[d] += std::fabs(x);
    }
  }
  double const half_ulp = p.shape.is_half ? 0x1p-11 : 0x1p-8, smallest = p.shape.is_half ? 0x1p-25 : 0x1p-126;
  for (int d = 0; d < c.d_v; ++d) {
    row.tolerance[d] = half_ulp * (spread[d] + std::fabs(row.out[d])) + smallest * (1 + total[d]) + 2e-5 * spread[d];
  }
  return row;
}

// ---- the run ---------------------------------------------------------------------------------------------------------
static DecodeParams params_of(DecodeProblem& p) {
  DecodeCase const& c = p.c;
  DecodeParams f{};
  f.version = kDecodeVersion;
  f.q = p.q.data, f.k_cache = p.k.data, f.v_cache = p.v.data, f.out = p.out.data, f.lse = p.lse.data();
  f.partial_out = c.splits > 1 ? p.partial_out.data() : nullptr;
  f.partial_lse = c.splits > 1 ? p.partial_lse.data() : nullptr;
  f.sinks = c.sinks ? p.sinks.data() : nullptr;
  f.cache_lengths = p.lengths.data();
  f.is_gathered = p.shape.is_gathered, f.is_e4m3 = p.shape.is_e4m3;
  if (!c.parents.empty()) {
    f.tree = p.tree.data(), f.depths = c.left < 0 ? nullptr : p.depths.data();
    f.tree_words = tree_words(c), f.shares_tree = c.shares_tree;
  }
  if (p.shape.is_e4m3) {
    f.k_cache = p.k_bytes.data, f.v_cache = p.v_bytes.data;
    f.k_scale = c.scales ? p.k_bytes.scale.data() : nullptr, f.v_scale = c.scales ? p.v_bytes.scale.data() : nullptr;
    f.k_scale_stride = f.v_scale_stride = c.scales == 2 ? c.heads_kv : 0;
  }
  f.alibi_slopes = c.slopes ? p.slopes.data() : nullptr, f.slopes_batch_stride = c.slopes == 2 ? p.q.heads : 0;
  if (c.slopes && !c.parents.empty()) f.depths = p.depths.data();
  int64 const columns = bias_columns(c), of_head = columns * c.s_q[0];
  f.bias = !c.bias ? nullptr : c.bias == 2 ? static_cast<void*>(p.short_bias.data()) : p.bias.data();
  f.bias_is_float = c.bias != 2;
  f.bias_strides = c.bias == 3 ? PairStrides{0, 0, 0, 1} : PairStrides{of_head * p.q.heads, of_head, columns, 1};
  f.block_table = c.has_table ? p.table.data() : nullptr;
  f.cu_seqlens_q = c.is_packed ? p.first_q.data() : nullptr;
  f.new_k = c.stores ? p.new_k.data : nullptr, f.new_v = c.stores ? p.new_v.data : nullptr;
  f.new_k_strides = p.new_k.strides, f.new_v_strides = p.new_v.strides;
  f.new_k_strides.batch = c.is_packed ? 0 : c.new_keys * p.new_k.strides.row;
  f.new_v_strides.batch = c.is_packed ? 0 : c.new_keys * p.new_v.strides.row;
  f.q_strides = p.q.strides, f.k_strides = p.k.strides, f.v_strides = p.v.strides;
  f.q_strides.batch = c.is_packed ? 0 : c.s_q[0] * p.q.strides.row;
  f.sinks_batch_stride = c.sinks == 2 ? p.q.heads : 0;
  f.table_stride = c.max_pages;
  f.dtype = p.shape.is_half ? kFloat16 : kBfloat16;
  f.batch = c.batch, f.heads_q = p.q.heads, f.heads_kv = c.heads_kv;
  f.head_dim_qk = c.d_qk, f.head_dim_v = c.d_v;
  f.seqlen_q = c.is_packed ? p.q.rows : c.s_q[0];
  f.new_keys = c.new_keys;
  f.pages = p.k.batch, f.page_size = c.page_size, f.capacity = c.page_size * c.max_pages;
  f.box_rows = c.max_pages == 1 ? 64 : std::gcd(c.page_size, 64);
  f.left = c.left < 0 ? kUnbounded : c.left, f.right = c.right < 0 ? kUnbounded : c.right;
  f.has_softcap = c.softcap > 0;
  f.score_scale = c.softcap > 0 ? c.softcap : c.scale;
  f.cap_scale = c.softcap > 0 ? c.scale / c.softcap : 0;
  f.heads_per_tile = std::min(c.group, 64);
  f.positions_per_tile = 64 / f.heads_per_tile;
  int64 const parts_of_group = (c.group + f.heads_per_tile - 1) / f.heads_per_tile, positions = f.positions_per_tile;
  f.tiles = parts_of_group *
            (c.is_packed ? p.q.rows / positions + c.batch : c.batch * ((c.s_q[0] + positions - 1) / positions));
  f.splits = c.splits;
  return f;
}

static std::string compare(DecodeProblem& p) {
  DecodeCase const& c = p.c;
  for (int n = 0; n < c.batch; ++n) {
    for (int h = 0; h < p.q.heads; ++h) {
      for (int i = 0; i < c.s_q[n]; ++i) {
        CacheRow const row = reference_row(p, n, h, i);
        std::string const where = "n " + std::to_string(n) + " h " + std::to_string(h) + " i " + std::to_string(i);
        int const at = c.is_packed ? h * p.q.rows + p.first_q[n] + i : (n * p.q.heads + h) * c.s_q[n] + i;
        double const lse = p.lse[static_cast<size_t>(at)];
        double const rounding = 0x1p-24 * std::fabs(row.lse);
        if (!(std::isinf(row.lse) ? lse == row.lse : std::fabs(lse - row.lse) < 1e-4 + rounding)) {
          return "lse of " + where + ": " + std::to_string(lse) + ", should be " + std::to_string(row.lse);
        }
        for (int d = 0; d < c.d_v; ++d) {
          double const got = p.value[p.out.at(0, p.first_q[n] + i, h, d)];
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

// The caches have to hold the new rows, and otherwise what they held before.
static std::string compare_stored(DecodeProblem& p, std::vector<uint16_t> const& k, std::vector<uint16_t> const& v) {
  for (auto [cache, fresh, before] : {std::tuple{&p.k, &p.new_k, &k}, std::tuple{&p.v, &p.new_v, &v}}) {
    std::vector<uint16_t> expected = *before;
    for (int n = 0; n < p.c.batch; ++n) {
      for (int j = p.lengths[n]; j < p.c.s_kv[n]; ++j) {
        for (int h = 0; p.is_new(n, j) && h < cache->heads; ++h) {
          uint16_t const* const from = &fresh->at(0, p.first_new(n) + j - p.lengths[n], h, 0);
          uint16_t* const place = &cache->at(p.page_of(n, j), j % p.c.page_size, h, 0);
          std::copy(from, from + cache->columns, expected.data() + (place - cache->storage.data()));
        }
      }
    }
    if (expected != cache->storage) return "a cache does not hold the new rows, or holds them elsewhere";
  }
  return "";
}

// Allows the accesses that kernels may make besides TMA; of the block table only the entries that they have to read.
static void allow_tensors(DecodeProblem& p) {
  auto const allow = [](auto const& x) { allow_global(x.data(), x.size() * sizeof(x[0])); };
  forget_global();
  allow(p.q.storage), allow(p.out.storage), allow(p.lse), allow(p.partial_out), allow(p.partial_lse), allow(p.sinks);
  allow(p.lengths), allow(p.first_q), allow(p.tree), allow(p.depths), allow(p.new_k.storage), allow(p.new_v.storage);
  allow(p.slopes), allow(p.bias), allow(p.short_bias);
  for (int n = 0; n < p.c.batch; ++n) {
    for (int j = p.lengths[n]; j < p.c.s_kv[n]; ++j) {
      for (int h = 0; p.is_new(n, j) && h < p.k.heads; ++h) {
        int const page = p.page_of(n, j), row = j % p.c.page_size;
        allow_global(&p.k.at(page, row, h, 0), p.c.d_qk * sizeof(uint16_t));
        allow_global(&p.v.at(page, row, h, 0), p.c.d_v * sizeof(uint16_t));
      }
    }
  }
  if (p.shape.is_gathered) {
    allow(p.k.storage), allow(p.v.storage), allow(p.k_bytes.storage), allow(p.v_bytes.storage);
    allow(p.k_bytes.scale), allow(p.v_bytes.scale);
  }
  for (size_t i = 0, end; i < p.table.size(); i = end + 1) {
    for (end = i; end < p.table.size() && p.is_kept[end];) ++end;
    if (end > i) allow_global(p.table.data() + i, (end - i) * sizeof(int));
  }
}

std::string run_decode(DecodeInstance const& instance, DecodeParams const& p, uint32_t seed, Report& report) {
  sm90::DecodeArgs args;
  args.p = p;
  char const* const wrong = instance.gathered ? nullptr : make_decode_maps(p, args);
  if (wrong) return wrong;
  if (p.new_k) {
    int const rows = instance.append_threads / 32;  // of a block
    int64 const new_rows = p.new_keys < 0 ? p.seqlen_q : p.batch * p.new_keys;
    run_grid(
        instance.append_threads, (new_rows * p.heads_kv + rows - 1) / rows, seed, [&] { instance.append(p); }, report);
    if (!report.error.empty()) return report.error;
  }
  auto const kernel = [&] { instance.gathered ? instance.gathered(p) : instance.kernel(args); };
  run_grid(instance.threads, p.tiles * p.splits * p.heads_kv, seed, kernel, report, p.new_k != nullptr);
  if (p.splits > 1 && report.error.empty()) {
    int const outputs = instance.combine_threads / 32;  // of a block
    int64 const blocks = (sm90::rows_of(p) * p.heads_q + outputs - 1) / outputs;
    run_grid(instance.combine_threads, blocks, seed, [&] { instance.combine(p); }, report, true);
  }
  return report.error;
}

std::string check_decode(DecodeInstance const& instance, DecodeCase const& c, Report& report) {
  DecodeProblem p = make_problem(instance.shape, c);
  if (p.q.rows == 0) return "";  // the host code launches nothing
  allow_tensors(p);
  auto const before = std::pair{p.k.storage, p.v.storage};
  std::string wrong = run_decode(instance, params_of(p), c.seed, report);
  if (wrong.empty()) wrong = compare_stored(p, before.first, before.second);
  return wrong.empty() ? compare(p) : wrong;
}

}  // namespace fa::emu
