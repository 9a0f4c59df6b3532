// Rows of tensors as matrices of words: as they are, transposed, or paired along the rows.
#pragma once

#include <type_traits>

#include "tile.h"

namespace {

using fa::cpu::Dtype;

inline int64 rounded_up(int64 n, int64 step) { return (n + step - 1) / step * step; }

// Memory given out piece by piece, each on a cache line of its own. Addresses are numbers, so that a first pass from 0
// tells how much it takes.
class Arena {
 public:
  explicit Arena(void* begin) : at_(reinterpret_cast<uint64>(begin)) {}

  template <class T>
  T* take(int64 count) {
    T* const piece = reinterpret_cast<T*>(at_);
    at_ += rounded_up(count * int64(sizeof(T)), 64) + 64;  // not a power of two, which would share sets of the cache
    return piece;
  }

  int64 end() const { return int64(at_); }

 private:
  uint64 at_;
};

// Rows of a tensor, its head dim contiguous.
struct Source {
  char const* at;
  int64 stride;  // in bytes
  int64 dtype;
};

inline int64 bytes_of(int64 dtype) { return dtype == fa::cpu::kFloat64 ? 8 : dtype == fa::cpu::kFloat32 ? 4 : 2; }

// Calls step with a null pointer to the type of a number.
template <class Step>
inline void with_dtype(int64 dtype, Step const& step) {
  switch (dtype) {
    case fa::cpu::kFloat64: return step(static_cast<double const*>(nullptr));
    case fa::cpu::kBfloat16: return step(static_cast<Bfloat16 const*>(nullptr));
    case fa::cpu::kFloat16: return step(static_cast<Float16 const*>(nullptr));
    default: return step(static_cast<float const*>(nullptr));
  }
}

// The same where the arithmetic is in `Word`s, which leaves fewer types.
template <class Word, class Step>
inline auto with_stored(int64 dtype, Step const& step) {
  if constexpr (sizeof(Word) == 8) return step(static_cast<double const*>(nullptr));
  else if (dtype == fa::cpu::kFloat32) return step(static_cast<float const*>(nullptr));
  else if (dtype == fa::cpu::kBfloat16) return step(static_cast<Bfloat16 const*>(nullptr));
  else return step(static_cast<Float16 const*>(nullptr));
}

inline double number_at(char const* row, int64 dtype, int64 n) {
  double found = 0;
  with_dtype(dtype, [&](auto const* type) { found = to_float(reinterpret_cast<decltype(type)>(row)[n]); });
  return found;
}

inline bool is_finite(double x) { return x - x == 0; }

// The largest magnitude seen, as bits. Numbers above 2^100 (2^1000 in fp64), infinities and NaN are extreme: sums of
// products with them may leave what floats hold, and 0 * infinity is NaN.
template <class Op>
class Largest {
  using Unsigned = uint32 __attribute__((vector_size(4 * kLanes)));

 public:
  void add(Vector<typename Op::Word> words) {
    Unsigned const magnitude = (Unsigned)words & kMask;
    most_ = magnitude > most_ ? magnitude : most_;
  }
  bool is_extreme() const {
    uint32 found = 0;
    for (int n = 0; n < kLanes; ++n) found |= most_[n] >= 0x71800000u;
    return found;
  }

 private:
  static constexpr uint32 kMask = 0x7fffffff;
  Unsigned most_{};
};

template <>
class Largest<Double> {
 public:
  void add(Doubles words) {
    Longs const magnitude = (Longs)words & 0x7fffffffffffffffLL;
    most_ = magnitude > most_ ? magnitude : most_;
  }
  bool is_extreme() const {
    bool found = false;
    for (int n = 0; n < kCount<double>; ++n) found |= most_[n] >= (2023LL << 52);
    return found;
  }

 private:
  Longs most_{};
};

template <class Op>
constexpr int kGroup = kCount<typename Op::Word> * Op::kPerWord;  // numbers in a vector of words

#ifdef FA_PAIRS
template <>
class Largest<Pairs> {
  using Unsigned = uint16 __attribute__((vector_size(4 * kLanes)));

 public:
  void add(Floats words) {
    Unsigned const magnitude = (Unsigned)words & 0x7fff;
    most_ = magnitude > most_ ? magnitude : most_;
  }
  bool is_extreme() const {
    bool found = false;
    for (int n = 0; n < 2 * kLanes; ++n) found |= most_[n] >= 0x7180;
    return found;
  }

