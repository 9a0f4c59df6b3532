#include "problem.h"

#include <cmath>
#include <cstring>

namespace fa::check {

static int64 bytes_of(int64 dtype) { return dtype == cpu::kFloat64 ? 8 : dtype == cpu::kFloat32 ? 4 : 2; }

Tensor::Tensor(int64 dtype, int64 count)
    : dtype(dtype), count(count), bytes(new unsigned char[count * bytes_of(dtype)]) {
  std::memset(bytes.get(), 0xff, count * bytes_of(dtype));  // NaN, whatever the dtype
}

static double from_half(std::uint16_t bits) {
  int const exponent = bits >> 10 & 31, fraction = bits & 1023;
  double const x = exponent == 31 ? (fraction ? NAN : INFINITY)
                   : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                  : std::ldexp(fraction, -24);
  return bits >> 15 ? -x : x;
}

double Tensor::get(int64 n) const {
  unsigned char const* const at = bytes.get() + n * bytes_of(dtype);
  double wide;
  float x;
  std::uint16_t half;
  if (dtype == cpu::kFloat64) return std::memcpy(&wide, at, 8), wide;
  if (dtype == cpu::kFloat32) return std::memcpy(&x, at, 4), x;
  std::memcpy(&half, at, 2);
  if (dtype == cpu::kFloat16) return from_half(half);
  std::uint32_t const bits = std::uint32_t(half) << 16;
  return std::memcpy(&x, &bits, 4), x;
}

void Tensor::set(int64 n, double x) {
  unsigned char* const at = bytes.get() + n * bytes_of(dtype);
  float const single = float(x);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  std::uint16_t half = std::uint16_t(bits >> 16);  // cut off: which number it is does not matter
  if (dtype == cpu::kFloat64) std::memcpy(at, &x, 8);
  else if (dtype == cpu::kFloat32) std::memcpy(at, &single, 4);
  else {
    if (dtype == cpu::kFloat16) {
      int const exponent = int(bits >> 23 & 255) - 112;
      half = exponent <= 0 ? 0 : std::uint16_t((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
    }
    std::memcpy(at, &half, 2);
  }
}

Tensor Problem::normal(int64 dtype, int64 count) {
  std::normal_distribution<double> draw;
  Tensor x(dtype, count);
  for (int64 n = 0; n < count; ++n) x.set(n, draw(random_));
  return x;
}

Problem::Problem(std::uint64_t seed, int64 machine, int64 threads) : random_(seed) {
  p.version = cpu::kAttentionVersion;
  p.machine = machine;
  p.threads = threads;
  draw_sizes();
  draw_terms();
  make_results();
  draw_tangents();
}

static std::vector<int32> starts(std::vector<int64> const& lengths) {
  std::vector<int32> found{0};
  for (int64 length : lengths) found.push_back(found.back() + int32(length));
  return found;
}

void Problem::draw_sizes() {
  static constexpr int64 kDtypes[] = {cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64};
  static constexpr int64 kRows[] = {0, 1, 5, 16, 33, 47, 97, 130, 600};  // the last one rarely: the formula is slow
  static constexpr int64 kDims[] = {1, 8, 16, 33, 64, 80};
  p.dtype = kDtypes[below(4)];
  p.batch = 1 + below(3);
  p.heads_kv = 1 + below(2);
  p.heads_q = p.heads_kv * (1 + below(3));
  p.head_dim_qk = kDims[below(6)];
  p.head_dim_v = chance(50) ? p.head_dim_qk : kDims[below(6)];
  p.rows_q = kRows[chance(5) ? 8 : below(8)];
  p.rows_kv = chance(50) ? p.rows_q : kRows[chance(10) ? 8 : below(8)];
  if (chance(25)) {
    std::vector<int64> of_q, of_kv;
    for (int64 b = 0; b < p.batch; ++b) of_q.push_back(kRows[below(6)]), of_kv.push_back(kRows[below(6)]);
    cu_q = starts(of_q);
    cu_kv = starts(of_kv);
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_kv = cu_kv.data();
    p.rows_q = cu_q.back();
    p.rows_kv = cu_kv.back();
  }
  p.left = chance(30) ? below(60) : 1 << 29;
  p.right = chance(50) ? below(40) * below(2) : 1 << 29;
  p.lower_right = below(2);
  p.scale = chance(80) ? 1 / std::sqrt(double(p.head_dim_qk)) : -0.3;
  if (chance(15)) p.softcap = 2;
  p.dropout_scale = 1;
}

void Problem::draw_terms() {
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch, words = p.dtype == cpu::kFloat64 ? cpu::kFloat64 : cpu::kFloat32;
  auto const rows = [&](Tensor& x, void const*& at, cpu::Strides& strides, int64 count, int64 heads, int64 dim) {
    x = normal(p.dtype, batch * count * heads * dim);
    at = x.data();
    strides = {count * heads * dim, heads * dim, dim};
  };
  rows(at.q, p.q, p.q_strides, p.rows_q, p.heads_q, p.head_dim_qk);
  rows(at.k, p.k, p.k_strides, p.rows_kv, p.heads_kv, p.head_dim_qk);
  rows(at.v, p.v, p.v_strides, p.rows_kv, p.heads_kv, p.head_dim_v);
  rows(at.dout, p.dout, p.dout_strides, p.rows_q, p.heads_q, p.head_dim_v);
  bool const is_dense = !p.cu_seqlens_q;
  if (is_dense && chance(30)) {
    int64 const b = chance(50) ? p.batch : 1, h = chance(50) ? p.heads_q : 1, i = chance(70) ? p.rows_q : 1,
                j = chance(70) ? p.rows_kv : 1;
    at.bias = normal(chance(50) ? words : int64(cpu::kBfloat16), b * h * i * j);
    p.bias = at.bias.data();
    p.bias_dtype = at.bias.dtype;
    p.bias_batch = b > 1 ? h * i * j : 0;
    p.bias_head = h > 1 ? i * j : 0;
    p.bias_row = i > 1 ? j : 0;
    p.bias_key = j > 1;
    p.dbias_dtype = words;
    p.dbias_adds = b < p.batch || h < p.heads_q || i < p.rows_q || j < p.rows_kv || j == 1;
    p.dbias_batch = p.bias_batch, p.dbias_head = p.bias_head, p.dbias_row = p.bias_row, p.dbias_key = p.bias_key;
  }
  if (is_dense && chance(30)) {
    int64 const count = p.rows_q * p.rows_kv;
    mask.reset(new unsigned char[count]);
    for (int64 n = 0; n < count; ++n) mask[n] = chance(80);
    p.mask = mask.get();
    p.mask_row = p.rows_kv;
    p.mask_key = 1;
  }
  if (is_dense && chance(20)) {
    for (int64 n = 0; n < p.rows_q; ++n) segments_q.push_back(int32(n * 3 / (p.rows_q + 1)));
    for (int64 n = 0; n < p.rows_kv; ++n) segments_kv.push_back(int32(n * 3 / (p.rows_kv + 1)));
    p.segments_q = segments_q.data();
    p.segments_kv = segments_kv.data();
  }
  if (chance(25)) draw_intervals();
  if (chance(20)) p.slopes = (slopes = normal(words, p.heads_q)).data();
  if (chance(30)) p.sinks = (at.sinks = normal(words, p.batch * p.heads_q)).data(), p.sinks_stride = p.heads_q;
  if (chance(20)) {
    rng_state = {int64(random_() >> 2), below(1000)};
    p.rng_state = rng_state.data();
    p.dropout_threshold = 1 << 14;
    p.dropout_scale = 65536.0 / (65536 - p.dropout_threshold);
  }
}

void Problem::draw_intervals() {
  int64 const batch = !p.cu_seqlens_q && chance(50) ? p.batch : 1, heads = chance(50) ? p.heads_q : 1;
  p.intervals_count = 1 + below(4);
  p.intervals_row = 2 * p.intervals_count;
  p.intervals_head = heads > 1 ? p.rows_q * p.intervals_row : 0;
  p.intervals_batch = batch > 1 ? heads * p.rows_q * p.intervals_row : 0;
  for (int64 n = 0; n < batch * heads * p.rows_q * p.intervals_count; ++n) {
    int64 const start = below(p.rows_kv + 8) - 4;
    intervals.insert(intervals.end(), {int32(start), int32(start + below(1 + p.rows_kv / 2) - 2)});
  }
  p.intervals = intervals.data();
}

static int64 words_of(int64 dtype) { return dtype == cpu::kFloat64 ? cpu::kFloat64 : cpu::kFloat32; }

static void make_gradients(AttentionParams& p, Tensors& of, Tensors const& like) {
  p.dq = (of.dq = Tensor(p.dtype, like.q.count)).data();
  p.dk = (of.dk = Tensor(p.dtype, like.k.count)).data();
  p.dv = (of.dv = Tensor(p.dtype, like.v.count)).data();
  if (p.bias) {
    p.dbias = (of.dbias = Tensor(p.dbias_dtype, like.bias.count)).data();
    for (int64 n = 0; n < of.dbias.count; ++n) of.dbias.set(n, 0);
  }
  if (p.sinks) p.dsinks = (of.dsinks = Tensor(words_of(p.dtype), p.batch * p.heads_q)).data();
}

void Problem::make_results() {
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch, words = words_of(p.dtype);
  int64 const rows = batch * p.rows_q * p.heads_q;
  p.dlse = (at.dlse = normal(words, rows)).data();
  p.out = (at.out = Tensor(p.dtype, rows * p.head_dim_v)).data();
  p.lse = (at.lse = Tensor(words, rows)).data();
  p.lse_low = (low = Tensor(words, rows)).data();
  make_gradients(p, at, at);
}

// Of what there is; now and then something stands still.
void Problem::draw_tangents() {
  products = moved = p;
  make_gradients(products, tangent, at);
  moved.dq = moved.dk = moved.dv = moved.dbias = moved.dsinks = moved.lse_low = nullptr;
  auto const draw = [&](Tensor Tensors::* x, void const* given) {
    Tensor const& like = at.*x;
    if (given && chance(80)) tangent.*x = normal(like.dtype, like.count);
    return static_cast<void const*>((tangent.*x).data());
  };
  moved.q = draw(&Tensors::q, p.q);
  moved.k = draw(&Tensors::k, p.k);
  moved.v = draw(&Tensors::v, p.v);
  moved.bias = draw(&Tensors::bias, p.bias);
  moved.sinks = draw(&Tensors::sinks, p.sinks);
  moved.dout = draw(&Tensors::dout, p.dout);
  moved.dlse = draw(&Tensors::dlse, p.dlse);
  moved.out = (tangent.out = Tensor(p.dtype, at.out.count)).data();
  moved.lse = (tangent.lse = Tensor(at.lse.dtype, at.lse.count)).data();
}

std::string Problem::describe() const {
  static char const* const kNames[] = {"fp32", "bf16", "fp16", "fp8", "fp64"};
  auto const number = [](int64 n) { return std::to_string(n); };
  std::string text = std::string(kNames[p.dtype]) + " B" + number(p.batch) + " H" + number(p.heads_q) + "/" +
                     number(p.heads_kv) + " S" + number(p.rows_q) + "x" + number(p.rows_kv) + " D" +
                     number(p.head_dim_qk) + "/" + number(p.head_dim_v) + " band " + number(p.left) + "," +
                     number(p.right);
  for (auto const& [is_used, name] : {std::pair{p.cu_seqlens_q != nullptr, " packed"},
                                      {p.bias != nullptr, " bias"},
                                      {p.mask != nullptr, " mask"},
                                      {p.segments_q != nullptr, " segments"},
                                      {p.intervals != nullptr, " intervals"},
                                      {p.slopes != nullptr, " alibi"},
                                      {p.sinks != nullptr, " sinks"},
                                      {p.softcap != 0, " softcap"},
                                      {p.dropout_threshold != 0, " dropout"}})
    if (is_used) text += name;
  return text;
}

}  // namespace fa::check
