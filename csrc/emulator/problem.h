// Random problems for the emulator: sizes, strides, masks, tensors. Forward and backward passes share them.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "../sm90/maps.h"
#include "machine.h"

namespace fa::emu {

struct Random {
  std::mt19937 engine;
  int between(int low, int high) { return low + static_cast<int>(engine() % static_cast<unsigned>(high - low + 1)); }
  bool one_in(int n) { return engine() % static_cast<unsigned>(n) == 0; }
};

struct Shape {  // what a kernel is made for
  int d_qk, d_v, block_m, block_n;
  bool is_half, has_band, has_softcap;
  bool is_gathered = false, is_e4m3 = false;  // of decoding: threads copy the rows of the cache, which is in e4m3
  bool has_terms = false;
};

struct Case {
  int batch, heads_kv, group, d_qk, d_v;
  bool is_packed;
  std::vector<int> s_q, s_kv;  // of each sequence; all the same if dense
  int left, right;             // -1: unbounded
  bool lower_right;
  double scale, softcap;       // softcap 0: none
  int sinks;                   // 0 none, 1 shared by the batch, 2 for each sequence
  bool heads_first;            // order of q, k, v in memory, dense only: (B, H, S, D) instead of (B, S, H, D)
  int padding;                 // elements between rows, times 8
  int blocks, heads_per_pass;
  bool has_equal_keys;         // all keys of a head are the same, and scores reach 1e7
  int slopes;                  // of ALiBi: 0 none, 1 shared by the batch, 2 for each sequence
  int documents;               // segments of a row of the batch; 0: none
  bool shares_ids;             // all rows of the batch have the same segments
  int mask, bias;  // 0: none; else 1 + the dimensions that are shared, a bit each: batch, head, query, key
  bool bias_is_float;
  int dropout;  // its threshold; 0: none
  uint32_t seed;
};

Case random_case(Shape const& shape, uint32_t seed);

// An element of q or k where keys are equal: of few bits, so that scores are exact in fp32, and equal for equal keys.
double huge_element(std::mt19937& engine);
std::string describe(Case const& c);

struct Tensor {  // 16-bit, (batch, row, head, column) with strides in elements
  std::vector<uint16_t> storage;
  uint16_t* data;
  int batch, rows, heads, columns;
  Strides strides;
  uint16_t& at(int b, int row, int head, int column) {
    return data[b * strides.batch + row * strides.row + head * strides.head + column];
  }
};

Tensor make_tensor(int batch, int rows, int heads, int columns, bool heads_first, int padding, uint16_t fill);

// Whether the band lets query i of sequence n see key j, by the definition in fastattn/spec.py.
bool sees(Case const& c, int n, int i, int j);

struct PerPair {  // a number for each pair, shared along some dimensions
  std::vector<float> values;
  int64 sizes[4];
  PairStrides strides;
  float at(int n, int h, int i, int j) const {
    return values[static_cast<size_t>(n * strides.batch + h * strides.head + i * strides.query + j * strides.key)];
  }
};

struct Problem {
  Shape shape;
  Case c;
  Tensor q, k, v;
  std::vector<float> sinks;
  std::vector<int> cu_q, cu_kv;
  float const* value;  // of a 16-bit number
  // Terms; mask and bias once more as the kernels read them, and what they write about terms.
  std::vector<float> slopes;
  std::vector<int64> ids_q, ids_kv;
  PerPair mask, bias;
  std::vector<uint8> mask_bytes;
  std::vector<uint16_t> bias_words;
  std::vector<int64> rng_state;
  std::vector<int32> ranges_q, ranges_kv;
  Tensor k_copy, v_copy;  // where terms may leave out keys

  uint16_t encode(double x) const { return shape.is_half ? to_half(float(x)) : to_bf16(float(x)); }
  int batch() const { return c.is_packed ? 1 : c.batch; }  // of the tensors
  int of(int n) const { return c.is_packed ? 0 : n; }  // sequence n is in this part of the batch,
  int first_q(int n) const { return c.is_packed ? cu_q[n] : 0; }  // and begins at these rows
  int first_kv(int n) const { return c.is_packed ? cu_kv[n] : 0; }
  double sink(int n, int h) const { return sinks[(c.sinks == 2 ? n * q.heads : 0) + h]; }
  // The definition, pair by pair: whether a pair is kept, what is added to its score, and the factor of dropout.
  bool keeps(int n, int h, int i, int j) const;
  double added(int n, int h, int i, int j) const;
  double factor(int n, int h, int i, int j) const;
};

// Rows of k and v that no query sees are NaN.
Problem make_problem(Shape const& shape, Case const& c);

// The keys of a dense batch that some query sees.
void find_kept_keys(Problem const& p, int64& begin, int64& end);

// The fields of terms. `f` has its own k and v.
void fill_terms(Problem& p, TermTensors& tensors, TermNumbers& numbers);

// Makes what terms point to known to the machine.
void allow_terms(Problem& p);

template <class Params>
void fill_common(Problem& p, Params& f) {
  Case const& c = p.c;
  f.q = p.q.data, f.k = p.k.data, f.v = p.v.data;
  f.sinks = c.sinks ? p.sinks.data() : nullptr;
  f.cu_seqlens_q = c.is_packed ? p.cu_q.data() : nullptr;
  f.cu_seqlens_kv = c.is_packed ? p.cu_kv.data() : nullptr;
  f.q_strides = p.q.strides, f.k_strides = p.k.strides, f.v_strides = p.v.strides;
  f.sinks_batch_stride = c.sinks == 2 ? p.q.heads : 0;
  f.dtype = p.shape.is_half ? kFloat16 : kBfloat16;
  f.batch = c.batch, f.heads_q = p.q.heads, f.heads_kv = c.heads_kv;
  f.head_dim_qk = c.d_qk, f.head_dim_v = c.d_v;
  f.seqlen_q = p.q.rows, f.seqlen_kv = p.k.rows;
  find_kept_keys(p, f.key_begin, f.key_end);
  f.left = c.left < 0 ? kUnbounded : c.left, f.right = c.right < 0 ? kUnbounded : c.right;
  f.lower_right = c.lower_right;
  f.has_softcap = c.softcap > 0;
  f.score_scale = c.softcap > 0 ? c.softcap : c.scale;
  f.cap_scale = c.softcap > 0 ? c.scale / c.softcap : 0;
  f.heads_per_pass = c.heads_per_pass;
  fill_terms(p, f.terms, f.numbers);
  if (!f.terms.given_k) return;
  f.k = p.k_copy.data, f.v = p.v_copy.data;
  f.k_strides = p.k_copy.strides, f.v_strides = p.v_copy.strides;
}

}  // namespace fa::emu
