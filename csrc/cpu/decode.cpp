// The kernel, compiled once for each instruction set, whose name is FA_MACHINE.
//
// Nothing of the standard C++ library, and no function that other files see (decode.h says why).
#define FA_EVERYWHERE static inline
#include "decode.h"
#include "tree.h"
#include "vector.h"

namespace {

using namespace fa::cpu;
using fa::Range;

constexpr float kNever = -__builtin_inff();

// Where the keys and values of a block lie.
struct Block {
  int begin, keys;
  int64 page[kKeys], row[kKeys];
};

Block block_at(Params const& p, Sequence const& s, Range span) {
  Block block;
  block.begin = span.begin;
  block.keys = span.end - span.begin;
  int64 const page_size = p.page_size;
  for (int j = 0; j < block.keys; ++j) {
    int64 const position = fa::larger(span.begin + j, s.first_key);
    block.page[j] = page_of(s, position, page_size);
    block.row[j] = s.pages ? position % page_size : position;
  }
  return block;
}

constexpr int kMaxDim = 512;
alignas(64) constexpr char kZeros[kMaxDim * sizeof(float)] = {};

// Rows of one head of the cache; zeros stand for those beyond the last key, so that always as many can be read.
template <class T>
struct Rows {
  T const* at[kAtOnce];

  Rows(void const* cache, Strides const& strides, Block const& block, int j, int head) {
    for (int x = 0; x < kAtOnce; ++x)
      at[x] = j + x < block.keys ? static_cast<T const*>(cache) + block.page[j + x] * strides.batch +
                                       block.row[j + x] * strides.row + head * strides.head
                                 : reinterpret_cast<T const*>(kZeros);
  }

  void prefetch(int dim) const {
    for (T const* row : at)
      for (int c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
  }
};

// Calls step(c, read) for each vector of columns from c on; read(row) is that of a row, zeros beyond the head dim.
template <class Step>
inline void for_columns(int dim, Step const& step) {
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) step(c, [=](auto const* row) { return load(row + c); });
  if (c < dim) step(c, [=](auto const* row) { return load_some(row + c, dim - c); });
}

// Scores of ROWS query rows and kAtOnce keys.
template <int ROWS, class T>
inline void multiply_queries(float const* q, Rows<T> const& k, int dim, float* scores) {
  Floats sums[ROWS][kAtOnce] = {};
  for_columns(dim, [&](int c, auto const& read) {
    Floats keys[kAtOnce];
    for (int n = 0; n < kAtOnce; ++n) keys[n] = read(k.at[n]);
    for (int r = 0; r < ROWS; ++r) {
      Floats const query = load(q + r * padded(dim) + c);
      for (int n = 0; n < kAtOnce; ++n) sums[r][n] += query * keys[n];
    }
  });
  for (int r = 0; r < ROWS; ++r) store_sums(sums[r], scores + r * kKeys);
}

// Adds the values of kAtOnce keys to the sums of ROWS query rows, by their weights.
template <int ROWS, class T>
inline void add_values(float const* weights, Rows<T> const& v, int dim, float* sums) {
  for_columns(dim, [&](int c, auto const& read) {
    Floats values[kAtOnce];
    for (int n = 0; n < kAtOnce; ++n) values[n] = read(v.at[n]);
    for (int r = 0; r < ROWS; ++r) {
      float* const at = sums + r * padded(dim) + c;
      Floats total = load(at);
      for (int n = 0; n < kAtOnce; ++n) total += weights[r * kKeys + n] * values[n];
      store(at, total);
    }
  });
}

constexpr int kRowsAtOnce = kLanes == 16 ? 4 : 2;  // of queries: their sums have to fit into registers

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls step(how many, row, j, rows of the cache) for every group of query rows and of keys, in the order in which the
// keys lie in memory.
template <class T, class Step>
inline void for_groups(Params const& p, Sequence const& s, Block const& block, void const* cache,
                       Strides const& strides, int dim, Step const& step) {
  int const per_head = s.rows / int(p.heads_kv);
  for (int j = 0; j < block.keys; j += kAtOnce)
    for (int head = 0; head < p.heads_kv; ++head) {
      Rows<T> const rows(cache, strides, block, j, head);
      // Numbers of half the width come from memory more slowly than they are worked on; those of 4 bytes do not.
      if (sizeof(T) < 4 && j + kAtOnce < block.keys) Rows<T>(cache, strides, block, j + kAtOnce, head).prefetch(dim);
      int row = head * per_head, end = row + per_head;
      for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) step(Count<kRowsAtOnce>{}, row, j, rows);
      for (; row < end; ++row) step(Count<1>{}, row, j, rows);
    }
}

