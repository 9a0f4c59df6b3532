// Short sequences of words: both passes on tensors as they lie.
//
// Of short sequences, packing and what decides about strips take as long as the products. Here keys and values are
// packed only where a product needs them turned; the products, their order and so their bits are those of forward.h and
// backward.h, which serve what is refused here: numbers that are extreme, and all that a call may ask for besides a band.
#pragma once

#include "parts.h"

namespace {

constexpr int kSmallQueries = 96, kSmallKeys = 128;  // at most: one block of each
static_assert(kSmallQueries <= kMostRows && kSmallKeys <= kBackwardKeys && kSmallKeys <= kMostKeys);

template <class Op>
constexpr bool kServesSmall = kIsSpecialised && Op::kPerWord == 1;

template <class Op>
class Small {
  using Word = typename Op::Word;

 public:
  Small(AttentionParams const& p, Unit const& unit, void* memory)
      : p_(p),
        tensors_{p, unit},
        band_(unit.band),
        first_head_(unit.kv_head * int(p.heads_q / p.heads_kv)),
        after_head_(first_head_ + int(p.heads_q / p.heads_kv)),
        panels_qk_(p.head_dim_qk / kCount<Word>),
        panels_v_(p.head_dim_v / kCount<Word>),
        columns_(int(rounded_up(band_.s_kv, kCount<Word>))),
        line_(columns_ + kAlignWords),
        to_score_(Word(p.scale)) {
    Arena arena(memory);
    int64 const dim = p.head_dim_qk > p.head_dim_v ? p.head_dim_qk : p.head_dim_v;
    int64 const packed = rounded_up(band_.s_kv, kPanel<Word>), rows = rounded_up(band_.s_q, kCount<Word>);
    rows_ = arena.take<Word>(kPanel<Word> * dim);
    k_ = arena.take<Word>(packed * p.head_dim_qk);
    v_ = arena.take<Word>(packed * p.head_dim_v);
    strip_.scores = {arena.take<Word>(kTileRows * line_), line_};
    strip_.dweights = {arena.take<Word>(kTileRows * line_), line_};
    weights_ = arena.take<Word>(rows * line_);
    gradients_ = arena.take<Word>(rows * line_);
    for (Word** numbers : {&lse_, &low_, &delta_}) *numbers = arena.take<Word>(rows);
    bytes_ = arena.end() - int64(reinterpret_cast<uint64>(memory));
    pair_.to_score = to_score_;
  }

  // Whether the unit is short and asks for nothing but a band.
  static bool takes(AttentionParams const& p, Unit const& unit) {
    return takes_keys(p, unit) && p.head_dim_v <= Op::kChain && can_hold_sums<Word>(p.dtype, p.head_dim_v);
  }

  // The same for calls without values.
  static bool takes_keys(AttentionParams const& p, Unit const& unit) {
    if (unit.band.s_q > kSmallQueries || unit.band.s_kv > kSmallKeys) return false;
    if (p.bias || p.mask || p.slopes || p.sinks || p.segments_q || p.intervals || p.dropout_threshold) return false;
    if (p.head_dim_qk > Op::kChain || p.scale <= 0 || p.softcap) return false;
    return can_hold_sums<Word>(p.dtype, p.head_dim_qk);
  }

  int64 bytes() const { return bytes_; }

  // Whether it was computed; else nothing was written.
  bool forward() {
    if (is_extreme(tensors_.v(), band_.s_kv, panels_v_)) return false;
    pack(tensors_.k(), p_.head_dim_qk, k_);
    for (Word& sink : never_) sink = kNever<Word>;
    for (int head = first_head_; head < after_head_; ++head) {
      for (int i = 0; i < band_.s_q; i += kTileRows) add_strip(head, i, fa::smaller(kTileRows, band_.s_q - i));
      finish(head);
    }
    return true;
  }