 private:
  Unsigned most_{};
};
#endif

template <class Op, class T>
inline Vector<typename Op::Word> load_words(T const* p) {
  if constexpr (Op::kPerWord == 1) return load(p);
  else return loaded<Vector<typename Op::Word>>(p);
}

constexpr int kRowsAhead = 48;  // rows of one head lie far apart, which the machine's own prefetching follows badly

template <class Op, class T>
bool pack_rows_of(Source from, int64 rows, int64 there, int64 dim, Matrix<typename Op::Word> to) {
  Largest<Op> largest;
  for (int64 r = 0; r < rows; ++r, from.at += from.stride, to.at += to.stride) {
    T const* const row = reinterpret_cast<T const*>(from.at);
    for (int64 c = 0; c < dim * int64(sizeof(T)); c += 64)
      prefetch_line(from.at + (r + kRowsAhead < there ? kRowsAhead * from.stride : 0) + c);
    int64 j = 0;
    for (; j + kGroup<Op> <= dim; j += kGroup<Op>) {
      Vector<typename Op::Word> const words = load_words<Op>(row + j);
      largest.add(words);
      store(to.at + j / Op::kPerWord, words);
    }
    if (j < dim) {  // never read past the end of the row
      T some[kGroup<Op>] = {};
      __builtin_memcpy(some, row + j, (dim - j) * sizeof(T));
      Vector<typename Op::Word> const words = load_words<Op>(some);
      largest.add(words);
      store(to.at + j / Op::kPerWord, words);
    }
  }
  return largest.is_extreme();
}

// Rows as words, zeros up to the stride of `to` and in the rows that pad. Whether a number is extreme. `there` rows can be
// read: those behind the last one are packed next.
template <class Op>
bool pack_rows(Source const& from, int64 rows, int64 there, int64 padded_rows, int64 dim,
               Matrix<typename Op::Word> to) {
  for (int64 n = rows * to.stride; n < padded_rows * to.stride; n += kCount<typename Op::Word>)
    store(to.at + n, Vector<typename Op::Word>{});
  if constexpr (Op::kPerWord == 2) return pack_rows_of<Op, Bfloat16>(from, rows, there, dim, to);
  else if constexpr (sizeof(typename Op::Word) == 8) return pack_rows_of<Op, double>(from, rows, there, dim, to);
  else if (from.dtype == fa::cpu::kFloat32) return pack_rows_of<Op, float>(from, rows, there, dim, to);
  else if (from.dtype == fa::cpu::kBfloat16) return pack_rows_of<Op, Bfloat16>(from, rows, there, dim, to);
  else return pack_rows_of<Op, Float16>(from, rows, there, dim, to);
}

// Packed rows without what is not finite, the rest times a power of two. Rare, and so number by number.
template <class Op>
void drop_nonfinite(Matrix<typename Op::Word> rows, int64 count, int64 dim, double factor) {
  using Number = std::conditional_t<Op::kPerWord == 2, Bfloat16, typename Op::Word>;
  for (int64 r = 0; r < count; ++r) {
    Number* const row = reinterpret_cast<Number*>(rows.at + r * rows.stride);
    for (int64 c = 0; c < dim; ++c) {
      double const x = to_float(row[c]);
      round_to(typename Op::Word(is_finite(x) ? x * factor : 0), row + c);
    }
  }
}

template <class Word, int STEP>
inline void exchange_rows(Vector<Word>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount<Word>; ++i)
    if (!(i & STEP)) exchange<Word, STEP>(rows[i], rows[i + STEP], LaneSequence<Word>{});
}

// to[c][r] = from[r][c] for as many rows as a vector has lanes; `from` can be read up to a whole vector of columns.
template <class Word>
__attribute__((noinline)) void transpose(Matrix<Word const> from, int64 columns, Matrix<Word> to) {
  constexpr int kRows = kCount<Word>;
  for (int64 c = 0; c < columns; c += kRows) {
    Vector<Word> rows[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) rows[i] = load(from.at + i * from.stride + c);
    exchange_rows<Word, 1>(rows);
    if constexpr (kRows > 2) exchange_rows<Word, 2>(rows);
    if constexpr (kRows > 4) exchange_rows<Word, 4>(rows);
    if constexpr (kRows > 8) exchange_rows<Word, 8>(rows);
    int64 const some = columns - c < kRows ? columns - c : kRows;
    if (some == kRows) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) store(to.at + (c + i) * to.stride, rows[i]);
    } else {
      for (int i = 0; i < some; ++i) store(to.at + (c + i) * to.stride, rows[i]);
    }
  }
}

