// The backward pass of one item: some parts of the keys of one unit, and all heads that read them.
//
// A part's keys and values stay packed, with sums for their gradients, for all heads and blocks of queries. For each
// block of keys and of queries: strips of scores and weight gradients, made into weights and score gradients, which dq
// takes at once; then dk and dv, whose left operands are the weights and gradients as they are stored.
#pragma once

#include <sched.h>

#include "parts.h"

namespace {

// Bytes of packed queries up to which they are kept from part to part.
template <class Op>
constexpr int64 kMostPacked = (8 << 20) * Op::kPerWord;

template <class Op>
class Backward {
  template <class>
  friend class BackwardJvp;
  template <class>
  friend class StatisticsBackward;
  using Word = typename Op::Word;
  static constexpr int kKeys = kBackwardKeys;
  static constexpr int64 kStrip = Filled<Op, kKeys>::kStride;  // words from row to row of a strip

 public:
  __attribute__((noinline)) Backward(AttentionParams const& p, BackwardItem const& item, void* memory)
      : p_(p),
        item_(item),
        tensors_{p, item.unit},
        scores_(p, item.unit),
        band_(item.unit.band),
        group_(scores_.group()),
        block_rows_(rows_of_block(band_.s_q, p.intervals != nullptr)),
        parts_(band_, block_rows_),
        words_(block_rows_ / Op::kPerWord),
        padded_rows_(rounded_up(band_.s_q, block_rows_)),
        packed_keys_(rounded_up(fa::smaller(parts_.keys_of_each, fa::larger(band_.s_kv, 1)), kKeys)),
        dim_qk_((p.head_dim_qk + Op::kPerWord - 1) / Op::kPerWord),
        dim_v_((p.head_dim_v + Op::kPerWord - 1) / Op::kPerWord),
        columns_qk_(rounded_up(p.head_dim_qk, kCount<Word>)),
        columns_v_(rounded_up(p.head_dim_v, kCount<Word>)),
        panels_(columns_qk_ / kCount<Word>),
        panels_v_(columns_v_ / kCount<Word>),
        arena_(memory),
        packer_(p, item.unit, block_rows_, padded_rows_, arena_) {
    take_queries(memory);
    take_keys();
    bytes_ = arena_.end() - int64(reinterpret_cast<uint64>(memory));
  }

  int64 bytes() const { return bytes_; }
  int64 share_words() const { return group_ * padded_rows_ * columns_qk_; }

  void run(Prefetch& prefetch) {
    run_with(prefetch, [this](auto const&... strip) { run_strip(strip...); });
  }

  // The pass with another step for each strip.
  template <class Strip>
  void run_with(Prefetch& prefetch, Strip const& run_strip) {
    prefetch_ = &prefetch;
    rows_at_once_ = 1 + prefetch.all() * kTileRows / fa::larger(1, band_.s_q * group_);
    if (p_.segments_q) segments_.look(scores_.segments_kv(), {0, band_.s_kv}, runs_);
    if (p_.dsinks && item_.parts.begin == 0) add_sinks();
    for (int part = item_.parts.begin; part < item_.parts.end; ++part) run_part(part, run_strip);
  }

  // dq out of the shares of all parts, in their order.
  void add_shares(Word* shares) {
    for (int g = 0; g < group_; ++g) {
      Matrix<Word> const all{shares + g * padded_rows_ * columns_qk_, columns_qk_};
      for (int part = 1; part < parts_.count(); ++part) {
        Range const rows = parts_.rows(part);
        add_rows(all, all.at + part * share_words() + rows.begin * columns_qk_, columns_qk_,
                 {rows.begin, fa::smaller(rows.end, band_.s_q)});
      }
      write_dq(g, all, {0, band_.s_q});
    }
  }

 private:
  // --- memory

  Queries<Op>& queries_of(int g) { return kept_heads_ ? heads_[g] : heads_[0]; }

