// The forward pass of one item: query rows of the heads of one unit.
#pragma once

#include "rows.h"

namespace {

constexpr int kForwardRows = 48;  // of a tile of queries

// Null tensors are skipped: those of tangents may be null (jvp.h).
template <class Op>
class Forward {
  template <class>
  friend class ForwardJvp;
  template <class>
  friend class RowStatistics;
  template <class>
  friend class RowWeights;
  using Word = typename Op::Word;
  static constexpr int kLast = kForwardRows - kTileRows;
  static constexpr int64 kStrip = kMostKeys + kAlignWords;  // words from row to row of a strip, no power of two

 public:
  __attribute__((noinline)) Forward(AttentionParams const& p, ForwardItem const& item, void* memory)
      : p_(p),
        item_(item),
        tensors_{p, item.unit},
        scores_(p, item.unit),
        dim_qk_((p.head_dim_qk + Op::kPerWord - 1) / Op::kPerWord),
        row_words_(rounded_up(p.head_dim_qk, kGroup<Op>) / Op::kPerWord),
        value_row_words_(rounded_up(p.head_dim_v, kGroup<Op>) / Op::kPerWord),
        columns_(rounded_up(p.head_dim_v, kCount<Word>)),
        panels_(columns_ / kCount<Word>) {
    Range const keys = fa::tile_range(item.unit.band, item.rows.begin, item.rows.end);
    keys_ = {keys.begin / kPanel<Word> * kPanel<Word>, keys.end};
    packed_ = rounded_up(keys_.end - keys_.begin, kPanel<Word>);
    Arena arena(memory);
    k_ = arena.take<Word>(packed_ * dim_qk_);
    v_ = arena.take<Word>(packed_ / Op::kPerWord * columns_);
    extreme_ = arena.take<bool>(packed_ / kPanel<Word>);
    ranges_ = arena.take<Range>(p.intervals_count * kForwardRows);
    runs_ = arena.take<Ids>(p.segments_q ? Segments::runs(item.unit.band.s_kv) : 0);
    rows_ = arena.take<Word>(kPanel<Word> * (row_words_ > value_row_words_ ? row_words_ : value_row_words_));
    queries_ = arena.take<Word>(kForwardRows * row_words_);
    sums_ = arena.take<Word>(kForwardRows * columns_);
    strip_ = arena.take<Word>(kTileRows * kStrip);
    weights_ = Op::kPerWord == 1 ? strip_ : arena.take<Word>(kTileRows * kStrip);
    bytes_ = arena.end() - int64(reinterpret_cast<uint64>(memory));
  }

  int64 bytes() const { return bytes_; }

  void run(Prefetch& prefetch) {
    prefetch_ = &prefetch;
    int const rows = item_.rows.end - item_.rows.begin;
    rows_at_once_ = 1 + prefetch.all() * kTileRows / fa::larger(1, rows * scores_.group());
    begin();
    for_each_tile([this](int head, int first, int count) { run_tile(head, first, count); });
  }

 private:
  FA_CALLED void begin() {
    if (p_.intervals) narrow();
    if (p_.segments_q) segments_.look(scores_.segments_kv(), keys_, runs_);
    packed_to_ = keys_.begin;
  }

  template <class Step>
  void for_each_tile(Step const& step) const {
    int const rows = item_.rows.end - item_.rows.begin, group = scores_.group();
    // Few rows of each head: those of all heads together.
    int const heads = item_.unit.band.s_q < 2 * kTileRows ? group : 1;
    for (int head = 0; head < group; head += heads)
      for (int first = 0; first < heads * rows; first += kForwardRows)
        step(scores_.first_head() + head, first, fa::smaller(kForwardRows, heads * rows - first));
  }

  // Calls step with the strips of a tile: their first row, how many there are, and the first of their keys. Where rows
  // keep several ranges, strips are narrow, and `kept` is what they keep of one.
  template <class Step>
  void for_each_strip(int count, Range keys, Step const& step) {
    int const width = has_gaps_ ? kPanel<Word> : kMostKeys;
    for (int begin = keys.begin / kPanel<Word> * kPanel<Word>; begin < keys.end; begin += width) {
      Range const there{begin, begin + width};
      for (int r = 0; r < count && has_gaps_; ++r) row_[r].kept = common(those_in(row_[r].ranges, there).hull(), there);
      for (int r = 0; r < count; r += rows_from(r)) step(r, rows_from(r), begin);
    }
  }

