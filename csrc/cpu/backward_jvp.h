// The Jacobian-vector product of the backward pass: how gradients move when the inputs and dout move along tangents.
//
// It serves double backward, forward over reverse and products with a Hessian alike. With p the weights, z the factors
// of dropout, dp = z dout v^T, delta as in gradient.h, t and bend as in tangents.h:
//   p'     = p (t - lse')                          delta' = sum (dout' out + dout out') - dlse'
//   dp'    = z (dout' v^T + dout v'^T)             dt'    = p' (dp - delta) + p (dp' - delta')
//   ds'    = slope dt' + bend dt                   dbias' = dt'
//   dq'    = scale (ds' k + ds k')                 dk'    = scale (ds'^T q + ds^T q')
//   dv'    = (p' z)^T dout + (p z)^T dout'         dsink' = -sum p_sink ((sink' - lse') delta + delta')
// Two backward passes side by side: over the inputs, with ds' and p' z where that pass has ds and p z, and over the
// tangents, with ds and p z. Both add to the same sums.
#pragma once

#include "backward.h"
#include "tangents.h"

namespace {

// What two rows take besides what the backward pass does.
template <class Word>
struct MovingPair {
  Moving<Word> scores[2];
  RowTerms<Word> end[2];  // lse' and delta'
};

// Strips and targets of the pass over the inputs and of that over their tangents.
template <class Word>
struct PairOfPasses {
  Strip<Word> const &given, &along;
  PairTarget<Word> to_given, to_along;
};

// Two rows of products become the tangents of weights and score gradients, and these themselves.
template <class Op, Terms TERMS>
inline void weigh_moving_pair(PairOfPasses<typename Op::Word> const& passes, int r, Range columns,
                              PairTerms<typename Op::Word> const& given, MovingPair<typename Op::Word> const& moving) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  PairTerms<Word> const of = given;  // copies: what is stored below might be any of their numbers
  RowTerms<Word> const ends[2] = {moving.end[0], moving.end[1]};
  Word const scale = moving.scores[0].scale;
  bool const drops = TERMS == kAll && of.dropped[0].bits;
  V totals[2]{};
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    V p[2], g[2], p_moved[2], g_moved[2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      auto const at = [&](Matrix<Word> strip) { return load(strip.at + (r + n) * strip.stride + c); };
      V const product = at(passes.given.scores);
      V slope = broadcast(Word(1)), bend{}, dp = at(passes.given.dweights), dp_moved = at(passes.along.dweights);
      V const score = Scores<Word>::template score<TERMS>(of.row[n], c, product, &slope);
      V const raw = at(passes.along.scores);
      V const t = TERMS == kBand ? raw * scale : moving.scores[n].tangent(c, raw, product, slope, &bend);
      V weight = weight_of<Op>(score, of.to_score, of.end[n]);
      V weight_moved = weight * (t - ends[n].lse);
      auto const survives = [&](V x) { return survivors<Word>(x * of.survivor, of.dropped[n], c - columns.begin); };
      if (drops) dp = survives(dp), dp_moved = survives(dp_moved);
      g_moved[n] = weight_moved * (dp - of.end[n].delta) + weight * (dp_moved - ends[n].delta);
      g[n] = weight * (dp - of.end[n].delta);
      p[n] = drops ? survives(weight) : weight;
      p_moved[n] = drops ? survives(weight_moved) : weight_moved;
      if (TERMS != kBand || c < of.row[n].kept.begin || c + kCount<Word> > of.row[n].kept.end) {
        auto const is_kept = score != broadcast(kNever<Word>);
        auto const keep = [&](V& x) { x = is_kept ? x : V{}; };
        keep(p[n]), keep(g[n]), keep(p_moved[n]), keep(g_moved[n]), keep(slope), keep(bend);
      }
      if (TERMS == kBand) continue;
      if (of.dbias[n].at && of.dbias[n].is_shared) totals[n] += g_moved[n];
      else if (of.dbias[n].at) put_bias_gradient<Word>(g_moved[n], c, of.row[n].kept, of.dbias[n]);
      g_moved[n] = slope * g_moved[n] + bend * g[n];
      g[n] *= slope;
    }
    store_pair<Op>(p_moved, g_moved, c, columns.begin, passes.to_given);
    store_pair<Op>(p, g, c, columns.begin, passes.to_along);
  }
  for (int n = 0; n < 2 && TERMS == kAll; ++n)
    if (of.dbias[n].at && of.dbias[n].is_shared) *reinterpret_cast<Word*>(of.dbias[n].at) += sum(totals[n]);
}