  void take_queries(void* memory) {
    Queries<Op> one;
    Arena probe(nullptr);
    one.take(probe, p_, block_rows_, padded_rows_, true);
    kept_heads_ = probe.end() * group_ <= kMostPacked<Op> ? group_ : 0;
    int const count = fa::larger(1, kept_heads_);
    heads_ = arena_.take<Queries<Op>>(count);
    for (int n = 0; n < count; ++n) {
      Queries<Op> head;
      head.take(arena_, p_, block_rows_, padded_rows_, kept_heads_ > 0);
      if (memory) heads_[n] = head;
    }
    adds_in_place_ = can_hold_sums<Word>(p_.dtype, p_.head_dim_qk);
    totals_ = arena_.take<Word>(p_.dq && !item_.dq_shares && !adds_in_place_ ? share_words() : 0);
    dq_ = arena_.take<Word>(p_.dq ? block_rows_ * columns_qk_ : 0);
  }

  // Where dq of a head is summed, before the factor `scale`: in the result, where that is as wide as the arithmetic.
  Matrix<Word> totals_of(int g) const {
    if (!adds_in_place_) return {totals_ + g * padded_rows_ * columns_qk_, columns_qk_};
    return words_of<Word>(tensors_.dq(scores_.first_head() + g));
  }

  void take_keys() {
    int64 const row = rounded_up(p_.head_dim_qk > p_.head_dim_v ? p_.head_dim_qk : p_.head_dim_v, kGroup<Op>);
    rows_ = arena_.take<Word>(kPanel<Word> * row / Op::kPerWord);
    k_ = arena_.take<Word>(packed_keys_ * dim_qk_);
    v_ = arena_.take<Word>(packed_keys_ * dim_v_);
    k_stacked_ = arena_.take<Word>(packed_keys_ / Op::kPerWord * columns_qk_);
    dk_ = {arena_.take<Word>(p_.dk && !adds_in_place_ ? packed_keys_ * columns_qk_ : 0), columns_qk_};
    dv_ = {arena_.take<Word>(p_.dv && !can_hold_sums<Word>(p_.dtype, p_.head_dim_v) ? packed_keys_ * columns_v_ : 0),
           columns_v_};
    extreme_ = arena_.take<bool>(packed_keys_ / kPanel<Word>);
    ranges_ = arena_.take<Range>(p_.intervals_count * block_rows_);
    runs_ = arena_.take<Ids>(p_.segments_q ? Segments::runs(band_.s_kv) : 0);
    strip_.scores = {arena_.take<Word>(kTileRows * kStrip), kStrip};
    strip_.dweights = {arena_.take<Word>(kTileRows * kStrip), kStrip};
    gradient_rows_ = {arena_.take<Word>(kTileRows * kStrip), kStrip};
    filled_.weights = arena_.take<Word>(words_ * kStrip);
    filled_.gradients = arena_.take<Word>(words_ * kStrip);
  }

  // --- one part

  template <class Strip>
  void run_part(int part, Strip const& run_strip) {
    Range const keys = parts_.keys(part);
    begin_ = keys.begin;
    pack_keys(keys);
    begin_sums(keys);
    for (int g = 0; g < group_; ++g) {
      int const head = scores_.first_head() + g;
      Matrix<Word> const dq = begin_dq(part, g);
      Range const rows = parts_.rows(part);
      for (first_ = rows.begin; first_ < rows.end; first_ += block_rows_) {
        packer_.need_block(head, first_, queries_of(g));
        wait();
        auto const step = [&](int count, Range block) { run_keys(head, queries_of(g), count, block, run_strip); };
        begin_block(part, dq);
        bool const is_used = for_each_block(head, first_, keys, step);
        finish_block(dq, is_used);
        if (item_.progress) __atomic_store_n(item_.progress, ++step_, __ATOMIC_RELEASE);
      }
      finish_dq(part, g, dq);
    }
    write_keys(keys);
  }