  // How many rows the strip has that begins at row r.
  int rows_from(int r) const { return strip_end_[r] - r; }

  // Cuts a tile in strips: of kTileRows rows, and where ranges change.
  void cut_strips(int count) {
    for (int r = 0; r < count; r = strip_end_[r]) {
      int end = fa::smaller(r + kTileRows, count);
      for (int n = r + 1; n < end && p_.intervals; ++n)
        if (are_apart(row_[n - 1].ranges, row_[n].ranges)) end = n;
      strip_end_[r] = end;
    }
  }

  // Whether nothing has been added to the sums of a strip so far.
  bool start(int r, int count) {
    bool const is_first = !started_[r];
    for (int n = r; n < r + count; ++n) started_[n] = true;
    return is_first;
  }

  struct Row {
    int head, i;
    Range kept;
    Ranges ranges;  // where a call has intervals: within the band
  };

  // Vectors of keys of which a strip keeps some, and where their columns lie in it, one piece after the other.
  struct Piece {
    Range keys;
    int column;

    int first() const { return keys.begin / kCount<Word> * kCount<Word>; }
    int columns() const { return int(rounded_up(keys.end, kCount<Word>)) - first(); }
    int origin() const { return first() - column; }  // the key of column 0
    Range all() const { return {column, column + columns()}; }
    Range columns_of(Ranges ranges) const {
      Range const kept = common(ranges.hull(), keys);
      return is_empty(kept) ? kept : Range{kept.begin - origin(), kept.end - origin()};
    }
  };

  // Leaves out the keys at both ends that intervals hide from all rows.
  void narrow() {
    Range all{0, 0};
    int const heads = scores_.intervals.differ_by_head() ? scores_.group() : 1;
    for (int head = scores_.first_head(); head < scores_.first_head() + heads; ++head)
      for (int i = item_.rows.begin; i < item_.rows.end; ++i)
        all = hull(all, scores_.intervals.hull(head, i, scores_.kept(i)));
    keys_ = {all.begin / kPanel<Word> * kPanel<Word>, all.end};
  }

  // Packs the keys and values before `end` that are not packed yet, and prefetches those that follow.
  void pack_to(int end) {
    int const first = packed_to_;
    for (; packed_to_ < end; packed_to_ += kPanel<Word>) pack_keys(packed_to_);
    bool is_extreme = false;
    for (int begin = first; begin < packed_to_; begin += kPanel<Word>) is_extreme |= pack_values(begin);
    if (is_extreme && !has_extremes_) {
      has_extremes_ = true;
      v_factor_ = 1.0 / (1 << 24);  // so that sums of the largest values do not overflow
      for (int begin = keys_.begin; begin < packed_to_; begin += kPanel<Word>) pack_values(begin);
    }
    int const next = fa::smaller(packed_to_ + kForwardRows, keys_.end);
    if (next <= packed_to_) return;
    int64 const bytes = bytes_of(p_.dtype);
    if (p_.k) upcoming_.add(from_row(tensors_.k(), packed_to_), next - packed_to_, p_.head_dim_qk * bytes);
    if (p_.v) upcoming_.add(from_row(tensors_.v(), packed_to_), next - packed_to_, p_.head_dim_v * bytes);
  }

  void pack_keys(int begin) {
    if (!p_.k) return;
    int const count = fa::smaller(kPanel<Word>, keys_.end - begin);
    pack_panel_of<Op>(from_row(tensors_.k(), begin), count, keys_.end - begin, p_.head_dim_qk, {rows_, row_words_},
                      k_ + (begin - keys_.begin) * dim_qk_);
  }