  // The same, for the gradients of q, k and v.
  bool backward() {
    if (is_extreme(tensors_.k(), band_.s_kv, panels_qk_)) return false;
    for (int head = first_head_; head < after_head_; ++head)
      if (is_extreme(tensors_.q(head), band_.s_q, panels_qk_) || is_extreme(tensors_.dout(head), band_.s_q, panels_v_))
        return false;
    pack(tensors_.k(), p_.head_dim_qk, k_);
    pack(tensors_.v(), p_.head_dim_v, v_);
    Matrix<Word> const dk = words_of<Word>(tensors_.dk()), dv = words_of<Word>(tensors_.dv());
    for (int j = 0; j < band_.s_kv; ++j) {
      clear(dk.at + j * dk.stride, p_.head_dim_qk);
      clear(dv.at + j * dv.stride, p_.head_dim_v);
    }
    for (int head = first_head_; head < after_head_; ++head) {
      read_ends(head);
      for (int i = 0; i < band_.s_q; i += kTileRows) weigh_strip(head, i, fa::smaller(kTileRows, band_.s_q - i));
      add_rows_of(weights_, tensors_.dout(head), panels_v_, dv);
      add_rows_of(gradients_, tensors_.q(head), panels_qk_, dk);
    }
    scale_rows(dk, band_.s_kv, p_.head_dim_qk, to_score_);
    return true;
  }

  // Calls put with each row of a head: its exponentials, of whole vectors of keys, and the factor that makes them weights.
  template <class Put>
  void weigh_all(Put const& put) {
    pack(tensors_.k(), p_.head_dim_qk, k_);
    for (int head = first_head_; head < after_head_; ++head)
      for (int i = 0; i < band_.s_q; i += kTileRows) weigh_rows(head, i, fa::smaller(kTileRows, band_.s_q - i), put);
  }

  // The gradients of q and k out of those of the weights, where `row_of` gives the ones of a head's row. Whether they were
  // computed, as above.
  template <class RowOf>
  bool weights_backward(RowOf const& row_of) {
    if (is_extreme(tensors_.k(), band_.s_kv, panels_qk_)) return false;
    for (int head = first_head_; head < after_head_; ++head)
      if (is_extreme(tensors_.q(head), band_.s_q, panels_qk_)) return false;
    pack(tensors_.k(), p_.head_dim_qk, k_);
    Matrix<Word> const dk = words_of<Word>(tensors_.dk());
    for (int j = 0; j < band_.s_kv; ++j) clear(dk.at + j * dk.stride, p_.head_dim_qk);
    for (int head = first_head_; head < after_head_; ++head) {
      Matrix<Word> const dq = words_of<Word>(tensors_.dq(head));
      for (int i = 0; i < band_.s_q; i += kTileRows) {
        int const count = fa::smaller(kTileRows, band_.s_q - i);
        weigh_rows(head, i, count, [&](int, int row, Word const* weights, Word factor) {
          weigh_gradients(weights, factor, row_of(head, row), gradients_ + row * line_);
        });
        multiply_rows(count, {gradients_ + i * line_, line_}, fa::tile_range(band_, i, i + count), tensors_.k(),
                      panels_qk_, from_row_of(dq, i));
      }
      scale_rows(dq, band_.s_q, p_.head_dim_qk, to_score_);
      add_rows_of(gradients_, tensors_.q(head), panels_qk_, dk);
    }
    scale_rows(dk, band_.s_kv, p_.head_dim_qk, to_score_);
    return true;
  }

 private:
  // Scores of a few rows become exponentials, which put takes.
  template <class Put>
  void weigh_rows(int head, int i, int count, Put const& put) {
    multiply_packed(count, as_words<Op>(from_row(tensors_.q(head), i)), p_.head_dim_qk, k_, strip_.scores);
    soften_rows(i, count);
    for (int n = 0; n < count; ++n) {
      Word const total = state_.total[i + n];
      put(head, i + n, strip_.scores.at + n * line_, total == 0 ? Word(0) : 1 / total);
    }
  }

  // Scores of a strip become exponentials, whose sums and largest scores the state takes. The largest are found first, in a
  // loop of their own: the exponentials of a row wait for its largest score.
  void soften_rows(int i, int count) {
    Word* const scores = strip_.scores.at;
    for (int n = 0; n < count; ++n)
      state_.most[i + n] = largest_in_band({0, columns_}, fa::tile_range(band_, i + n, i + n + 1), scores + n * line_);
    for (int n = 0; n < count; ++n) {
      Word const most = state_.most[i + n], shift = most == kNever<Word> ? 0 : most;
      state_.total[i + n] = weigh<Op, false>(scores + n * line_, columns_, shift, Word(p_.scale * kLog2E), {nullptr, 0},
                                             scores + n * line_);
    }
  }