  // Until the unit before has added to dbias what it does for this block; or for all of them, where heads, rows or keys
  // share its numbers and more than one block adds to the same ones.
  FA_CALLED void wait() const {
    if (!item_.before) return;
    bool const is_shared = (!p_.dbias_head && group_ > 1) || !p_.dbias_row || !p_.dbias_key;
    int64 needed = step_ + 1;
    if (is_shared) {
      needed = 0;
      for (int part = item_.parts.begin; part < item_.parts.end; ++part)
        needed += group_ * (parts_.rows(part).end - parts_.rows(part).begin) / block_rows_;
    }
    while (__atomic_load_n(item_.before, __ATOMIC_ACQUIRE) < needed) sched_yield();
  }

  // Sums for dk and dv, zero at first: in the results, where these are as wide as the arithmetic.
  void begin_sums(Range keys) {
    auto const begin = [&](Matrix<Word>& sums, Source const& result, int64 dim, int64 columns) {
      if (can_hold_sums<Word>(p_.dtype, dim)) sums = words_of<Word>(from_row(result, keys.begin));
      for (int64 n = 0; n < keys.end - keys.begin; ++n) clear(sums.at + n * sums.stride, columns);
    };
    if (p_.dk) begin(dk_, tensors_.dk(), p_.head_dim_qk, columns_qk_);
    if (p_.dv) begin(dv_, tensors_.dv(), p_.head_dim_v, columns_v_);
  }

  // Where this part's share of a head's dq goes, zero at first.
  Matrix<Word> begin_dq(int part, int g) {
    if (!p_.dq) return {nullptr, 0};
    Matrix<Word> to{nullptr, columns_qk_};
    if (item_.dq_shares)
      to.at = reinterpret_cast<Word*>(item_.dq_shares) + part * share_words() + g * padded_rows_ * columns_qk_;
    else to = totals_of(g);
    Range rows{parts_.begun(part - 1), parts_.begun(part)};
    if (item_.dq_shares) rows = part ? parts_.rows(part) : Range{0, band_.s_q};
    int64 const end = adds_in_place_ && !item_.dq_shares ? rows.end : rounded_up(rows.end, block_rows_);
    for (int64 i = rows.begin; i < end; ++i) clear(to.at + i * to.stride, columns_qk_);
    return to;
  }

  // Where a block adds up dq: at its place, if no part before has added to its rows; else apart, so that the sum of a part
  // is the same as one that a thread of its own computes.
  void begin_block(int part, Matrix<Word> dq) {
    bool const is_first = item_.dq_shares || (!adds_in_place_ && first_ >= parts_.begun(part - 1));
    block_dq_ = {dq_, columns_qk_};
    if (is_first) block_dq_ = {dq.at + first_ * dq.stride, dq.stride};
    else clear(dq_, p_.dq ? block_rows_ * columns_qk_ : 0);
  }

  void finish_block(Matrix<Word> dq, bool is_used) const {
    if (p_.dq && is_used && block_dq_.at == dq_)
      add_rows(dq, dq_, columns_qk_, {first_, fa::smaller(first_ + block_rows_, band_.s_q)});
  }

  // Writes the rows of dq that this part is the last to add to, while they are in a cache.
  FA_CALLED void finish_dq(int part, int g, Matrix<Word> dq) const {
    if (p_.dq && !item_.dq_shares) write_dq(g, dq, {parts_.finished(part - 1), parts_.finished(part)});
  }

  void pack_keys(Range keys) {
    int64 const stride_v = rounded_up(p_.head_dim_v, kGroup<Op>) / Op::kPerWord;
    Matrix<Word> const k{rows_, rounded_up(p_.head_dim_qk, kGroup<Op>) / Op::kPerWord}, v{rows_, stride_v};
    has_extreme_keys_ = false;
    for (int first = keys.begin; first < keys.end; first += kPanel<Word>) {
      int const count = fa::smaller(kPanel<Word>, keys.end - first), padded = int(rounded_up(count, kCount<Word>));
      int const at = first - keys.begin, there = band_.s_kv - first;
      if (p_.v) pack_panel_of<Op>(from_row(tensors_.v(), first), count, there, p_.head_dim_v, v, v_ + at * dim_v_);
      if (!p_.k) continue;
      Source const from = from_row(tensors_.k(), first);
      pack_panel_of<Op>(from, count, there, p_.head_dim_qk, k, k_ + at * dim_qk_);
      int64 const all = packed_keys_ / Op::kPerWord, line = at / Op::kPerWord;
      bool& is_extreme = extreme_[at / kPanel<Word>];
      is_extreme = true;
      if (padded == count && are_words<Op>(from, p_.head_dim_qk))
        is_extreme = stack_rows<Op>(from, count, there, panels_, all, line, k_stacked_);
      if (!is_extreme) continue;
      is_extreme = pack_rows<Op>(from, count, there, padded, p_.head_dim_qk, k);
      has_extreme_keys_ |= is_extreme;
      if (is_extreme) drop_nonfinite<Op>(k, count, p_.head_dim_qk, 1);
      pack_stacked<Op>(k, padded, panels_, all, line, k_stacked_);
    }
  }

