// The tensor cores of the emulated machine: descriptors, fragments, and wgmma in flight.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine_state.h"

namespace fa::emu {

// ---- number formats --------------------------------------------------------------------------------------------------
static float from_bf16(uint16_t x) {
  uint32_t const bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_half(uint16_t x) {
  int const exponent = x >> 10 & 31, mantissa = x & 1023;
  float const sign = x & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}

uint16_t to_half(float x) {
  uint16_t const sign = std::signbit(x) ? 0x8000 : 0;
  float const size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size == 0.f) return sign;
  int exponent;
  std::frexp(size, &exponent);                          // size = m 2^exponent, m in [0.5, 1)
  int const step = std::max(exponent - 11, -24);        // exponent of the last bit
  int const units = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  return static_cast<uint16_t>(sign | (units + (step + 24) * 1024));  // a carry moves into the exponent by itself
}

float e4m3_value(uint32_t byte) {
  int const exponent = byte >> 3 & 15, mantissa = byte & 7;
  float const sign = byte & 0x80 ? -1.f : 1.f;
  if ((byte & 0x7f) == 0x7f) return NAN;
  return sign * (exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9));
}

static std::vector<float> table_of(float (*convert)(uint16_t)) {
  std::vector<float> table(65536);
  for (int i = 0; i < 65536; ++i) table[i] = convert(static_cast<uint16_t>(i));
  return table;
}

float const* decoder(bool is_half) {
  static std::vector<float> const half = table_of(from_half), bf16 = table_of(from_bf16);
  return (is_half ? half : bf16).data();
}

// ---- operands --------------------------------------------------------------------------------------------------------
// Address of the 8 elements that begin at (mn, k), along k, or along mn if transposed: PTX ISA, canonical layouts with
// 128-byte swizzle. Groups of 8 rows are 1024 bytes apart.
static uint32_t piece_address(uint32_t descriptor, bool transposed, int mn, int k) {
  uint32_t const start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  return swizzled(transposed ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * 1024 + k % 8 * 128
                             : start + mn / 8 * 1024 + mn % 8 * 128 + k * 2);
}

template <class Visit>
static void visit_pieces(uint32_t descriptor, bool transposed, int from, int to, Visit visit) {
  int const mn_step = transposed ? 8 : 1, k_step = transposed ? 1 : 8;
  for (int mn = from; mn < to; mn += mn_step) {
    for (int k = 0; k < 16; k += k_step) visit(piece_address(descriptor, transposed, mn, k), mn, k);
  }
}

// Rows (or columns) from .. to of an operand, as out[k][mn - from].
static void read_operand(uint32_t descriptor, bool transposed, bool is_half, int from, int to, float (*out)[256]) {
  float const* const decode = decoder(is_half);
  visit_pieces(descriptor, transposed, from, to, [&](uint32_t address, int mn, int k) {
    uint16_t raw[8];
    std::memcpy(raw, shared_bytes(address, 16), 16);
    for (int e = 0; e < 8; ++e) {
      if (transposed) out[k][mn - from + e] = decode[raw[e]];
      else out[k + e][mn - from] = decode[raw[e]];
    }
  });
}

static std::vector<uint32_t> granules_of(Wgmma const& op) {
  std::vector<uint32_t> granules;
  auto const note = [&](uint32_t address, int, int) { granules.push_back((address - kSharedBase) / 16); };
  visit_pieces(op.b, op.transpose_b, 0, op.n, note);
  if (!op.a_in_registers) visit_pieces(op.a, op.transpose_a, 0, 64, note);
  std::sort(granules.begin(), granules.end());
  return granules;
}

bool is_operand_in_flight(uint32_t from, uint32_t bytes) {
  uint32_t const begin = (from - kSharedBase) / 16, end = (from + bytes - 1 - kSharedBase) / 16;
  for (Warp const& warp : machine().warps) {
    for (size_t i = warp.retired; i < warp.products.size(); ++i) {
      auto const& granules = warp.products[i].granules;
      auto const found = std::lower_bound(granules.begin(), granules.end(), begin);
      if (found != granules.end() && *found <= end) return true;
    }
  }
  return false;
}

// ---- issue -----------------------------------------------------------------------------------------------------------
static bool same(Wgmma const& x, Wgmma const& y) {
  return x.n == y.n && x.is_half == y.is_half && x.a_in_registers == y.a_in_registers && x.a == y.a && x.b == y.b &&
         x.transpose_a == y.transpose_a && x.transpose_b == y.transpose_b && x.accumulate == y.accumulate;
}

// The rows of the swizzle, of 1024 bytes for eight, that an operand lies in.
static void note_operand(uint32_t descriptor, bool transposed, int size) {
  if (!machine().is_traced) return;
  uint32_t low = ~0u, high = 0;
  visit_pieces(descriptor, transposed, 0, size, [&](uint32_t address, int, int) {
    low = std::min(low, address / 1024 * 1024), high = std::max(high, address / 1024 * 1024 + 1024);
  });
  note("read", low, high);
}

void wgmma_fence() { machine().running->is_wgmma_fenced = true; }