template <class T>
void score_block(Params const& p, Sequence const& s, Block const& block, Scratch const& scratch) {
  int const dim = int(p.head_dim_qk);
  for_groups<T>(p, s, block, p.k_cache, p.k_strides, dim, [&](auto count, int row, int j, Rows<T> const& keys) {
    multiply_queries<count.value>(scratch.queries + row * padded(dim), keys, dim, scratch.scores + row * kKeys + j);
  });
}

template <class T>
void add_block(Params const& p, Sequence const& s, Block const& block, Scratch const& scratch, Part const& part) {
  int const dim = int(p.head_dim_v);
  for_groups<T>(p, s, block, p.v_cache, p.v_strides, dim, [&](auto count, int row, int j, Rows<T> const& values) {
    add_values<count.value>(scratch.scores + row * kKeys + j, values, dim, part.sums + row * padded(dim));
  });
}

// ALiBi and the mask of a row of a tree, whose bits take the place of the right side of the band.
void finish_in_tree(Params const& p, Sequence const& s, Block const& block, int head, int i, float* scores) {
  Tree const tree = tree_of(p, s);
  float const slope = p.slopes ? p.slopes[s.b * p.slopes_stride + head] : 0;
  for (int j = 0; j < block.keys; ++j) {
    int const key = block.begin + j, away = tree.depths ? tree.place(key) - tree.diagonal(i) : 0;
    if (p.slopes) scores[j] -= slope * __builtin_fabsf(float(away));
    if (key < s.first_key || away < -s.band.left || !tree.sees(i, key)) scores[j] = kNever;
  }
  for (int j = block.keys; j < kKeys; ++j) scores[j] = kNever;
}

// What the spec does with a score after the product: cap, bias, ALiBi, the band.
void finish_scores(Params const& p, Sequence const& s, Block const& block, int head, int i, float* scores) {
  if (p.k_scale)
    for (int j = 0; j < block.keys; ++j)
      scores[j] *= p.k_scale[block.page[j] * p.k_scale_stride + head / (p.heads_q / p.heads_kv)];
  if (p.softcap > 0)
    for (int j = 0; j < block.keys; ++j) scores[j] = float(p.softcap) * __builtin_tanhf(scores[j] / float(p.softcap));
  if (p.bias) {
    float const* bias =
        p.bias + s.b * p.bias_batch + head * p.bias_head + (s.first_query + i) * p.bias_row + block.begin * p.bias_key;
    for (int j = 0; j < block.keys; ++j) scores[j] += bias[j * p.bias_key];
  }
  if (p.tree) return finish_in_tree(p, s, block, head, i, scores);
  if (p.slopes) {
    float const slope = p.slopes[s.b * p.slopes_stride + head];
    int const diagonal = s.band.diagonal + i;
    for (int j = 0; j < block.keys; ++j) scores[j] -= slope * __builtin_fabsf(float(block.begin + j - diagonal));
  }
  Range const kept = fa::tile_range(s.band, i, i + 1);
  for (int j = 0; j < block.keys; ++j)
    if (!fa::contains(kept, block.begin + j)) scores[j] = kNever;
  for (int j = block.keys; j < kKeys; ++j) scores[j] = kNever;
}

bool has_nan(float const* scores) {
  bool found = false;
  for (int j = 0; j < kKeys; ++j) found |= scores[j] != scores[j];
  return found;
}

// Scores become weights; the sums of the row so far are brought to its new largest score. NaN is passed on.
void soften(float* scores, int row, int64 width, Part const& part) {
  Floats most = load(scores);
  for (int j = kLanes; j < kKeys; j += kLanes) most = larger(most, load(scores + j));
  float const before = part.most[row];
  float after = __builtin_fmaxf(before, largest(most));
  if (after == kNever) {  // nothing kept so far, or nothing that has an order
    if (!has_nan(scores)) {
      for (int j = 0; j < kKeys; ++j) scores[j] = 0;
      return;
    }
    after = 0;
  }
  Floats total{};
  for (int j = 0; j < kKeys; j += kLanes) {
    Floats const weight = exponential(load(scores + j) - after);
    total += weight;
    store(scores + j, weight);
  }
  float const kept = __builtin_expf(before - after);
  part.total[row] = part.total[row] * kept + sum(total);
  part.most[row] = after;
  if (kept == 1) return;
  for (int64 c = row * width; c < (row + 1) * width; c += kLanes) store(part.sums + c, load(part.sums + c) * kept);
}

void weigh_block(Params const& p, Sequence const& s, Block const& block, Scratch const& scratch, Part const& part) {
  for (int row = 0; row < s.rows; ++row) {
    int const head = row / s.band.s_q, i = row % s.band.s_q;
    float* scores = scratch.scores + row * kKeys;
    finish_scores(p, s, block, head, i, scores);
    soften(scores, row, padded(p.head_dim_v), part);
    if (p.v_scale)
      for (int j = 0; j < block.keys; ++j)
        scores[j] *= p.v_scale[block.page[j] * p.v_scale_stride + head / (p.heads_q / p.heads_kv)];
  }
}