  // --- one block of keys, and of queries

  // Calls step with the number of query rows, and with each block of keys that they look at. Whether they keep any pair.
  // dq stays in the first cache, keys and their gradients in the second.
  template <class Step>
  bool for_each_block(int head, int first, Range part, Step const& step) {
    int const end = fa::smaller(first + block_rows_, band_.s_q);
    Range seen = common(fa::tile_range(band_, first, end), part);
    if (p_.intervals && !is_empty(seen)) seen = kept_.read(scores_.intervals, band_, head, {first, end}, part, ranges_);
    if (is_empty(seen)) return false;
    int const begin = part.begin + (seen.begin - part.begin) / kKeys * kKeys;
    for (int key = begin; key < seen.end; key += kKeys)
      step(int(rounded_up(end - first, 2)), Range{key, fa::smaller(key + kKeys, part.end)});
    return true;
  }

  template <class Strip>
  void run_keys(int head, Queries<Op> const& queries, int count, Range keys, Strip const& run_strip) {
    filled_.reset();
    for_each_piece(head, count, keys,
                   [&](int r, int rows, Seen const& seen) { run_strip(head, queries, r, rows, keys, seen); });
    filled_.finish(keys.end - keys.begin);
    add_to_keys(head, queries, first_, keys);
  }

  // Calls step with the strips of a block that look at some keys: their first row, how many there are, and what they see.
  template <class Step>
  void for_each_piece(int head, int count, Range keys, Step const& step) {
    auto const visit = [&](int r, int rows, Range piece, bool is_whole) {
      int const i = first_ + r, there = fa::smaller(rows, band_.s_q - i);
      Seen seen = seen_by(scores_, segments_, piece, there, [head](int) { return head; }, [i](int n) { return i + n; });
      seen.is_whole &= is_whole;
      if (!is_empty(seen.keys)) step(r, rows, seen);
    };
    for (int r = 0, end; r < count; r = end) {
      int const last = fa::smaller(r + kTileRows, count);
      end = p_.intervals ? kept_.strip_end(first_ + r, first_ + last) - first_ : last;
      Range const rows{first_ + r, fa::smaller(first_ + end, band_.s_q)};
      if (!p_.intervals) visit(r, end - r, common(fa::tile_range(band_, rows.begin, rows.end), keys), true);
      else kept_.each_piece(rows, keys, kCount<Word>, [&](auto... piece) { visit(r, end - r, piece...); });
    }
  }

  // What a block of queries adds to the gradients of a block of keys.
  void add_to_keys(int head, Queries<Op> const& queries, int first, Range keys) const {
    if (p_.dv) multiply_rows(filled_.weights, packer_.dout_lines(queries, first), panels_v_, keys, dv_);
    if (p_.dk) multiply_rows(filled_.gradients, packer_.q_lines(queries, first), panels_, keys, dk_);
    add_nonfinite_rows(head, queries, first, keys);
  }

  // What the band or ranges keep of a row, counted from the first key of the block.
  Range kept(int i, Range keys, Range seen) const {
    Range const whole = i >= band_.s_q ? Range{0, 0} : p_.intervals ? kept_.in(i, seen).hull() : scores_.kept(i);
    Range const found = common(whole, seen);
    return is_empty(found) ? Range{0, 0} : Range{found.begin - keys.begin, found.end - keys.begin};
  }

