// Random problems: sizes that fill blocks fully, partly or not at all, every mask, and every layout in memory.
#include "problem.h"

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
  c.softcap = shape.has_softcap ? random.between(1, 8) : 0;
  c.sinks = random.one_in(2) ? 0 : random.between(1, 2);
  c.heads_first = !c.is_packed && random.one_in(2);
  c.padding = random.between(0, 2);
  c.blocks = random.between(1, 3);
  c.heads_per_pass = random.between(1, 3) * c.group;
  c.has_equal_keys = random.one_in(5);
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
         std::to_string(c.blocks) + (c.has_equal_keys ? ", equal keys" : "");
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

Problem make_problem(Shape const& shape, Case const& c) {
  Problem p{shape, c, {}, {}, {}, {}, {0}, {0}, decoder(shape.is_half)};
  for (int n = 0; n < c.batch; ++n) p.cu_q.push_back(p.cu_q[n] + c.s_q[n]), p.cu_kv.push_back(p.cu_kv[n] + c.s_kv[n]);
  int const batch = p.batch(), heads_q = c.heads_kv * c.group;
  int const rows_q = c.is_packed ? p.cu_q.back() : c.s_q[0], rows_kv = c.is_packed ? p.cu_kv.back() : c.s_kv[0];
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
      for (int i = 0; i < c.s_q[n]; ++i) is_seen = is_seen || sees(c, n, i, j);
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