template <class Op>
class BackwardJvp {
  using Word = typename Op::Word;
  using Heads = Queries<Op>;

 public:
  BackwardJvp(AttentionParams const& p, AttentionParams const& moved, BackwardItem const& item, void* memory)
      : p_(p),
        moved_(moved),
        operands_(operands_of(p, moved)),
        given_(p, item, memory),
        along_(operands_, item, behind(memory, given_.bytes())),
        tangents_(moved, item.unit) {
    operands_.dq = moved.k ? p.dq : nullptr;  // set only now: sums are taken once
    operands_.dk = moved.q ? p.dk : nullptr;
    operands_.dv = moved.dout ? p.dv : nullptr;
  }

  int64 bytes() const { return given_.bytes() + along_.bytes(); }

  void run() {
    BackwardItem const& item = given_.item_;
    if (p_.segments_q) given_.segments_.look(given_.scores_.segments_kv(), {0, given_.band_.s_kv}, given_.runs_);
    for (int g = 0; g < given_.kept_heads_; ++g) pack(g);
    if (p_.dsinks && item.parts.begin == 0) add_sinks();
    for (int part = item.parts.begin; part < item.parts.end; ++part) run_part(part);
  }

 private:
  int head(int g) const { return given_.scores_.first_head() + g; }

  void pack(int g) {
    for (int64 first = 0; first < given_.padded_rows_; first += given_.block_rows_) pack_block(g, first);
  }

  void pack_block(int g, int64 first) {
    given_.packer_.pack_block(head(g), first, given_.queries_of(g));
    along_.packer_.pack_operands(head(g), first, along_.queries_of(g));
    read_terms(head(g), first, along_.queries_of(g));
  }

  // lse' and delta' of the rows of a block, zeros in those that pad.
  void read_terms(int head, int64 first, Heads& to) const {
    int64 const lse = given_.tensors_.lse(head);
    auto const number = [&](void const* x, int64 i) { return x ? static_cast<Word const*>(x)[lse + i] : 0; };
    for (int64 i = first; i < first + given_.block_rows_; ++i) {
      bool const is_there = i < given_.band_.s_q;
      to.lse[i] = is_there ? number(moved_.lse, i) : 0;
      to.delta[i] = is_there ? -number(moved_.dlse, i) : 0;
    }
    int64 const there = given_.band_.s_q - first, count = there < given_.block_rows_ ? there : given_.block_rows_;
    auto const add_products = [&](Source const& a, Source const& b) {
      add_dots(from_row(a, first), from_row(b, first), count, there, p_.head_dim_v, to.delta + first);
    };
    if (moved_.dout) add_products(given_.tensors_.out(head), along_.tensors_.dout(head));
    if (moved_.out) add_products(along_.tensors_.out(head), given_.tensors_.dout(head));
  }

  void add_sinks() {
    for (int g = 0; g < given_.group_; ++g) {
      if (!given_.kept_heads_) pack(g);
      Heads const &of = given_.queries_of(g), &moving = along_.queries_of(g);
      auto const* const lse = static_cast<Word const*>(p_.lse) + given_.tensors_.lse(head(g));
      Word const sink = given_.scores_.sink(head(g)), sink_moved = moved_.sinks ? tangents_.sink(head(g)) : 0;
      double total = 0;
      for (int i = 0; i < given_.band_.s_q; ++i)
        total -=
            sink_weight(sink, lse[i], of.low[i]) * (double(sink_moved - moving.lse[i]) * of.delta[i] + moving.delta[i]);
      static_cast<Word*>(p_.dsinks)[given_.item_.unit.b * p_.heads_q + head(g)] = Word(total);
    }
  }

  void run_part(int part) {
    BackwardItem const& item = given_.item_;
    Range const keys = given_.parts_.keys(part), rows = given_.parts_.rows(part);
    given_.begin_ = along_.begin_ = keys.begin;
    given_.pack_keys(keys);
    along_.pack_keys(keys);
    given_.begin_sums(keys);
    along_.dk_ = given_.dk_;
    along_.dv_ = given_.dv_;
    for (int g = 0; g < given_.group_; ++g) {
      Matrix<Word> const dq = given_.begin_dq(part, g);
      for (int first = rows.begin; first < rows.end; first += given_.block_rows_) {
        given_.first_ = along_.first_ = first;
        if (!given_.kept_heads_) pack_block(g, first);
        given_.wait();
        given_.begin_block(part, dq);
        along_.block_dq_ = given_.block_dq_;
        bool const is_used = given_.for_each_block(head(g), first, keys,
                                                   [&](int count, Range block) { run_keys(g, first, count, block); });
        given_.finish_block(dq, is_used);
        if (item.progress) __atomic_store_n(item.progress, ++given_.step_, __ATOMIC_RELEASE);
      }
      given_.finish_dq(part, g, dq);
    }
    given_.write_keys(keys);
  }