  void run_strip(int head, Queries<Op> const& queries, int r, int count, Range keys, Seen const& seen_keys) {
    Range const seen = seen_keys.keys, columns = columns_of<Word>(seen, keys.begin);
    int64 const row = first_ + r;
    prefetch_terms(head, int(row), count, seen);
    fill(keys, seen, r, count);
    multiply_keys(count, queries.rows_of(queries.q, row), dim_qk_, k_, keys, columns, strip_.scores);
    multiply_keys(count, queries.rows_of(queries.dout, row), dim_v_, v_, keys, columns, strip_.dweights);
    auto const weigh = [&](auto terms, auto drops) {
      for (int n = 0; n < count; n += 2) {
        PairTerms<Word> pair;
        for (int x = 0; x < 2; ++x)
          if (terms == kBand) read_ends(queries, int(row) + n + x, keys, seen, x, pair);
          else read_terms(head, queries, int(row) + n + x, keys, seen, columns, x, pair);
        weigh_pair<Op, terms, drops>(strip_, n, columns, pair, target(r, n));
      }
    };
    Terms const found = terms_of(scores_, seen_keys);
    if (!p_.dropout_threshold) with_terms(found, [&](auto terms) { weigh(terms, std::false_type()); });
    else if (kIsSpecialised && found <= kHidden) weigh(std::integral_constant<Terms, kHidden>(), std::true_type());
    else weigh(std::integral_constant<Terms, kAll>(), std::true_type());
    prefetch_->step(rows_at_once_);
    add_to_queries(head, row, count, keys, columns, seen);
  }

  FA_CALLED void prefetch_terms(int head, int first, int count, Range seen) const {
    for (int n = first; n < fa::smaller(first + count, band_.s_q); ++n) scores_.prefetch_terms(head, n, count, seen);
  }

  // What a strip adds to the gradients of its queries.
  void add_to_queries(int head, int64 row, int count, Range keys, Range columns, Range seen) const {
    if (!p_.dq) return;
    int const end = seen.end - keys.begin;
    int64 const skipped = (seen.begin - keys.begin - columns.begin) / Op::kPerWord;  // words of zeros
    int64 const depth = (end - columns.begin + Op::kPerWord - 1) / Op::kPerWord - skipped;
    add_dq(row, count, skipped, depth, keys.begin + columns.begin + int(skipped) * Op::kPerWord);
    if (has_extreme_keys_) add_nonfinite_keys(head, int(row), count, keys, columns, seen);
  }

  FA_CALLED void fill(Range keys, Range seen, int r, int count) {
    filled_.add({seen.begin - keys.begin, seen.end - keys.begin}, {r, r + count});
  }

  PairTarget<Word> target(int r, int n) const {
    int64 const line = (r + n) / Op::kPerWord * kStrip;
    return {{gradient_rows_.at + n * kStrip, kStrip}, filled_.weights + line, filled_.gradients + line, kStrip};
  }

  void multiply_keys(int count, Matrix<Word const> rows, int64 depth, Word const* packed, Range keys, Range columns,
                     Matrix<Word> to, Form form = kSet) const {
    for (int c = columns.begin, end; c < columns.end; c = end) {
      int const panel = c / kPanel<Word> * kPanel<Word>;
      end = fa::smaller(columns.end, panel + kPanel<Word>);
      Word const* const right = packed + (keys.begin - begin_ + panel) * depth + (c - panel);
      multiply_in_chains<Op>(form, count, (end - c) / kCount<Word>, depth, rows, {right, kPanel<Word>},
                             {to.at + c, to.stride});
    }
  }

  // The terms of row i where nothing but what is kept stands between products and scores.
  void read_ends(Queries<Op> const& queries, int i, Range keys, Range seen, int n, PairTerms<Word>& to) const {
    to.row[n].kept = kept(i, keys, seen);
    to.end[n] = {queries.lse[i], queries.low[i], queries.delta[i]};
    to.to_score = scores_.to_score;
  }