  bool pack_values(int begin) {
    if (!p_.v) return false;
    int const count = fa::smaller(kPanel<Word>, keys_.end - begin), padded = int(rounded_up(count, kCount<Word>));
    int const at = begin - keys_.begin, there = keys_.end - begin;
    int64 const all = packed_ / Op::kPerWord, first = at / Op::kPerWord;
    Source const from = from_row(tensors_.v(), begin);
    bool& is_extreme = extreme_[at / kPanel<Word>];
    if (v_factor_ == 1 && padded == count && are_words<Op>(from, p_.head_dim_v))
      return is_extreme = stack_rows<Op>(from, count, there, panels_, all, first, v_);
    Matrix<Word> const rows{rows_, value_row_words_};
    is_extreme = pack_rows<Op>(from, count, there, padded, p_.head_dim_v, rows);
    if (v_factor_ != 1) drop_nonfinite<Op>(rows, count, p_.head_dim_v, v_factor_);
    pack_stacked<Op>(rows, padded, panels_, all, first, v_);
    return is_extreme;
  }

  // Rows first .. of the heads from `head` on, one head after the other.
  void run_tile(int head, int first, int count) {
    Range const keys = begin_tile(head, first, count);
    if (has_gaps_) return run_pieces(count);
    for (int begin = keys.begin / kPanel<Word> * kPanel<Word>; begin < keys.end; begin += kMostKeys)
      for (int r = 0; r < count; r += rows_from(r)) run_strip(r, rows_from(r), begin);
    write(count);
  }

  // The keys that the rows of a tile keep.
  Range begin_tile(int head, int first, int count) {
    int const rows = item_.rows.end - item_.rows.begin;
    Range keys{0, 0};
    has_gaps_ = false;
    for (int r = 0; r < count; ++r) {
      int const i = item_.rows.begin + (first + r) % rows;
      row_[r] = {head + (first + r) / rows, i, scores_.kept(i), {}};
      if (p_.intervals) {
        Row& row = row_[r];
        row.ranges = scores_.intervals.read(row.head, i, row.kept, ranges_ + r * p_.intervals_count);
        row.kept = row.ranges.hull();
        has_gaps_ |= row.ranges.count > 1;
      }
      state_.most[r] = kNever<Word>;
      state_.total[r] = 0;
      sinks_[r] = scores_.sink(row_[r].head);
      keys = hull(keys, row_[r].kept);
    }
    cut_strips(count);
    upcoming_ = Prefetch();
    pack_to(keys.end);
    for (int r = 0, end; r < count; r = end) {
      for (end = r; end < count && row_[end].head == row_[r].head;) ++end;
      if (!p_.q) continue;
      pack_rows<Op>(from_row(tensors_.q(row_[r].head), row_[r].i), end - r, item_.rows.end - row_[r].i, end - r,
                    p_.head_dim_qk, {queries_ + r * row_words_, row_words_});
      prefetch_rows(row_[r].head, row_[r].i, end - r);
    }
    for (bool& is_started : started_) is_started = false;
    return keys;
  }

  // Rows with gaps: each strip takes the vectors of keys that it keeps, as many as it holds at a time.
  void run_pieces(int count) {
    for (int& next : next_) next = 0;
    for (bool is_left = true; is_left;) {
      is_left = false;
      for (int r = 0; r < count; r += rows_from(r)) is_left |= run_pieces_of(r, rows_from(r));
    }
    write(count);
  }

  // The next pieces of rows r ..; whether there were any.
  bool run_pieces_of(int r, int count) {
    int const columns = take_pieces(r, count);
    if (!columns) return false;
    bool const is_first = start(r, count);
    for (int m = 0; m < pieces_; ++m) {
      int const first = piece_[m].first(), begin = first / kPanel<Word> * kPanel<Word>;
      multiply_keys(count, queries_ + r * row_words_, k_, begin, {first - begin, first - begin + piece_[m].columns()},
                    {strip_ + (begin - piece_[m].origin()), kStrip});
    }
    for (int n = r; n < r + count; ++n) weigh_pieces(n, strip_ + (n - r) * kStrip, n - r, columns, is_first);
    upcoming_.step(3 * kTileRows);
    prefetch_->step(rows_at_once_);
    for (int m = 0; m < pieces_; ++m) {
      Piece const& piece = piece_[m];
      int64 const skipped = (piece.keys.begin - piece.first()) / Op::kPerWord;  // words whose weights are zero
      int64 const depth = (piece.keys.end - piece.first() + Op::kPerWord - 1) / Op::kPerWord - skipped;
      int const key = piece.first() + int(skipped) * Op::kPerWord;
      int64 const word = piece.column / Op::kPerWord + skipped;
      multiply_values(is_first && m == 0 ? kSet : kAdd, r, count, key, word, depth);
      if (has_extremes_) add_nonfinite_values(r, count, piece.origin(), piece.keys);
    }
    return true;
  }

