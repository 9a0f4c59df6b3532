// Random problems: sizes that fill blocks fully, partly or not at all, every mask, and every layout in memory.
#include "problem.h"

#include <algorithm>
#include <cmath>

namespace fa {

// As host.cu does: a dimension of size 1 is never stepped over, so any valid stride will do for it.
bool encode(sm90::TensorMap& map, View const& x, int64, int box_rows) {
  auto const bytes = [](int64 size, int64 stride) { return size == 1 ? 16 : stride * 2; };
  Strides const& s = x.strides;
  map = {const_cast<void*>(x.data),
         {x.columns, x.rows, x.heads, x.batch},
         {2, bytes(x.rows, s.row), bytes(x.heads, s.head), bytes(x.batch, s.batch)},
         {64, box_rows, 1, 1}};
  return true;
}

}  // namespace fa

namespace fa::emu {

// ---- cases -----------------------------------------------------------------------------------------------------------
static int random_length(Random& random, Shape const& shape, int most_blocks) {
  if (random.one_in(12)) return 0;
  if (random.one_in(6)) return random.between(1, 3);
  if (random.one_in(4)) return shape.block_n * random.between(1, 3);  // exactly full blocks
  return random.between(1, most_blocks * shape.block_n);
}

static void add_terms(Random& random, Case& c) {
  int const one = random.between(0, 4);  // there at least
  auto const takes = [&](int term) { return term == one || random.one_in(4); };
  if (takes(0)) c.slopes = random.between(1, 2);
  if (takes(1)) c.dropout = random.between(1, 40000);
  if (c.is_packed) {
    c.slopes = std::max(c.slopes, int(c.dropout == 0));
    return;
  }
  if (takes(2)) c.documents = random.between(1, 5);
  // Blocks that segments keep whole, and the window in part.
  if (c.documents && c.left >= 0 && random.one_in(2)) c.documents = 1, c.right = -1;
  if (takes(3)) c.mask = 1 + random.between(0, 15);
  if (takes(4)) c.bias = 1 + random.between(0, 15);
  c.shares_ids = random.one_in(2);
  c.bias_is_float = random.one_in(2);
}

Case random_case(Shape const& shape, uint32_t seed) {
  Random random{std::mt19937(seed)};
  Case c{};
  c.seed = seed;
  c.is_packed = random.one_in(2);
  c.batch = c.is_packed ? random.between(1, 4) : random.between(1, 2);
  c.heads_kv = random.between(1, 2);
  c.group = random.one_in(3) ? random.between(2, 3) : 1;
  c.d_qk = random.one_in(2) ? shape.d_qk : random.between(1, shape.d_qk / 8) * 8;
  c.d_v = random.one_in(2) ? shape.d_v : random.between(1, shape.d_v / 8) * 8;
  int const s_q = random_length(random, shape, 3);
  int const s_kv = random.one_in(3) ? s_q : random_length(random, shape, 6);
  for (int n = 0; n < c.batch; ++n) {
    c.s_q.push_back(c.is_packed ? random_length(random, shape, 3) / 2 : s_q);
    c.s_kv.push_back(c.is_packed ? (random.one_in(3) ? c.s_q[n] : random_length(random, shape, 4)) : s_kv);
  }
  c.left = c.right = -1;
  if (shape.has_band && !random.one_in(8)) {
    if (random.one_in(2)) c.left = random.between(0, random.one_in(2) ? 4 : 200);
    if (!random.one_in(4)) c.right = random.one_in(2) ? 0 : random.between(0, random.one_in(2) ? 4 : 100);
  }
  c.lower_right = !random.one_in(3);
  c.scale = float(random.between(1, 4) / std::sqrt(c.d_qk));
  c.softcap = shape.has_softcap && !(shape.has_terms && random.one_in(2)) ? random.between(1, 8) : 0;
  c.sinks = random.one_in(2) ? 0 : random.between(1, 2);
  c.heads_first = !c.is_packed && random.one_in(2);
  c.padding = random.between(0, 2);
  c.blocks = random.between(1, 3);
  c.heads_per_pass = random.between(1, 3) * c.group;
  c.has_equal_keys = !shape.has_terms && random.one_in(5);
  if (shape.has_terms) add_terms(random, c);
  return c;
}

double huge_element(std::mt19937& engine) { return std::ldexp(int(engine() % 5) - 2, 10); }

std::string describe(Case const& c) {
  std::string lengths;
  for (int n = 0; n < c.batch && (c.is_packed || n == 0); ++n) {
    lengths += " " + std::to_string(c.s_q[n]) + "x" + std::to_string(c.s_kv[n]);
  }
  return "seed " + std::to_string(c.seed) + (c.is_packed ? " packed" : " dense B " + std::to_string(c.batch)) +
         ", S_q x S_kv" + lengths + ", H_kv " + std::to_string(c.heads_kv) + " G " + std::to_string(c.group) + ", D " +
         std::to_string(c.d_qk) + "/" + std::to_string(c.d_v) + ", band (" + std::to_string(c.left) + ", " +
         std::to_string(c.right) + ") " + (c.lower_right ? "lower right" : "upper left") + ", softcap " +
         std::to_string(static_cast<int>(c.softcap)) + ", sinks " + std::to_string(c.sinks) + ", blocks " +
         std::to_string(c.blocks) + (c.has_equal_keys ? ", equal keys" : "") + ", slopes " + std::to_string(c.slopes) +
         ", documents " + std::to_string(c.documents) + ", mask " + std::to_string(c.mask) + ", bias " +
         std::to_string(c.bias) + ", dropout " + std::to_string(c.dropout);
}

// ---- tensors ---------------------------------------------------------------------------------------------------------
Tensor make_tensor(int batch, int rows, int heads, int columns, bool heads_first, int padding, uint16_t fill) {
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

bool sees(Case const& c, int n, int i, int j) {
  int const beyond = j - (i + (c.lower_right ? c.s_kv[n] - c.s_q[n] : 0));
  return (c.left < 0 || beyond >= -c.left) && (c.right < 0 || beyond <= c.right);
}

// ---- terms -----------------------------------------------------------------------------------------------------------
// The random bits of fastattn/rng.py, from its docstring.
static int random_bits(std::vector<int64> const& rng_state, uint64 head, int i, int j) {
  uint64 const low = 0xffffffffu;
  uint64 counter[4] = {uint64(i), uint64((j / 32) * 4 + (j % 8) / 2), head, uint64(rng_state[1]) & low};
  uint64 key[2] = {uint64(rng_state[0]) & low, uint64(rng_state[0]) >> 32 & low};
  for (int round = 0; round < 7; ++round) {
    uint64 const a = counter[0] * 0xD2511F53u, b = counter[2] * 0xCD9E8D57u;
    uint64 const next[4] = {(b >> 32) ^ counter[1] ^ key[0], b & low, (a >> 32) ^ counter[3] ^ key[1], a & low};
    std::copy(next, next + 4, counter);
    key[0] = (key[0] + 0x9E3779B9u) & low, key[1] = (key[1] + 0xBB67AE85u) & low;
  }
  return int(counter[j % 32 / 8] >> (16 * (j % 2)) & 0xffff);
}

bool Problem::keeps(int n, int h, int i, int j) const {
  if (!sees(c, n, i, j)) return false;
  int64 const of = c.shares_ids ? 0 : n;
  if (c.documents && ids_q[of * q.rows + i] != ids_kv[of * k.rows + j]) return false;
  if (c.mask && mask.at(n, h, i, j) == 0) return false;
  return !(c.bias && bias.at(n, h, i, j) == -INFINITY);
}

double Problem::added(int n, int h, int i, int j) const {
  int const distance = std::abs(j - i - (c.lower_right ? c.s_kv[n] - c.s_q[n] : 0));
  double const alibi = c.slopes ? -double{slopes[(c.slopes == 2 ? n * q.heads : 0) + h]} * distance : 0;
  return alibi + (c.bias ? bias.at(n, h, i, j) : 0);
}

double Problem::factor(int n, int h, int i, int j) const {
  if (!c.dropout) return 1;
  bool const is_left = random_bits(rng_state, uint64(n * q.heads + h), i, j) >= c.dropout;
  return is_left ? 65536. / (65536 - c.dropout) : 0;
}

static PerPair draw_pairs(int shared, std::mt19937& engine, int64 batch, int64 heads, int64 rows_q, int64 rows_kv) {
  PerPair x{{}, {batch, heads, rows_q, rows_kv}, {}};
  int64* const strides[4] = {&x.strides.batch, &x.strides.head, &x.strides.query, &x.strides.key};
  int64 step = 1;
  bool const is_transposed = engine() % 2;
  for (int d : {is_transposed ? 2 : 3, is_transposed ? 3 : 2, 1, 0}) {
    if ((shared - 1) >> d & 1) continue;
    *strides[d] = step, step *= x.sizes[d];
  }
  x.values.resize(static_cast<size_t>(std::max<int64>(step, 1)));
  return x;
}

static void draw_ids(std::vector<int64>& ids, int rows, int count, int documents, std::mt19937& engine) {
  for (int n = 0; n < count; ++n) {
    int64 const far = int64{1} << 40;  // ids have 64 bits
    bool const is_sorted = engine() % 4;
    for (int i = 0; i < rows; ++i) {
      ids.push_back(far * (is_sorted ? i * documents / rows : int(engine() % unsigned(documents))));
    }
  }
}

static void draw_terms(Problem& p, int rows_q, int rows_kv) {
  Case const& c = p.c;
  if (!p.shape.has_terms) return;
  std::mt19937 engine(c.seed + 3);
  std::normal_distribution<double> normal;
  int const heads = c.heads_kv * c.group;
  for (int i = 0; i < (c.slopes == 2 ? c.batch : c.slopes) * heads; ++i)
    p.slopes.push_back(std::ldexp(1.f, -i % 7 - 1));
  if (c.dropout) p.rng_state = {int64(uint64(engine()) << 32 | engine()), int64(engine())};
  if (c.documents) {
    int const count = c.shares_ids ? 1 : c.batch;
    draw_ids(p.ids_q, rows_q, count, c.documents, engine), draw_ids(p.ids_kv, rows_kv, count, c.documents, engine);
    p.ranges_q.assign(static_cast<size_t>(count * (rows_q + 63) / 64 * 4 + 4 * count + 4), 1 << 28);
    p.ranges_kv.assign(static_cast<size_t>(count * (rows_kv + 63) / 64 * 4 + 4 * count + 4), 1 << 28);
  }
  if (c.mask) {
    p.mask = draw_pairs(c.mask, engine, c.batch, heads, rows_q, rows_kv);
    for (float& x : p.mask.values) p.mask_bytes.push_back(static_cast<uint8>(x = engine() % 4 != 0));
  }
  if (c.bias) {
    p.bias = draw_pairs(c.bias, engine, c.batch, heads, rows_q, rows_kv);
    for (float& x : p.bias.values) {
      p.bias_words.push_back(p.encode(engine() % 8 ? normal(engine) : -INFINITY));
      x = p.value[p.bias_words.back()];
    }
  }
  if (!(c.documents || c.mask || c.bias)) return;
  p.k_copy = make_tensor(c.batch, rows_kv, c.heads_kv, c.d_qk, false, 0, p.encode(NAN));
  p.v_copy = make_tensor(c.batch, rows_kv, c.heads_kv, c.d_v, false, 0, p.encode(NAN));
}

// 16 bytes divide the address of what is read in pieces of 16.
static int32* aligned(std::vector<int32>& x) {
  return x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / 4;
}

Problem make_problem(Shape const& shape, Case const& c) {
  Problem p{};
  p.shape = shape, p.c = c, p.cu_q = p.cu_kv = {0}, p.value = decoder(shape.is_half);
  for (int n = 0; n < c.batch; ++n) p.cu_q.push_back(p.cu_q[n] + c.s_q[n]), p.cu_kv.push_back(p.cu_kv[n] + c.s_kv[n]);
  int const batch = p.batch(), heads_q = c.heads_kv * c.group;
  int const rows_q = c.is_packed ? p.cu_q.back() : c.s_q[0], rows_kv = c.is_packed ? p.cu_kv.back() : c.s_kv[0];
  draw_terms(p, rows_q, rows_kv);
  uint16_t const nan = p.encode(NAN);
  p.q = make_tensor(batch, rows_q, heads_q, c.d_qk, c.heads_first, c.padding, nan);
  p.k = make_tensor(batch, rows_kv, c.heads_kv, c.d_qk, c.heads_first, c.padding, nan);
  p.v = make_tensor(batch, rows_kv, c.heads_kv, c.d_v, c.heads_first, c.padding, nan);
  std::mt19937 engine(c.seed + 1);
  std::normal_distribution<double> normal;
  auto const fill = [&](Tensor& t, int b, int row) {
    bool const is_huge = c.has_equal_keys && &t != &p.v;
    for (int h = 0; h < t.heads; ++h)
      for (int d = 0; d < t.columns; ++d)
        t.at(b, row, h, d) = p.encode(is_huge ? huge_element(engine) : normal(engine));
  };
  int first = -1;  // the first key that is seen, which others equal
  for (int n = 0; n < c.batch; ++n) {
    int const b = p.of(n), q0 = p.first_q(n), kv0 = p.first_kv(n);
    for (int i = 0; i < c.s_q[n]; ++i) fill(p.q, b, q0 + i);
    for (int j = 0; j < c.s_kv[n]; ++j) {  // rows that nobody sees stay NaN
      bool is_seen = false;
      for (int h = 0; h < heads_q && !is_seen; ++h)
        for (int i = 0; i < c.s_q[n] && !is_seen; ++i) is_seen = p.keeps(n, h, i, j);
      if (!is_seen) continue;
      fill(p.k, b, kv0 + j), fill(p.v, b, kv0 + j);
      if (first < 0) first = kv0 + j;
      for (int h = 0; c.has_equal_keys && h < p.k.heads; ++h)
        for (int d = 0; d < p.k.columns; ++d) p.k.at(b, kv0 + j, h, d) = p.k.at(0, first, h, d);
    }
  }
  for (int i = 0; c.sinks && i < (c.sinks == 2 ? c.batch : 1) * heads_q; ++i)
    p.sinks.push_back(float(2 * normal(engine)));
  return p;
}

void fill_terms(Problem& p, TermTensors& tensors, TermNumbers& numbers) {
  Case const& c = p.c;
  numbers.has_terms = p.shape.has_terms;
  numbers.dropout_scale = 1;
  if (!p.shape.has_terms) return;
  numbers.dropout_threshold = c.dropout, numbers.dropout_scale = 65536. / (65536 - c.dropout);
  if (c.dropout) tensors.rng_state = p.rng_state.data();
  if (c.slopes) tensors.alibi_slopes = p.slopes.data(), numbers.slopes_batch_stride = c.slopes == 2 ? p.q.heads : 0;
  if (c.documents) {
    tensors.segment_ids_q = p.ids_q.data(), tensors.segment_ids_kv = p.ids_kv.data();
    numbers.ids_q_batch_stride = c.shares_ids ? 0 : p.q.rows, numbers.ids_kv_batch_stride = c.shares_ids ? 0 : p.k.rows;
    tensors.ranges_q = aligned(p.ranges_q), tensors.ranges_kv = aligned(p.ranges_kv);
  }
  if (c.mask) tensors.mask = p.mask_bytes.data(), numbers.mask_strides = p.mask.strides;
  if (c.bias) {
    tensors.bias = c.bias_is_float ? static_cast<void const*>(p.bias.values.data()) : p.bias_words.data();
    numbers.bias_strides = p.bias.strides, numbers.bias_is_float = c.bias_is_float;
  }
  if (!(c.documents || c.mask || c.bias)) return;
  tensors.given_k = p.k.data, tensors.given_v = p.v.data;
  numbers.given_k_strides = p.k.strides, numbers.given_v_strides = p.v.strides;
}

void allow_terms(Problem& p) {
  auto const allow = [](auto const& x) { allow_global(x.data(), x.size() * sizeof(x[0])); };
  allow(p.slopes), allow(p.ids_q), allow(p.ids_kv), allow(p.mask_bytes), allow(p.bias.values), allow(p.bias_words);
  allow(p.rng_state), allow(p.ranges_q), allow(p.ranges_kv);
  for (Tensor* x : {&p.k, &p.v, &p.k_copy, &p.v_copy}) allow(x->storage);
}

void find_kept_keys(Problem const& p, int64& begin, int64& end) {
  begin = 0, end = p.k.rows;
  if (p.c.is_packed) return;
  auto const seen = [&](int64 j) {
    for (int i = 0; i < p.c.s_q[0]; ++i)
      if (sees(p.c, 0, i, static_cast<int>(j))) return true;
    return false;
  };
  while (begin < end && !seen(begin)) ++begin;
  while (begin < end && !seen(end - 1)) --end;
}

}  // namespace fa::emu
