// The kernel, compiled once for each instruction set, whose name is FA_MACHINE.
//
// Nothing of the standard C++ library, and no function that other files see (decode.h says why).
#define FA_EVERYWHERE static inline
#include "decode.h"
#include "decode_products.h"
#include "tree.h"

namespace {

using fa::Range;

constexpr float kNever = -__builtin_inff(), kHidden = -0.0f;  // scores and weights of keys that a row does not keep
constexpr int kMaxDim = 512;
alignas(64) constexpr char kZeros[kMaxDim * sizeof(float)] = {};

// --- where the keys and values of a block lie

// Rows of head 0. What follows the last key are zeros, so that whole groups can be read.
struct Block {
  int begin, keys;
  int64 page[kKeys];
  char const *k[kKeys], *v[kKeys];
};

// Rows that follow each other in memory: as many addresses as a block has keys, whether it has so many or not.
void put_in_turn(char const* first, int64 step, char const* (&rows)[kKeys]) {
  Longs at = lane_numbers<double>() * step + reinterpret_cast<int64>(first);
  for (int j = 0; j < kKeys; j += kCount<double>, at += kCount<double> * step)
    __builtin_memcpy(rows + j, &at, sizeof at);
}

void look_up(Params const& p, Sequence const& s, Range span, Block& block) {
  constexpr int64 kBytes[] = {4, 2, 2, 1};  // by Dtype
  int64 const bytes = kBytes[p.cache_dtype];
  Strides const of_k = p.k_strides, of_v = p.v_strides;  // copies: what is stored below might be their numbers
  block.begin = span.begin;
  block.keys = fa::larger(0, span.end - span.begin);
  if (!s.pages && block.keys && span.begin >= s.first_key) {
    put_in_turn(static_cast<char const*>(p.k_cache) + (s.b * of_k.batch + span.begin * of_k.row) * bytes,
                of_k.row * bytes, block.k);
    put_in_turn(static_cast<char const*>(p.v_cache) + (s.b * of_v.batch + span.begin * of_v.row) * bytes,
                of_v.row * bytes, block.v);
    for (int64& page : block.page) page = s.b;
    return;
  }
  for (int j = 0; j < block.keys; ++j) {
    int64 const position = fa::larger(span.begin + j, s.first_key), page = page_of(s, position, p.page_size);
    int64 const row = s.pages ? position % p.page_size : position;
    block.page[j] = page;
    block.k[j] = static_cast<char const*>(p.k_cache) + (page * of_k.batch + row * of_k.row) * bytes;
    block.v[j] = static_cast<char const*>(p.v_cache) + (page * of_v.batch + row * of_v.row) * bytes;
  }
}

// Rows of one head, from key j on.
template <class T, int COUNT>
struct Rows {
  T const* at[COUNT];

  Rows(Block const& block, char const* const (&rows)[kKeys], int j, int64 offset) {
    int64 const bytes = offset * int64(sizeof(T));
    if (j + COUNT <= block.keys) {
      for (int n = 0; n < COUNT; n += kCount<double>) {
        Longs const some = loaded<Longs>(rows + j + n) + bytes;
        __builtin_memcpy(at + n, &some, sizeof some);
      }
      return;
    }
    for (int n = 0; n < COUNT; ++n)
      at[n] = reinterpret_cast<T const*>(j + n < block.keys ? rows[j + n] + bytes : kZeros);
  }
};

// Calls step(how many, row) for rows row .. end - 1, as many together as there are. A constant has no address.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class Step>
inline void for_rows(int row, int end, Step const& step) {
  for (; row + 4 <= end; row += 4) step(Count<4>{}, row);
  for (; row + 2 <= end; row += 2) step(Count<2>{}, row);
  for (; row < end; ++row) step(Count<1>{}, row);
}

// --- scores

// Adds columns c .. c + kStep - 1 of COUNT keys to their sums with ROWS query rows.
template <class Product, int ROWS, int COUNT, class T>
inline void add_products(float const* q, int64 width, T const* const* k, int64 c, Floats (&sums)[ROWS][COUNT]) {
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n) {
    if constexpr (Product::kIsPaired) {
      Floats const key = loaded<Floats>(k[n] + c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][n] = Product::multiply_add(load(q + r * width + c / 2), key, sums[r][n]);
    } else {
      Floats key[Product::kVectors];
      Product::read(k[n] + c, key);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int x = 0; x < Product::kVectors; ++x)
          sums[r][n] = Product::multiply_add(load(q + r * width + c + x * kLanes), key[x], sums[r][n]);
    }
  }
}