template <class T>
void read_queries(Params const& p, Sequence const& s, float* queries) {
  int64 const first =
      p.cu_seqlens_q ? s.first_row * p.q_strides.row : s.b * p.q_strides.batch + s.first_query * p.q_strides.row;
  T const* const q = static_cast<T const*>(p.q) + first;
  int const dim = int(p.head_dim_qk);
  for (int row = 0; row < s.rows; ++row) {
    T const* from = q + row % s.band.s_q * p.q_strides.row + row / s.band.s_q * p.q_strides.head;
    for (int c = 0; c < dim; c += kLanes)
      store(queries + row * padded(dim) + c,
            (c + kLanes <= dim ? load(from + c) : load_some(from + c, dim - c)) * float(p.scale));
  }
}

template <class T>
void attend_to(Params const& p, Sequence const& s, Range keys, Scratch const& scratch, Part const& part) {
  for (int begin = keys.begin; begin < keys.end; begin += kKeys) {
    Block const block = block_at(p, s, {begin, fa::smaller(begin + kKeys, keys.end)});
    score_block<T>(p, s, block, scratch);
    weigh_block(p, s, block, scratch, part);
    add_block<T>(p, s, block, scratch, part);
  }
}

void attend(Params const& p, Sequence const& s, Range keys, Scratch scratch, Part part) {
  for (int64 n = 0; n < s.rows * padded(p.head_dim_v); ++n) part.sums[n] = 0;
  for (int row = 0; row < s.rows; ++row) {
    part.most[row] = kNever;
    part.total[row] = 0;
  }
  switch (p.dtype) {
    case kFloat32: read_queries<float>(p, s, scratch.queries); break;
    case kBfloat16: read_queries<Bfloat16>(p, s, scratch.queries); break;
    default: read_queries<Float16>(p, s, scratch.queries);
  }
  switch (p.cache_dtype) {
    case kFloat32: return attend_to<float>(p, s, keys, scratch, part);
    case kBfloat16: return attend_to<Bfloat16>(p, s, keys, scratch, part);
    case kFloat16: return attend_to<Float16>(p, s, keys, scratch, part);
    default: return attend_to<Float8>(p, s, keys, scratch, part);
  }
}

template <class T>
void write_row(float* sums, int dim, float factor, T* out) {
  for (int c = 0; c < dim; ++c) round_to(sums[c] * factor, out + c);
}

// One query row: its parts added up, brought to one largest score. The sink is a weight without a value.
void join_row(Params const& p, Sequence const& s, float* parts, int count, int row) {
  int const head = row / s.band.s_q, i = row % s.band.s_q, dim = int(p.head_dim_v);
  int64 const width = padded(dim), step = part_floats(s.rows, dim);
  float most = p.sinks ? p.sinks[s.b * p.sinks_stride + head] : kNever;
  float const sink = most;
  auto const part = [&](int n) { return part_at(parts + n * step, s.rows, dim); };
  for (int n = 0; n < count; ++n) most = __builtin_fmaxf(most, part(n).most[row]);
  float total = most == kNever ? 0 : __builtin_expf(sink - most);
  float sums[kMaxDim] = {};
  for (int n = 0; n < count && most != kNever; ++n) {
    float const kept = __builtin_expf(part(n).most[row] - most);
    total += kept * part(n).total[row];
    float const* const from = part(n).sums + row * width;
    for (int c = 0; c < width; c += kLanes) store(sums + c, load(sums + c) + kept * load(from + c));
  }
  int64 const at = ((s.first_row + i) * p.heads_q + head) * dim;
  float const factor = most == kNever ? 0 : 1 / total;
  switch (p.dtype) {
    case kFloat32: write_row(sums, dim, factor, static_cast<float*>(p.out) + at); break;
    case kBfloat16: write_row(sums, dim, factor, static_cast<Bfloat16*>(p.out) + at); break;
    default: write_row(sums, dim, factor, static_cast<Float16*>(p.out) + at);
  }
  int64 const lse_at =
      p.cu_seqlens_q ? head * p.rows_q + s.first_row + i : (s.b * p.heads_q + head) * p.rows_q + s.first_query + i;
  p.lse[lse_at] = most == kNever ? kNever : most + __builtin_logf(total);
}

void join(Params const& p, Sequence const& s, float* parts, int count) {
  for (int row = 0; row < s.rows; ++row) join_row(p, s, parts, count, row);
}

}  // namespace

#define FA_JOIN(machine) fa_decode_##machine
#define FA_NAME(machine) FA_JOIN(machine)

extern "C" __attribute__((visibility("hidden"))) fa::cpu::Decode const* FA_NAME(FA_MACHINE)() {
  static constexpr Decode kernels{attend, join};
  return &kernels;
}