  // The terms of row i, which is the first or the second of a pair.
  void read_terms(int head, Queries<Op> const& queries, int i, Range keys, Range seen, Range columns, int n,
                  PairTerms<Word>& to) {
    read_ends(queries, i, keys, seen, n, to);
    Range const kept = to.row[n].kept;
    int const row = i < band_.s_q ? i : 0;
    to.row[n] = scores_.row(head, row, keys.begin, kept, n);
    if (p_.intervals && !is_empty(kept)) {
      Ranges const ranges = kept_.in(i, seen);
      if (ranges.count > 1) scores_.hide_gaps(to.row[n], ranges, keys.begin, n);
    }
    to.survivor = Word(p_.dropout_scale);
    to.dropped[n] = {nullptr, int(p_.dropout_threshold)};
    to.dbias[n] = {nullptr, p_.dbias_dtype, !p_.dbias_key, p_.dbias_adds != 0};
    if (p_.dropout_threshold) {
      int const begin = keys.begin + columns.begin, first = begin / 32 * 32;
      random_bits(p_.rng_state, item_.unit.b * p_.heads_q + head, i, first, keys.begin + columns.end, bits_[n]);
      to.dropped[n].bits = bits_[n] + (begin - first);
    }
    if (p_.dbias && !is_empty(kept))
      to.dbias[n].at = static_cast<char*>(p_.dbias) +
                       bytes_of(p_.dbias_dtype) * (item_.unit.b * p_.dbias_batch + head * p_.dbias_head +
                                                   i * p_.dbias_row + keys.begin * p_.dbias_key);
  }

  void add_dq(int64 row, int count, int64 word, int64 depth, int key) const {
    for (int n = 0; n < panels_.count; ++n) {
      int64 const width = panels_.width(n) * kCount<Word>, column = panels_.begin(n) * kCount<Word>;
      Word const* const right =
          k_stacked_ + column * (packed_keys_ / Op::kPerWord) + (key - begin_) / Op::kPerWord * width;
      multiply<Op>(kAdd, count, panels_.width(n), depth, {gradient_rows_.at + word, kStrip}, {right, width},
                   {block_dq_.at + (row - first_) * block_dq_.stride + column, block_dq_.stride});
    }
  }

  // What weights or gradients, times lines of queries or dout, add to rows of dv or dk.
  void multiply_rows(Word const* left, Lines<Op> const& lines, Panels const& panels, Range keys,
                     Matrix<Word> sums) const {
    Word* const to = sums.at + (keys.begin - begin_) * sums.stride;
    for (int n = 0; n < panels.count; ++n)
      filled_.each([&](Range tile, Range rows) {
        int64 const line = rows.begin / Op::kPerWord, depth = rows.end / Op::kPerWord - line;
        multiply<Op, true>(kAdd, tile.end - tile.begin, panels.width(n), depth,
                           {left + line * kStrip + tile.begin, kStrip}, lines.panel(panels, n, line),
                           {to + tile.begin * sums.stride + panels.begin(n) * kCount<Word>, sums.stride});
      });
  }

  // --- where numbers are not finite

  void add_nonfinite_keys(int head, int row, int count, Range keys, Range columns, Range seen) const {
    for (int j = seen.begin; j < seen.end; ++j) {
      if (!extreme_[(j - begin_) / kPanel<Word>]) continue;
      for (int n = 0; n < count && row + n < band_.s_q; ++n)
        if (scores_.keeps(head, row + n, j))
          add_nonfinite(element<Op>(gradient_rows_.at + n * kStrip, j - keys.begin - columns.begin), tensors_.k(), j,
                        p_.head_dim_qk, block_dq_.at + (row - first_ + n) * block_dq_.stride);
    }
  }