// Scores of ROWS query rows and kLanes keys, as many at a time as make one vector of sums. While keys are read, the
// next ones and what the other product reads next are brought from memory: neither product waits for memory.
template <class Product, int ROWS, class T>
__attribute__((noinline)) void multiply_queries(float const* q, T const* const* k, T const* const* next,
                                                T const* const* ahead, int dim, float* scores) {
  constexpr int kCount = kLanes / ROWS, kStep = Product::kStep;
  int64 const width = padded(dim);
  for (int j = 0; j < kLanes; j += kCount) {
    Floats sums[ROWS][kCount] = {};
    int64 c = 0;
    for (; c + kStep <= dim; c += kStep) {
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n) {
        prefetch_line(next[j + n] + c);
        prefetch_line(ahead[j + n] + c);
      }
      add_products<Product>(q, width, k + j, c, sums);
    }
    if (c < dim) {
      Ends<T, kCount, kStep> const ends(k + j, c, dim - c);
      add_products<Product>(q + (Product::kIsPaired ? c / 2 : c), width, ends.at, 0, sums);
    }
    Floats const found = sums_of(reinterpret_cast<Floats(&)[kLanes]>(sums));
    for (int r = 0; r < ROWS; ++r)
      __builtin_memcpy(scores + r * kKeys + j, reinterpret_cast<float const*>(&found) + r * kCount,
                       kCount * sizeof(float));
  }
}

template <class Product>
void score_block(Params const& p, Sequence const& s, Block const& block, Scratch const& scratch) {
  using T = typename Product::T;
  int const per_head = s.rows / int(p.heads_kv), dim = int(p.head_dim_qk);
  for (int j = 0; j < block.keys; j += kLanes)
    for (int head = 0; head < p.heads_kv; ++head) {
      Rows<T, kLanes> const keys(block, block.k, j, head * p.k_strides.head);
      Rows<T, kLanes> const next(block, block.k, j + kLanes, head * p.k_strides.head);
      Rows<T, kLanes> const values(block, block.v, j, head * p.v_strides.head);
      int const first = head * per_head;
      for_rows(first, first + per_head, [&](auto rows, int row) {
        multiply_queries<Product, rows.value>(scratch.queries + row * padded(dim), keys.at, next.at,
                                              row == first ? values.at : keys.at, dim,
                                              scratch.scores + row * kKeys + j);
      });
    }
}

// --- sums of values