void wgmma_issue(Wgmma const& op, float* d, uint32_t const* const (&a)[4]) {
  Fiber& self = *machine().running;
  Warp& warp = my_warp();
  if (!self.is_wgmma_fenced) error("a wgmma without wgmma.fence since the last wait");
  size_t const index = self.issued++;
  if (warp.products.size() <= index) warp.products.emplace_back();
  Product& product = warp.products[index];
  if (product.lanes == 0) {
    product.op = op;
    product.granules = granules_of(op);
    uint32_t const agent = products_of(static_cast<uint32_t>(self.thread / 32)),
                   time = static_cast<uint32_t>(index + 1);
    for (uint32_t granule : product.granules) {
      check_async_read(kSharedBase + granule * 16, 16, "a wgmma");
      note_read(granule, {agent, time});
    }
  } else if (!same(product.op, op)) {
    error("threads of a warp disagree about a wgmma");
  }
  int const lane = self.thread % 32;
  if (!op.a_in_registers) note_operand(op.a, op.transpose_a, 64);
  note_operand(op.b, op.transpose_b, op.n);
  ++product.lanes;
  product.d[lane] = d;
  for (int i = 0; op.a_in_registers && i < 4; ++i) {
    product.a[lane][i] = a[i];
    product.a_values[lane][i] = *a[i];
  }
  Accumulator& accumulator = self.accumulators[d];
  if (accumulator.in_flight++ == 0) {
    accumulator.values.assign(d, d + op.n / 2);
    std::fill_n(d, op.n / 2, NAN);
  }
}

void wgmma_commit() {
  note("commit");
  machine().running->group_ends.push_back(machine().running->issued);
}

// ---- compute ---------------------------------------------------------------------------------------------------------
// Element i of a lane's fragment, an accumulator or (i < 8) an operand A in registers, among its warp's 16 rows.
static int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
static int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

static void compute(Warp& warp, int warp_index) {
  static float a[16][256], b[16][256], sums[16][256];  // [k][row], [k][column], [row][column]
  Machine& m = machine();
  Product& product = warp.products[warp.computed++];
  Wgmma const& op = product.op;
  int const quarter = warp_index % 4;
  read_operand(op.b, op.transpose_b, op.is_half, 0, op.n, b);
  if (!op.a_in_registers) read_operand(op.a, op.transpose_a, op.is_half, quarter * 16, quarter * 16 + 16, a);
  for (int lane = 0; op.a_in_registers && lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      uint32_t const pair = product.a_values[lane][i / 2];
      a[column_of(lane, i)][row_of(lane, i)] = decoder(op.is_half)[static_cast<uint16_t>(pair >> 16 * (i % 2))];
    }
  }
  auto const each = [&](auto visit) {
    for (int lane = 0; lane < 32; ++lane) {
      auto& values = m.fibers[warp_index * 32 + lane].accumulators[product.d[lane]].values;
      for (int i = 0; i < op.n / 2; ++i) visit(values[i], row_of(lane, i), column_of(lane, i));
    }
  };
  each([&](float value, int row, int column) { sums[row][column] = op.accumulate ? value : 0.f; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < op.n; ++column) sums[row][column] += a[k][row] * b[k][column];
    }
  }
  each([&](float& value, int row, int column) { value = sums[row][column]; });
  if (quarter == 0) ++m.report->products;
}

static bool can_compute(Warp const& warp) {
  return warp.computed < warp.products.size() && warp.products[warp.computed].lanes == 32;
}

bool run_product(bool wanted) {
  Machine& m = machine();
  size_t const first = m.random() % m.warps.size();
  for (size_t i = 0; wanted && i < m.warps.size(); ++i) {
    size_t const warp = (first + i) % m.warps.size();
    if (!can_compute(m.warps[warp])) continue;
    compute(m.warps[warp], static_cast<int>(warp));
    return true;
  }
  return false;
}

// ---- wait ------------------------------------------------------------------------------------------------------------
// This thread learns the results of a product it waited for.
static void retire(Fiber& self, Product const& product) {
  int const lane = self.thread % 32;
  for (int i = 0; product.op.a_in_registers && i < 4; ++i) {
    if (*product.a[lane][i] != product.a_values[lane][i])
      error("registers of A changed while their wgmma was in flight");
  }
  float* const d = product.d[lane];
  Accumulator& accumulator = self.accumulators.at(d);
  if (--accumulator.in_flight > 0) return;
  if (!std::all_of(d, d + accumulator.values.size(), [](float x) { return std::isnan(x); })) {
    error("an accumulator was written while its wgmma was in flight");
  }
  std::copy(accumulator.values.begin(), accumulator.values.end(), d);
  self.accumulators.erase(d);
}

void wgmma_wait(int groups) {
  note("retire", static_cast<uint64_t>(groups));
  Fiber& self = *machine().running;
  Warp& warp = my_warp();
  if ((self.group_ends.empty() ? 0 : self.group_ends.back()) != self.issued) error("a wait with a wgmma not committed");
  int const kept = static_cast<int>(self.group_ends.size()) - groups;
  size_t const end = kept > 0 ? self.group_ends[kept - 1] : 0;
  sync_warp("a wgmma wait");  // so every lane has issued what this one has
  pause();
  while (warp.computed < end) compute(warp, self.thread / 32);
  for (; self.retired < end; ++self.retired) retire(self, warp.products[self.retired]);
  for (; warp.retired < end; ++warp.retired) warp.products[warp.retired].granules.clear();
  uint32_t& over = self.clock[products_of(static_cast<uint32_t>(self.thread / 32))];
  over = std::max(over, static_cast<uint32_t>(end));
  self.is_wgmma_fenced = false;
}

}  // namespace fa::emu
