// Tangents: directions in which the inputs of attention move, in a second AttentionParams beside that of the inputs.
//
// Its q, k, v, bias, sinks, dout and dlse are the tangents of those, its out and lse those of the results; null stands
// still. Sizes, band, mask and the like are the same in both.
#pragma once

#include "gradient.h"

namespace {

// The tangents as operands of a pass, which reads from the bias itself which pairs are kept.
inline AttentionParams operands_of(AttentionParams const& p, AttentionParams const& moved) {
  AttentionParams operands = moved;
  operands.bias = p.bias;
  operands.bias_dtype = p.bias_dtype;
  operands.bias_batch = p.bias_batch;
  operands.bias_head = p.bias_head;
  operands.bias_row = p.bias_row;
  operands.bias_key = p.bias_key;
  return operands;
}

// The memory behind `bytes` of it; null, in a query for the size, stays null.
inline void* behind(void* memory, int64 bytes) { return memory ? static_cast<char*>(memory) + bytes : nullptr; }

// How the scores of a row move: t = slope * scale * (q' k^T + q k'^T) + bias'.
template <class Word>
struct Moving {
  using V = Vector<Word>;

  Word scale, cap, inverse_cap;
  typename Scores<Word>::Row bias;  // of the tangent; its `bias` is null where that stands still

  // Of the columns from c on, out of their products and those of the queries and keys themselves. `slope` is the
  // derivative of softcap there, and `bend` takes its tangent.
  V tangent(int c, V moved, V product, V slope, V* bend = nullptr) const {
    V t = moved * scale;
    if (cap != 0) {
      t *= slope;
      if (bend) *bend = -2 * inverse_cap * hyperbolic_tangent(product * (scale * inverse_cap)) * t;
    }
    return bias.bias ? t + Scores<Word>::bias(bias, c) : t;
  }
};

template <class Word>
inline Moving<Word> moving_row(Scores<Word>& tangents, int head, int i, int first, Range kept, int n = 0) {
  AttentionParams const& p = tangents.p;
  Moving<Word> moving{Word(p.scale), Word(p.softcap), p.softcap ? Word(1 / p.softcap) : 0, {}};
  if (p.bias) moving.bias = tangents.row(head, i, first, kept, n);
  return moving;
}

// A sink's weight in a row.
template <class Word>
inline double sink_weight(Word sink, Word lse, Word low) {
  return lse == kNever<Word> ? 0 : __builtin_exp((double(sink) - double(lse)) - double(low));
}

}  // namespace