  // Gradients of weights, dp, become those of scores: p (dp - sum p dp).
  void weigh_gradients(Word const* weights, Word factor, Word const* dp, Word* to) const {
    using V = Vector<Word>;
    V total{};
    for (int c = 0; c < columns_; c += kCount<Word>) {
      V const p = load(weights + c);
      total += p == V{} ? p : p * load(dp + c);
    }
    Word const mean = sum(total) * factor;
    for (int c = 0; c < columns_; c += kCount<Word>) {
      V const p = load(weights + c) * factor;
      store(to + c, p == V{} ? p : p * (load(dp + c) - mean));
    }
  }

  bool is_extreme(Source const& from, int count, Panels const& panels) const {
    Matrix<Word const> const rows = as_words<Op>(from);
    Largest<Op> largest;
    for (int n = 0; n < count; ++n)
      for (int c = 0; c < panels.vectors; ++c) largest.add(load(rows.at + n * rows.stride + c * kCount<Word>));
    return largest.is_extreme();
  }

  void pack(Source const& from, int64 dim, Word* to) const {
    for (int first = 0; first < band_.s_kv; first += kPanel<Word>)
      pack_panel_of<Op>(from_row(from, first), fa::smaller(kPanel<Word>, band_.s_kv - first), 0, dim, {rows_, dim},
                        to + first * dim);
  }

  // Products of rows with all keys, or with all values.
  void multiply_packed(int count, Matrix<Word const> rows, int64 dim, Word const* packed, Matrix<Word> to) const {
    for (int c = 0; c < columns_; c += kPanel<Word>)
      multiply<Op>(kSet, count, fa::smaller(columns_ - c, kPanel<Word>) / kCount<Word>, dim, rows,
                   {packed + c * dim, kPanel<Word>}, {to.at + c, to.stride});
  }

  // Rows of words, times rows of a tensor, into rows of a result.
  void multiply_rows(int count, Matrix<Word const> left, Range keys, Source const& right, Panels const& panels,
                     Matrix<Word> to) const {
    Matrix<Word const> const rows = as_words<Op>(from_row(right, keys.begin));
    for (int n = 0; n < panels.count; ++n)
      multiply<Op>(kSet, count, panels.width(n), keys.end - keys.begin, {left.at + keys.begin, left.stride},
                   {rows.at + panels.begin(n) * kCount<Word>, rows.stride},
                   {to.at + panels.begin(n) * kCount<Word>, to.stride});
  }

  static void scale_rows(Matrix<Word> rows, int count, int64 dim, Word factor) {
    for (int n = 0; n < count; ++n, rows.at += rows.stride)
      for (int64 c = 0; c < dim; c += kCount<Word>) store(rows.at + c, load(rows.at + c) * factor);
  }

  static Matrix<Word> from_row_of(Matrix<Word> rows, int n) { return {rows.at + n * rows.stride, rows.stride}; }

  // Sums of weights and of weighted values, of a few rows of a head.
  void add_strip(int head, int i, int count) {
    multiply_packed(count, as_words<Op>(from_row(tensors_.q(head), i)), p_.head_dim_qk, k_, strip_.scores);
    soften_rows(i, count);
    multiply_rows(count, {strip_.scores.at, line_}, fa::tile_range(band_, i, i + count), tensors_.v(), panels_v_,
                  from_row_of(words_of<Word>(tensors_.out(head)), i));
  }