  void add_nonfinite_rows(int head, Queries<Op> const& queries, int first, Range keys) const {
    int64 const block = (first - queries.begin) / block_rows_;
    bool const is_extreme_q = p_.dk && queries.extreme_q[block], is_extreme_dout = p_.dv && queries.extreme_dout[block];
    if (!is_extreme_q && !is_extreme_dout) return;
    for (int i = first; i < fa::smaller(first + block_rows_, band_.s_q); ++i)
      for (int j = keys.begin; j < keys.end; ++j) {
        if (!scores_.keeps(head, i, j)) continue;
        int const c = j - keys.begin;
        int64 const at = (i - first) / Op::kPerWord * kStrip + c;
        int const part = (i - first) % Op::kPerWord;
        if (is_extreme_dout)
          add_nonfinite(element<Op>(filled_.weights + at, part), tensors_.dout(head), i, p_.head_dim_v,
                        dv_.at + (j - begin_) * dv_.stride);
        if (is_extreme_q)
          add_nonfinite(element<Op>(filled_.gradients + at, part), tensors_.q(head), i, p_.head_dim_qk,
                        dk_.at + (j - begin_) * dk_.stride);
      }
  }

  // --- results

  void add_sinks() {
    for (int g = 0; g < group_; ++g) {
      int const head = scores_.first_head() + g;
      packer_.pack(head, queries_of(g));
      Queries<Op> const& of = queries_of(g);
      auto const* const lse = static_cast<Word const*>(p_.lse) + tensors_.lse(head);
      double total = 0;
      for (int i = 0; i < band_.s_q; ++i)
        if (lse[i] != kNever<Word>)
          total -= __builtin_exp(double(scores_.sink(head)) - of.lse[i] - of.low[i]) * of.delta[i];
      static_cast<Word*>(p_.dsinks)[item_.unit.b * p_.heads_q + head] = Word(total);
    }
  }

  void write_dq(int g, Matrix<Word> totals, Range rows) const {
    write_rows<Word>({totals.at + rows.begin * totals.stride, totals.stride}, p_.head_dim_qk, Word(p_.scale),
                     tensors_.dq(scores_.first_head() + g), rows);
  }

  void write_keys(Range keys) const {
    if (p_.dk) write_rows<Word>({dk_.at, dk_.stride}, p_.head_dim_qk, Word(p_.scale), tensors_.dk(), keys);
    if (p_.dv && !can_hold_sums<Word>(p_.dtype, p_.head_dim_v))
      write_rows<Word>({dv_.at, dv_.stride}, p_.head_dim_v, 1, tensors_.dv(), keys);
  }

  AttentionParams const& p_;
  BackwardItem const& item_;
  Tensors tensors_;
  Scores<Word> scores_;
  fa::Band const& band_;
  int group_;
  int kept_heads_ = 0;  // heads whose queries are packed once: all, or none, where they are packed block by block
  bool adds_in_place_ = false;
  int block_rows_;
  Parts parts_;
  int64 words_;  // of a block of query rows, along the contraction over them
  int64 padded_rows_, packed_keys_, dim_qk_, dim_v_, columns_qk_, columns_v_;
  Panels panels_, panels_v_;
  Arena arena_;
  QueryPacker<Op> packer_;
  Segments segments_;
  Ids* runs_;
  Range* ranges_;  // of the rows of a block, for each as many as a call has
  BlockRanges<kMostRows> kept_;
  Queries<Op>* heads_;
  Word *totals_, *dq_;  // dq of all heads, and what one block of queries and one part give
  Word *rows_, *k_, *v_, *k_stacked_;  // keys and values of a part: operands of scores, weight gradients and dq
  Matrix<Word> dk_, dv_;  // sums for the keys of the part
  bool* extreme_;  // of each panel of keys
  bool has_extreme_keys_;
  Strip<Word> strip_;
  Matrix<Word> block_dq_, gradient_rows_;
  Filled<Op, kKeys> filled_;  // [words_][kStrip]
  Prefetch* prefetch_ = nullptr;
  int64 rows_at_once_ = 0, bytes_;
  int begin_ = 0, first_ = 0, step_ = 0;  // first key of the part, first row of the block; blocks of keys done
  uint16 bits_[2][kBackwardKeys + 2 * kBitsAtOnce];
};

}  // namespace