// Whether rows can be read as vectors of words where they lie: they are of the dtype of the product, and none ends inside
// a vector.
template <class Op>
inline bool are_words(Source const& from, int64 dim) {
  constexpr int64 kBytes = sizeof(typename Op::Word);
  return bytes_of(from.dtype) * Op::kPerWord == kBytes && dim % kGroup<Op> == 0 && from.stride % kBytes == 0;
}

template <class Op>
inline Matrix<typename Op::Word const> as_words(Source const& from) {
  using Word = typename Op::Word;
  return {reinterpret_cast<Word const*>(from.at), from.stride / int64(sizeof(Word))};
}

// Brings the rows that lie kRowsAhead behind `count` rows; `there` can be read.
inline void prefetch_ahead(Source const& from, int64 count, int64 there, int64 dim) {
  for (int64 r = kRowsAhead; r < kRowsAhead + count && r < there; ++r)
    for (int64 c = 0; c < dim * bytes_of(from.dtype); c += 64) prefetch_line(from.at + r * from.stride + c);
}

// A panel of packed rows: [words of a row][kPanel], the right operand of products with them. Whole vectors of rows are
// written; what lies behind them is not read.
template <class Word>
inline void pack_panel(Matrix<Word const> rows, int64 count, int64 words, Word* panel) {
  for (int j = 0; j * kCount<Word> < count; ++j)
    transpose<Word>({rows.at + j * kCount<Word> * rows.stride, rows.stride}, words,
                    {panel + j * kCount<Word>, kPanel<Word>});
}

// A panel of rows of a tensor. `rows` is memory for them, where they are not words as they lie.
template <class Op>
inline void pack_panel_of(Source const& from, int64 count, int64 there, int64 dim, Matrix<typename Op::Word> rows,
                          typename Op::Word* panel) {
  using Word = typename Op::Word;
  int64 const words = (dim + Op::kPerWord - 1) / Op::kPerWord;
  if (count % kCount<Word> || !are_words<Op>(from, dim)) {
    pack_rows<Op>(from, count, there, rounded_up(count, kCount<Word>), dim, rows);
    return pack_panel<Word>({rows.at, rows.stride}, count, words, panel);
  }
  for (int64 r = 0; r < count; r += kCount<Word>) {
    Source const some{from.at + r * from.stride, from.stride, from.dtype};
    prefetch_ahead(some, kCount<Word>, there - r, dim);
    pack_panel<Word>(as_words<Op>(some), kCount<Word>, words, panel + r);
  }
}

// One vector of the words that hold column c.. of as many rows as a word has numbers.
template <class Op>
inline Vector<typename Op::Word> stacked(typename Op::Word const* rows, int64 stride, int64 c) {
  if constexpr (Op::kPerWord == 1) {
    (void)stride;
    return load(rows + c);
  } else {
#if defined(__AVX512BF16__)
    return in_pairs(loaded<__m256i>(reinterpret_cast<uint16 const*>(rows) + c),
                    loaded<__m256i>(reinterpret_cast<uint16 const*>(rows + stride) + c));
#endif
    Words const upper =
        __builtin_convertvector(loaded<Halves>(reinterpret_cast<uint16 const*>(rows + stride) + c), Words);
    Words const lower = __builtin_convertvector(loaded<Halves>(reinterpret_cast<uint16 const*>(rows) + c), Words);
    return (Floats)(lower | upper << 16);
  }
}

// How the columns of a head are cut into panels of at most kTileVectors vectors, about equally wide.
struct Panels {
  int count, vectors;

  explicit Panels(int64 vectors_of_all)
      : count(int((vectors_of_all + kTileVectors - 1) / kTileVectors)), vectors(int(vectors_of_all)) {}
  int begin(int n) const { return vectors * n / count; }
  int width(int n) const { return begin(n + 1) - begin(n); }
};