  void finish(int head) {
    Matrix<Word> const out = words_of<Word>(tensors_.out(head));
    finish_rows(state_, never_, to_score_, band_.s_q, finished_);
    for (int i = 0; i < band_.s_q; ++i) scale_rows(from_row_of(out, i), 1, p_.head_dim_v, finished_.factor[i]);
    if (!p_.lse) return;  // null where it is not wanted
    int64 const at = tensors_.lse(head), bytes = band_.s_q * sizeof(Word);
    __builtin_memcpy(static_cast<Word*>(p_.lse) + at, finished_.lse, bytes);
    __builtin_memcpy(static_cast<Word*>(p_.lse_low) + at, finished_.low, bytes);
  }

  // lse and delta of a head's rows.
  void read_ends(int head) const {
    int64 const at = tensors_.lse(head);
    for (int i = 0; i < band_.s_q; ++i) {
      Word const lse = static_cast<Word const*>(p_.lse)[at + i];
      lse_[i] = lse != kNever<Word> ? lse : 0;  // a row without keys has no weights at all
      low_[i] = p_.lse_low ? static_cast<Word const*>(p_.lse_low)[at + i] : 0;
      delta_[i] = p_.dlse ? -static_cast<Word const*>(p_.dlse)[at + i] : 0;
    }
    add_dots(tensors_.out(head), tensors_.dout(head), band_.s_q, 0, p_.head_dim_v, delta_);
  }

  // Weights and score gradients of a few rows, and what they give for dq.
  void weigh_strip(int head, int i, int count) {
    Matrix<Word> const dq = from_row_of(words_of<Word>(tensors_.dq(head)), i);
    multiply_packed(count, as_words<Op>(from_row(tensors_.q(head), i)), p_.head_dim_qk, k_, strip_.scores);
    multiply_packed(count, as_words<Op>(from_row(tensors_.dout(head), i)), p_.head_dim_v, v_, strip_.dweights);
    for (int n = 0; n < count; n += 2) {
      for (int x = 0; x < 2; ++x) {
        int const row = n + x < count ? i + n + x : i;  // a row of a pair alone: what keeps nothing is not read
        pair_.row[x].kept = n + x < count ? fa::tile_range(band_, row, row + 1) : Range{0, 0};
        pair_.end[x] = {lse_[row], low_[row], delta_[row]};
      }
      Word* const gradients = gradients_ + (i + n) * line_;
      weigh_pair<Op, kBand, false>(strip_, n, {0, columns_}, pair_,
                                   {{gradients, line_}, weights_ + (i + n) * line_, gradients, line_});
    }
    multiply_rows(count, {gradients_ + i * line_, line_}, fa::tile_range(band_, i, i + count), tensors_.k(), panels_qk_,
                  dq);
    scale_rows(dq, count, p_.head_dim_qk, to_score_);
  }

  // What all rows add to dv, by their weights and dout, or to dk.
  void add_rows_of(Word const* left, Source const& right, Panels const& panels, Matrix<Word> const& sums) const {
    Matrix<Word const> const rows = as_words<Op>(right);
    for (int j = 0; j < band_.s_kv; j += kTileRows) {
      int const end = fa::smaller(j + kTileRows, band_.s_kv);
      Range const some = fa::tile_range(fa::transposed(band_), j, end);
      for (int n = 0; n < panels.count && !is_empty(some); ++n)
        multiply<Op, true>(kAdd, end - j, panels.width(n), some.end - some.begin,
                           {left + some.begin * line_ + j, line_},
                           {rows.at + some.begin * rows.stride + panels.begin(n) * kCount<Word>, rows.stride},
                           {sums.at + j * sums.stride + panels.begin(n) * kCount<Word>, sums.stride});
    }
  }

  AttentionParams const& p_;
  Tensors tensors_;
  fa::Band const& band_;
  int first_head_, after_head_;
  Panels panels_qk_, panels_v_;
  int columns_;  // keys in whole vectors
  int64 line_;  // words from row to row of weights
  Word to_score_;
  int64 bytes_;
  Word *rows_, *k_, *v_;  // packed keys and values
  Strip<Word> strip_;
  Word *weights_, *gradients_, *lse_, *low_, *delta_;  // of all rows of a head
  RowState<Word, kSmallQueries> state_;
  FinishedRows<Word, kSmallQueries> finished_;
  alignas(64) Word never_[kSmallQueries];  // in place of sinks
  PairTerms<Word> pair_{};
};

}  // namespace