  void run_keys(int g, int first, int count, Range keys) {
    for (auto* pass : {&given_, &along_}) pass->filled_.reset();
    given_.for_each_piece(head(g), count, keys,
                          [&](int r, int rows, Seen const& seen) { run_strip(g, first, r, rows, keys, seen); });
    for (auto* pass : {&given_, &along_}) pass->filled_.finish(keys.end - keys.begin);
    given_.add_to_keys(head(g), given_.queries_of(g), first, keys);
    along_.add_to_keys(head(g), along_.queries_of(g), first, keys);
  }

  void run_strip(int g, int first, int r, int count, Range keys, Seen const& seen) {
    Range const columns = columns_of<Word>(seen.keys, keys.begin);
    given_.prefetch_terms(head(g), first + r, count, seen.keys);
    given_.fill(keys, seen.keys, r, count);
    along_.fill(keys, seen.keys, r, count);
    multiply(g, first + r, count, keys, columns);
    for (int n = 0; n < count; n += 2) {
      if (kIsSpecialised && terms_of(given_.scores_, seen) == kBand && !p_.dropout_threshold && !moved_.bias)
        weigh<kBand>(g, first, r, n, keys, seen.keys, columns);
      else weigh<kAll>(g, first, r, n, keys, seen.keys, columns);
    }
    given_.add_to_queries(head(g), first + r, count, keys, columns, seen.keys);
    along_.add_to_queries(head(g), first + r, count, keys, columns, seen.keys);
  }

  // Products of queries and keys and of dout and values, and the tangents of both.
  void multiply(int g, int64 row, int count, Range keys, Range columns) {
    Heads const &of = given_.queries_of(g), &moving = along_.queries_of(g);
    auto const from = [&](Matrix<Word> const& x) { return of.rows_of(x, row); };
    int64 const qk = given_.dim_qk_, v = given_.dim_v_;
    given_.multiply_keys(count, from(of.q), qk, given_.k_, keys, columns, given_.strip_.scores);
    given_.multiply_keys(count, from(of.dout), v, given_.v_, keys, columns, given_.strip_.dweights);
    add_products({from(moving.q), from(of.q), given_.k_, along_.k_, moved_.q != nullptr, moved_.k != nullptr}, qk,
                 count, keys, columns, along_.strip_.scores);
    add_products({from(moving.dout), from(of.dout), given_.v_, along_.v_, moved_.dout != nullptr, moved_.v != nullptr},
                 v, count, keys, columns, along_.strip_.dweights);
  }

  // The tangent of a product: that of its left operand times the right one, and the other way round.
  struct Operands {
    Matrix<Word const> left_moved, left;
    Word const *right, *right_moved;
    bool left_moves, right_moves;
  };

  void add_products(Operands const& x, int64 depth, int count, Range keys, Range columns, Matrix<Word> to) {
    if (x.left_moves) given_.multiply_keys(count, x.left_moved, depth, x.right, keys, columns, to);
    if (x.left_moves && x.right_moves)
      given_.multiply_keys(count, x.left, depth, x.right_moved, keys, columns, to, kAdd);
    else if (x.right_moves) given_.multiply_keys(count, x.left, depth, x.right_moved, keys, columns, to);
    else if (!x.left_moves) clear(to.at, count * to.stride);
  }

  template <Terms TERMS>
  void weigh(int g, int first, int r, int n, Range keys, Range seen, Range columns) {
    Heads const& moving = along_.queries_of(g);
    PairTerms<Word> pair;
    MovingPair<Word> of_tangents;
    for (int x = 0; x < 2; ++x) {
      int const i = first + r + n + x;
      given_.read_terms(head(g), given_.queries_of(g), i, keys, seen, columns, x, pair);
      of_tangents.scores[x] =
          moving_row(tangents_, head(g), i < given_.band_.s_q ? i : 0, keys.begin, given_.kept(i, keys, seen), x);
      of_tangents.end[x] = {moving.lse[i], 0, moving.delta[i]};
    }
    PairOfPasses<Word> const passes{given_.strip_, along_.strip_, given_.target(r, n), along_.target(r, n)};
    weigh_moving_pair<Op, TERMS>(passes, n, columns, pair, of_tangents);
  }

  AttentionParams const &p_, &moved_;
  AttentionParams operands_;
  Backward<Op> given_, along_;
  Scores<Word> tangents_;
};

}  // namespace