// Rows stacked along the contraction: for each panel [all rows / kPerWord][its width], panels after each other.
template <class Op>
inline void pack_stacked(Matrix<typename Op::Word> rows, int64 count, Panels const& panels, int64 all, int64 first,
                         typename Op::Word* to) {
  using Word = typename Op::Word;
  for (int n = 0; n < panels.count; ++n) {
    int const width = panels.width(n) * kCount<Word>, begin = panels.begin(n) * kCount<Word>;
    Word* at = to + begin * all + first * width;
    for (int64 r = 0; r < count / Op::kPerWord; ++r, at += width)
      for (int c = 0; c < width; c += kCount<Word>)
        store(at + c, stacked<Op>(rows.at + r * Op::kPerWord * rows.stride, rows.stride, begin + c));
  }
}

// The same of rows of a tensor that are words as they lie, as many as fill vectors. Whether a number is extreme.
template <class Op>
inline bool stack_rows(Source const& from, int64 count, int64 there, Panels const& panels, int64 all, int64 first,
                       typename Op::Word* to) {
  using Word = typename Op::Word;
  Matrix<Word const> const rows = as_words<Op>(from);
  Largest<Op> largest;
  for (int64 r = 0; r < count; r += Op::kPerWord) {
    Source const some{from.at + r * from.stride, from.stride, from.dtype};
    prefetch_ahead(some, Op::kPerWord, there - r, panels.vectors * kCount<Word>);
    for (int n = 0; n < panels.count; ++n) {
      int const width = panels.width(n) * kCount<Word>, begin = panels.begin(n) * kCount<Word>;
      Word* const at = to + begin * all + (first + r / Op::kPerWord) * width;
      for (int c = 0; c < width; c += kCount<Word>) {
        Vector<Word> const words = stacked<Op>(rows.at + r * rows.stride, rows.stride, begin + c);
        largest.add(words);
        store(at + c, words);
      }
    }
  }
  return largest.is_extreme();
}

template <class T, class Word>
inline void read_row_of(T const* from, int64 dim, Word* row) {
  int64 c = 0;
  for (; c + kCount<Word> <= dim; c += kCount<Word>) store(row + c, load(from + c));
  for (; c < dim; ++c) row[c] = to_float(from[c]);
}

// One row of a tensor as words.
template <class Word>
inline void read_row(char const* from, int64 dim, int64 dtype, Word* row) {
  with_stored<Word>(dtype, [&](auto const* type) { read_row_of(reinterpret_cast<decltype(type)>(from), dim, row); });
}

template <class T, class Word>
inline void write_row_of(Word const* row, int64 dim, Word factor, T* to) {
  int64 c = 0;
  for (; c + kCount<Word> <= dim; c += kCount<Word>) store(to + c, load(row + c) * factor);
  for (; c < dim; ++c) round_to(row[c] * factor, to + c);
}

// One row of results, times a factor, in the dtype of the tensor.
template <class Word>
inline void write_row(Word const* row, int64 dim, Word factor, int64 dtype, char* to) {
  with_stored<Word>(dtype, [&](auto const* type) {
    write_row_of(
        row, dim, factor,
        const_cast<std::remove_const_t<std::remove_pointer_t<decltype(type)>>*>(reinterpret_cast<decltype(type)>(to)));
  });
}

// Rows that are written soon.
inline void prefetch_results(Source const& to, int64 rows, int64 dim) {
  for (int64 n = 0; n < rows; ++n)
    for (int64 c = 0; c < dim * bytes_of(to.dtype); c += 64) prefetch_line(to.at + n * to.stride + c);
}

// Rows that a later item of work needs, brought towards the second cache a few at a time.
class Prefetch {
 public:
  void add(Source const& rows, int64 count, int64 bytes) {
    rows_[streams_] = rows;
    counts_[streams_] = count;
    bytes_[streams_++] = bytes;
    all_ += count;
  }
  int64 all() const { return all_; }
  int streams() const { return streams_; }

  void step(int64 rows) {
    while (rows > 0 && stream_ < streams_) {
      if (row_ >= counts_[stream_]) {
        row_ = 0;
        ++stream_;
        continue;
      }
      char const* const at = rows_[stream_].at + row_++ * rows_[stream_].stride;
      for (int64 c = 0; c < bytes_[stream_]; c += 64) prefetch_line(at + c);
      --rows;
    }
  }

 private:
  Source rows_[5];
  int64 counts_[5], bytes_[5], row_ = 0, all_ = 0;
  int streams_ = 0, stream_ = 0;
};

}  // namespace