  // The pieces that follow those which were taken; how many columns they have.
  int take_pieces(int r, int count) {
    Ranges left[kTileRows] = {row_[r].ranges};
    int different = 1;
    for (int n = r + 1; n < r + count; ++n)
      if (!are_equal(row_[n].ranges, row_[n - 1].ranges)) left[different++] = row_[n].ranges;
    count = different;
    int columns = 0;
    int& done = next_[r];
    for (pieces_ = 0; columns < kMostKeys; ++pieces_) {
      int begin = item_.unit.band.s_kv;
      for (int n = 0; n < count; ++n) {
        drop_before(done, left[n]);
        if (left[n].count) begin = fa::smaller(begin, fa::larger(done, left[n].at[0].begin));
      }
      if (begin == item_.unit.band.s_kv) break;
      Piece& piece = piece_[pieces_] = {{begin, begin}, columns};
      piece.keys.end = grown(begin, left, count, piece.first() + kMostKeys - columns, kCount<Word>);
      columns += piece.columns();
      done = piece.keys.end;
    }
    return columns;
  }

  // Products of row n with all pieces become weights; its ranges before the end of the last one are done.
  void weigh_pieces(int n, Word* scores, int line, int columns, bool is_first) {
    Row& row = row_[n];
    Vector<Word> most = broadcast(kNever<Word>);
    for (int m = 0; m < pieces_; ++m) {
      Piece const& piece = piece_[m];
      drop_before(piece.keys.begin, row.ranges);
      Ranges const ranges = those_in(row.ranges, piece.keys);
      if (scores_.terms == kHidden && !p_.mask && !p_.segments_q && ranges.count <= 1)
        most = larger(lanes_in_range(piece.all(), piece.columns_of(ranges), scores), most);
      else most = larger(broadcast(finish_piece(row, piece, ranges, scores)), most);
    }
    drop_before(piece_[pieces_ - 1].keys.end, row.ranges);
    Word const shrink = soften<Op>(scores, columns, largest(most), scores_.to_exponent, dropped_in_pieces(row), state_,
                                   n, weights_ + line * kStrip);
    if (!is_first) shrink_sums(n, shrink);
  }

  Word finish_piece(Row const& row, Piece const& piece, Ranges ranges, Word* scores) {
    auto described = scores_.row(row.head, row.i, piece.origin(), piece.columns_of(ranges));
    if (ranges.count > 1) scores_.hide_gaps(described, ranges, piece.origin());
    return Scores<Word>::finish(scores_.terms, described, piece.all(), scores);
  }

  // Where results of these rows go, and the queries that follow.
  void prefetch_rows(int head, int i, int count) {
    int64 const bytes = bytes_of(p_.dtype);
    if (p_.out) prefetch_results(from_row(tensors_.out(head), i), count, p_.head_dim_v);
    int const left = item_.rows.end - i - count;
    if (left > 0 && upcoming_.streams() < 3)
      upcoming_.add(from_row(tensors_.q(head), i + count), fa::smaller(left, kForwardRows), p_.head_dim_qk * bytes);
  }

  Seen seen_by_strip(int r, int count, int begin) const {
    Range keys{0, 0};
    for (int n = r; n < r + count; ++n) keys = hull(keys, row_[n].kept);
    auto const head = [&](int n) { return row_[r + n].head; };
    auto const i = [&](int n) { return row_[r + n].i; };
    return seen_by(scores_, segments_, common(keys, {begin, begin + kMostKeys}), count, head, i);
  }

  void run_strip(int r, int count, int begin) {
    Seen const seen = seen_by_strip(r, count, begin);
    Range const keys = seen.keys;
    if (is_empty(keys)) return;
    prefetch_terms(r, count, keys);
    Range const columns = columns_of<Word>(keys, begin);
    multiply_keys(count, queries_ + r * row_words_, k_, begin, columns, {strip_, kStrip});
    bool const is_first = start(r, count);
    weigh_rows(terms_of(scores_, seen), r, count, begin, columns, keys, is_first);
    upcoming_.step(3 * kTileRows);
    prefetch_->step(rows_at_once_);
    add_values(r, count, begin, columns, keys, is_first);
  }