// Adds the values of some keys, columns from c on, to the sums of ROWS query rows, by their weights.
template <class Product, int ROWS, int VECTORS, class T>
__attribute__((noinline)) void add_columns(float const* weights, T const* const* v, T const* const* ahead, int keys,
                                           int c, float* sums, int64 width) {
  Floats totals[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < VECTORS; ++x) totals[r][x] = load(sums + r * width + x * kLanes);
  for (int j = 0; j < keys; j += kTogether<Product>) {
    Floats values[VECTORS];
#pragma GCC unroll 4
    for (int x = 0; x < VECTORS; x += Product::kVectors) {
      int const column = c + x / Product::kVectors * Product::kStep;
#pragma GCC unroll 2
      for (int n = 0; n < kTogether<Product>; ++n) prefetch_line(ahead[j + n] + column);
      Product::read_values(v + j, column, reinterpret_cast<Floats(&)[Product::kVectors]>(values[x]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Floats const weight = broadcast(weights[r * kKeys + j / kTogether<Product>]);
#pragma GCC unroll 4
      for (int x = 0; x < VECTORS; ++x) totals[r][x] = Product::multiply_add(weight, values[x], totals[r][x]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < VECTORS; ++x) store(sums + r * width + x * kLanes, totals[r][x]);
}

template <class Product, int ROWS, class T>
inline void add_values(float const* weights, T const* const* v, T const* const* ahead, int keys, int dim, float* sums) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2, kColumns = kVectors / Product::kVectors * Product::kStep;
  int64 const width = padded(dim);
  int c = 0;
  for (; c + kColumns <= dim; c += kColumns)  // sums have to fit into registers
    add_columns<Product, ROWS, kVectors>(weights, v, ahead, keys, c, sums + c, width);
  for (; c + Product::kStep <= dim; c += Product::kStep)
    add_columns<Product, ROWS, Product::kVectors>(weights, v, ahead, keys, c, sums + c, width);
  if (c == dim) return;
  Ends<T, kKeys, Product::kStep> const ends(v, c, dim - c);
  add_columns<Product, ROWS, Product::kVectors>(weights, ends.at, ends.at, keys, 0, sums + c, width);
}

// Weights as one operand of the product, in place; what follows the last key weighs nothing.
template <class Product>
inline void pack_weights(float* weights) {
  if constexpr (Product::kIsPaired)
    for (int j = 0; j < kKeys; j += 2 * kLanes)
      store(weights + j / 2, Product::joined(load(weights + j), load(weights + j + kLanes)));
}

// The values that a row keeps, alone: what the others hold must not reach it.
template <class Product, class T>
void add_kept_values(float const* weights, T const* const* v, int keys, int dim, float* sums) {
  T const* kept[kKeys];
  alignas(64) float of_kept[kKeys] = {};
  for (T const*& row : kept) row = reinterpret_cast<T const*>(kZeros);
  int count = 0;
  for (int j = 0; j < keys; ++j) {
    if (weights[j] == 0 && __builtin_signbit(weights[j])) continue;
    kept[count] = v[j];
    of_kept[count++] = weights[j];
  }
  pack_weights<Product>(of_kept);
  add_values<Product, 1>(of_kept, kept, kept, count, dim, sums);
}

// `next` is the block whose keys are read after these values.
template <class Product>
void add_block(Params const& p, Sequence const& s, Block const& block, Block const& next, Scratch const& scratch,
               Part const& part, bool hides) {
  using T = typename Product::T;
  int const per_head = s.rows / int(p.heads_kv), dim = int(p.head_dim_v);
  for (int head = 0; head < p.heads_kv; ++head) {
    Rows<T, kKeys> const values(block, block.v, 0, head * p.v_strides.head);
    Rows<T, kKeys> const keys(next, next.k, 0, head * p.k_strides.head);
    int const first = head * per_head;
    for_rows(first, first + per_head, [&](auto rows, int row) {
      float* const weights = scratch.scores + row * kKeys;
      float* const sums = part.sums + row * padded(dim);
      for (int r = 0; r < rows.value; ++r) {
        if (hides) add_kept_values<Product>(weights + r * kKeys, values.at, block.keys, dim, sums + r * padded(dim));
        else pack_weights<Product>(weights + r * kKeys);
      }
      if (!hides)
        add_values<Product, rows.value>(weights, values.at, row == first ? keys.at : values.at, block.keys, dim, sums);
    });
  }
}

// --- from scores to weights

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
    for (int j = 0; j < kKeys; j += kLanes)
      store(scores + j, float(p.softcap) * hyperbolic_tangent(load(scores + j) / float(p.softcap)));
  if (p.bias) {
    float const* bias =
        p.bias + s.b * p.bias_batch + head * p.bias_head + (s.first_query + i) * p.bias_row + block.begin * p.bias_key;
    for (int j = 0; j < block.keys; ++j) {
      float const x = bias[j * p.bias_key];
      scores[j] = x == kNever ? kNever : scores[j] + x;
    }
  }
  if (p.tree) return finish_in_tree(p, s, block, head, i, scores);
  if (p.slopes) {
    float const slope = p.slopes[s.b * p.slopes_stride + head];
    int const diagonal = s.band.diagonal + i;
    for (int j = 0; j < block.keys; ++j) scores[j] -= slope * __builtin_fabsf(float(block.begin + j - diagonal));
  }
  Range const kept = fa::tile_range(s.band, i, i + 1);
  if (!fa::contains(kept, {block.begin, block.begin + block.keys}))
    for (int j = 0; j < block.keys; ++j) scores[j] = fa::contains(kept, block.begin + j) ? scores[j] : kNever;
  for (int j = block.keys; j < kKeys; ++j) scores[j] = kNever;
}

bool has_nan(float const* scores) {
  bool found = false;
  for (int j = 0; j < kKeys; ++j) found |= scores[j] != scores[j];
  return found;
}

constexpr float kToPower = float(kLog2E);

// Scores become weights; the sums of the row so far are brought to its new largest score. NaN is passed on. `hidden`
// counts the keys, lane by lane, that the row does not keep.
void soften(float* scores, int row, int64 width, Part const& part, Ints& hidden) {
  Floats const never = broadcast(kNever);
  Floats most = never;
  for (int j = 0; j < kKeys; j += kLanes) {
    Floats const score = load(scores + j);
    most = larger(score, most);
    hidden -= score == never;
  }
  float const before = part.most[row];
  float const found = largest(most);
  float after = found > before ? found : before;  // neither is NaN
  if (after == kNever) {  // nothing kept so far, or nothing that has an order
    if (!has_nan(scores)) {
      for (int j = 0; j < kKeys; ++j) scores[j] = kHidden;
      return;
    }
    after = 0;
  }
  Floats total{};
  for (int j = 0; j < kKeys; j += kLanes) {
    Floats const score = load(scores + j), weight = power_of_2<6>((score - after) * kToPower);
    total += weight;
    store(scores + j, score == never ? broadcast(kHidden) : weight);
  }
  float const kept = before == after ? 1 : power_of_2<6>(broadcast((before - after) * kToPower))[0];
  part.total[row] = part.total[row] * kept + sum(total);
  part.most[row] = after;
  if (kept == 1) return;
  for (int64 c = row * width; c < (row + 1) * width; c += kLanes) store(part.sums + c, load(part.sums + c) * kept);
}

// Products times `scale` become weights. Whether a row does not keep a key of the block.
bool weigh_block(Params const& p, Sequence const& s, Block const& block, float scale, Scratch const& scratch,
                 Part const& part) {
  Ints hidden{};
  for (int row = 0; row < s.rows; ++row) {
    int const head = row / s.band.s_q, i = row % s.band.s_q;
    float* scores = scratch.scores + row * kKeys;
    if (scale != 1)
      for (int j = 0; j < kKeys; j += kLanes) store(scores + j, load(scores + j) * scale);
    finish_scores(p, s, block, head, i, scores);
    soften(scores, row, padded(p.head_dim_v), part, hidden);
    if (!p.v_scale) continue;
    float const* const scale = p.v_scale + head / (p.heads_q / p.heads_kv);
    for (int j = 0; j < block.keys; ++j)
      if (scores[j] != 0) scores[j] *= scale[block.page[j] * p.v_scale_stride];
  }
  int64 found = 0;
  for (int n = 0; n < kLanes; ++n) found += hidden[n];
  return found != int64(s.rows) * (kKeys - block.keys);
}

template <class Q>
inline Q const* query_at(Params const& p, Sequence const& s, int row) {
  int64 const first =
      p.cu_seqlens_q ? s.first_row * p.q_strides.row : s.b * p.q_strides.batch + s.first_query * p.q_strides.row;
  return static_cast<Q const*>(p.q) + first + row % s.band.s_q * p.q_strides.row + row / s.band.s_q * p.q_strides.head;
}

template <class Q>
inline void read_query(Q const* from, int dim, float scale, float* to) {
  for (int c = 0; c < dim; c += kLanes)
    store(to + c, (c + kLanes <= dim ? load(from + c) : load_some(from + c, dim - c)) * scale);
}

// Rows of queries times `scale`, in the order in which keys are read.
void read_queries(Params const& p, Sequence const& s, float* queries) {
  int const dim = int(p.head_dim_qk);
  int64 const width = padded(dim);
  for (int row = 0; row < s.rows; ++row, queries += width) {
    float in_order[kMaxDim] = {};
    switch (p.dtype) {
      case kFloat32: read_query(query_at<float>(p, s, row), dim, float(p.scale), in_order); break;
      case kBfloat16: read_query(query_at<Bfloat16>(p, s, row), dim, float(p.scale), in_order); break;
      default: read_query(query_at<Float16>(p, s, row), dim, float(p.scale), in_order);
    }
    if (p.cache_dtype == kBfloat16) put_as_read<Spread<Bfloat16>>(in_order, width, queries);
    else __builtin_memcpy(queries, in_order, width * sizeof(float));
  }
}

// Rows of queries as they are given.
template <class Q>
void copy_queries(Params const& p, Sequence const& s, float* queries) {
  int64 const width = padded(p.head_dim_qk);
  for (int row = 0; row < s.rows; ++row) {
    __builtin_memset(queries + row * width, 0, width * sizeof(float));
    __builtin_memcpy(queries + row * width, query_at<Q>(p, s, row), p.head_dim_qk * sizeof(Q));
  }
}

template <class Product>
void attend_with(Params const& p, Sequence const& s, Range keys, Scratch const& scratch, Part const& part) {
  float const scale = Product::kIsPaired ? float(p.scale) : 1;
  Block blocks[2];
  look_up(p, s, {keys.begin, fa::smaller(keys.begin + kKeys, keys.end)}, blocks[0]);
  for (int begin = keys.begin, n = 0; begin < keys.end; begin += kKeys, n ^= 1) {
    Block const &block = blocks[n], &next = blocks[n ^ 1];
    look_up(p, s, {begin + kKeys, fa::smaller(begin + 2 * kKeys, keys.end)}, blocks[n ^ 1]);
    score_block<Product>(p, s, block, scratch);
    bool const hides = weigh_block(p, s, block, scale, scratch, part);
    add_block<Product>(p, s, block, next, scratch, part, hides);
  }
}

template <class T>
void attend_to(Params const& p, Sequence const& s, Range keys, Scratch const& scratch, Part const& part) {
#if defined(__AVX512BF16__)
  if (is_paired(p)) {
    copy_queries<Bfloat16>(p, s, scratch.queries);
    return attend_with<Paired>(p, s, keys, scratch, part);
  }
#endif
  read_queries(p, s, scratch.queries);
  attend_with<Spread<T>>(p, s, keys, scratch, part);
}

void attend(Params const& p, Sequence const& s, Range keys, Scratch scratch, Part part) {
  for (int64 n = 0; n < s.rows * padded(p.head_dim_v); ++n) part.sums[n] = 0;
  for (int row = 0; row < s.rows; ++row) {
    part.most[row] = kNever;
    part.total[row] = 0;
  }
  switch (p.cache_dtype) {
    case kFloat32: return attend_to<float>(p, s, keys, scratch, part);
    case kBfloat16: return attend_to<Bfloat16>(p, s, keys, scratch, part);
    case kFloat16: return attend_to<Float16>(p, s, keys, scratch, part);
    default: return attend_to<Float8>(p, s, keys, scratch, part);
  }
}

template <class T>
void write_row(float const* sums, int dim, float factor, T* out) {
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(out + c, load(sums + c) * factor);
  for (; c < dim; ++c) round_to(sums[c] * factor, out + c);
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
  if (p.cache_dtype == kBfloat16) {
    float as_read[kMaxDim];
    __builtin_memcpy(as_read, sums, sizeof sums);
#if defined(__AVX512BF16__)
    if (is_paired(p)) put_in_order<Paired>(as_read, width, sums);
    else
#endif
      put_in_order<Spread<Bfloat16>>(as_read, width, sums);
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