  void prefetch_terms(int r, int count, Range keys) const {
    for (int n = r; n < r + count; ++n) scores_.prefetch_terms(row_[n].head, row_[n].i, count, keys);
  }

  // What such a strip, whose keys are `keys`, reads for row r.
  FA_CALLED typename Scores<Word>::Row described(int r, int begin, Range keys) {
    Row const& row = row_[r];
    Range const both = common(row.kept, keys);
    bool const is_none = is_empty(both);
    auto found = scores_.row(row.head, row.i, begin, is_none ? both : Range{both.begin - begin, both.end - begin});
    if (!has_gaps_ || is_none) return found;
    Ranges const ranges = those_in(row.ranges, row.kept);
    if (ranges.count > 1) scores_.hide_gaps(found, ranges, begin);
    return found;
  }

  // A strip's weights times values, added to its sums.
  void add_values(int r, int count, int begin, Range columns, Range keys, bool is_first) {
    int const end = keys.end - begin;
    int64 const skipped = (keys.begin - begin - columns.begin) / Op::kPerWord;  // words whose weights are zero
    int64 const depth = (end - columns.begin + Op::kPerWord - 1) / Op::kPerWord - skipped;
    int const first = begin + columns.begin + int(skipped) * Op::kPerWord;
    multiply_values(is_first ? kSet : kAdd, r, count, first, skipped, depth);
    if (has_extremes_) add_nonfinite_values(r, count, begin + columns.begin, keys);
  }

  void multiply_keys(int count, Word const* rows, Word const* packed, int begin, Range columns, Matrix<Word> to,
                     Form form = kSet) const {
    Matrix<Word const> const queries{rows, row_words_};
    for (int c = columns.begin, end; c < columns.end; c = end) {
      int const panel = c / kPanel<Word> * kPanel<Word>;
      end = fa::smaller(columns.end, panel + kPanel<Word>);
      Word const* const keys = packed + (begin - keys_.begin + panel) * dim_qk_ + (c - panel);
      multiply_in_chains<Op>(form, count, (end - c) / kCount<Word>, dim_qk_, queries, {keys, kPanel<Word>},
                             {to.at + c, to.stride});
    }
  }

  // Products become weights, which begin at the first of `columns`; earlier sums are rescaled.
  void weigh_rows(Terms terms, int r, int count, int begin, Range columns, Range keys, bool is_first) {
    Word most[kTileRows];
    for (int n = 0; n < count; ++n) {  // a loop of its own: all weights depend on it
      Row const& row = row_[r + n];
      Word* const scores = strip_ + n * kStrip;
      Range const both = common(row.kept, keys);
      Range const kept = is_empty(both) ? Range{0, 0} : Range{both.begin - begin, both.end - begin};
      if (terms == kBand) most[n] = largest_in_band(columns, kept, scores);
      else most[n] = Scores<Word>::finish(terms, scores_.row(row.head, row.i, begin, kept), columns, scores);
    }
    for (int n = 0; n < count; ++n) {
      Row const& row = row_[r + n];
      Word const shrink =
          soften<Op>(strip_ + n * kStrip + columns.begin, columns.end - columns.begin, most[n], scores_.to_exponent,
                     dropped(row, begin + columns.begin, begin + columns.end), state_, r + n, weights_ + n * kStrip);
      if (!is_first) shrink_sums(r + n, shrink);
    }
  }

  void shrink_sums(int r, Word shrink) {
    if (shrink == 1) return;
    Word* const sums = sums_ + r * columns_;
    for (int64 c = 0; c < columns_; c += kCount<Word>) store(sums + c, load(sums + c) * shrink);
  }

  // Dropout's bits of the keys first .. end - 1.
  Dropped dropped(Row const& row, int first, int end) {
    if (!p_.dropout_threshold) return {nullptr, 0};
    int const begin = first / 32 * 32;
    random_bits(p_.rng_state, item_.unit.b * p_.heads_q + row.head, row.i, begin, end, bits_);
    return {bits_ + (first - begin), int(p_.dropout_threshold)};
  }

  // Those of the columns of all pieces.
  Dropped dropped_in_pieces(Row const& row) {
    if (!p_.dropout_threshold) return {nullptr, 0};
    uint16 bits[kMostKeys + 2 * kBitsAtOnce];
    for (int m = 0; m < pieces_; ++m) {
      int const first = piece_[m].first(), begin = first / 32 * 32, columns = piece_[m].columns();
      random_bits(p_.rng_state, item_.unit.b * p_.heads_q + row.head, row.i, begin, first + columns, bits);
      __builtin_memcpy(bits_ + piece_[m].column, bits + (first - begin), columns * sizeof(uint16));
    }
    return {bits_, int(p_.dropout_threshold)};
  }

  void multiply_values(Form form, int r, int count, int key, int64 word, int64 depth) {
    for (int n = 0; n < panels_.count; ++n) {
      int64 const width = panels_.width(n) * kCount<Word>, column = panels_.begin(n) * kCount<Word>;
      Word const* const values = v_ + column * (packed_ / Op::kPerWord) + (key - keys_.begin) / Op::kPerWord * width;
      multiply<Op>(form, count, panels_.width(n), depth, {weights_ + word, kStrip}, {values, width},
                   {sums_ + r * columns_ + column, columns_});
    }
  }

  void add_nonfinite_values(int r, int count, int first, Range keys) {
    for (int j = keys.begin; j < keys.end; ++j) {
      if (!extreme_[(j - keys_.begin) / kPanel<Word>]) continue;
      for (int n = 0; n < count; ++n)
        if (scores_.keeps(row_[r + n].head, row_[r + n].i, j))
          add_nonfinite(element<Op>(weights_ + n * kStrip, j - first), tensors_.v(), j, p_.head_dim_v,
                        sums_ + (r + n) * columns_);
    }
  }

  void write(int count) {
    finish_rows(state_, sinks_, scores_.to_score, count, finished_);
    Word const factor = Word(p_.dropout_scale / v_factor_);
    for (int r = 0; r < count; ++r) {
      Row const& row = row_[r];
      Word* const sums = sums_ + r * columns_;
      if (!started_[r])
        for (int64 c = 0; c < columns_; c += kCount<Word>) store(sums + c, Vector<Word>{});
      write_row(sums, p_.head_dim_v, finished_.factor[r] * factor, p_.dtype, written(tensors_.out(row.head), row.i));
      int64 const at = tensors_.lse(row.head) + row.i;
      if (p_.lse) {  // null where it is not wanted
        static_cast<Word*>(p_.lse)[at] = finished_.lse[r];
        static_cast<Word*>(p_.lse_low)[at] = finished_.low[r];
      }
    }
  }

  AttentionParams const& p_;
  ForwardItem const& item_;
  Tensors tensors_;
  Scores<Word> scores_;
  Segments segments_;
  int64 dim_qk_, row_words_, value_row_words_, columns_;
  Panels panels_;
  Range keys_;       // packed, from a whole panel on
  int64 packed_;     // how many, in whole panels
  Word *k_, *v_;     // panels of keys [words of a row][kPanel]; panels of columns of values
  bool* extreme_;       // of each panel of keys: whether a value is
  bool has_extremes_ = false, has_gaps_ = false;  // has_gaps_: a row of the tile keeps several ranges
  double v_factor_ = 1;
  Ids* runs_;
  Word *rows_, *queries_, *sums_, *strip_, *weights_;
  int64 bytes_;
  Prefetch* prefetch_ = nullptr;  // of the next item
  Prefetch upcoming_;  // of the next tile
  int packed_to_ = 0;  // keys before this one are packed
  int64 rows_at_once_ = 0;
  Row row_[kForwardRows];
  Range* ranges_;
  Piece piece_[kMostKeys / kCount<Word>];
  int pieces_ = 0;
  bool started_[kForwardRows];
  int strip_end_[kForwardRows];  // of the strip that begins at a row
  int next_[kForwardRows];       // the key that its pieces go on with
  RowState<Word, kForwardRows> state_;
  FinishedRows<Word, kForwardRows> finished_;
  alignas(64) Word sinks_[kForwardRows];
  uint16 bits_[kMostKeys + 2 * kBitsAtOnce];
};

}  // namespace
