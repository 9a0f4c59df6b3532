// CuTe as a witness: the products that each kernel issues, and what the emulated machine believes about them, beside what
// the layout algebra of CUTLASS says. Both were written by others, so that one misreading of a manual cannot hide in kernel
// and emulator alike. Compiled by cute.py, on the host.
//
// Compared for every instance: the descriptors of all products, the address of every element they stand for, and which
// thread holds which element of an accumulator or an operand in registers.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cstddef>
#include <set>
static std::size_t __cvta_generic_to_shared(void const* address) { return reinterpret_cast<std::size_t>(address); }
#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "../emulator/tensor_core.cpp"
#include "../sm90/backward_dkdv.cuh"
#include "../sm90/backward_dq.cuh"
#include "../sm90/decode.cuh"
#include "../sm90/forward.cuh"

namespace {

using namespace fa::sm90;
namespace gmma = cute::SM90::GMMA;
using fa::emu::Wgmma;
using Number = cutlass::bfloat16_t;

int differences = 0, compared = 0;

void expect(std::string const& what, uint64_t ours, uint64_t theirs) {
  static std::set<std::string> told;
  ++compared;
  if (ours == theirs) return;
  ++differences;
  if (!told.insert(what).second || told.size() > 200) return;
  std::printf("FAILED %s: %#llx here, %#llx in CuTe\n", what.c_str(), static_cast<unsigned long long>(ours),
              static_cast<unsigned long long>(theirs));
}

// ---- what CuTe says ----------------------------------------------------------------------------------------------------
// An operand of a product in steps of 16 along the sum: its descriptors, and where element (mn, k) of a step lies.
struct Operand {
  bool transposed;
  std::vector<uint64_t> descriptors;
  std::function<uint32_t(int step, int mn, int k)> address;
};

template <class Tensor>
uint32_t address_in(Tensor const& tensor, int i, int j) {
  return static_cast<uint32_t>(reinterpret_cast<std::size_t>(cute::raw_pointer_cast(&tensor(i, j))));
}

auto* shared_pointer(uint32_t address) { return reinterpret_cast<Number*>(static_cast<std::size_t>(address)); }

// Rows first .. first + PART of a tile [ROWS, COLUMNS], whose columns are summed over.
template <int ROWS, int COLUMNS, int PART>
Operand by_rows(uint32_t tile, int first) {
  using namespace cute;
  using Columns = Int<(COLUMNS + 63) / 64 * 64>;
  auto const layout = tile_to_shape(gmma::Layout_K_SW128_Atom<Number>{}, Shape<Int<ROWS>, Columns>{});
  auto const tensor = make_tensor(make_smem_ptr(shared_pointer(tile)), layout);
  Operand operand{false, {}, {}};
  for (int step = 0; step < COLUMNS / 16; ++step) {
    auto const part = local_tile(tensor, Shape<Int<PART>, _16>{}, make_coord(first / PART, step));
    operand.descriptors.push_back(gmma::make_gmma_desc<gmma::Major::K>(part).desc_);
  }
  operand.address = [=](int step, int mn, int k) { return address_in(tensor, first + mn, step * 16 + k); };
  return operand;
}

// Columns first .. first + PART of a tile [ROWS, COLUMNS], whose rows are summed over.
template <int ROWS, int COLUMNS, int PART_>
Operand by_columns(uint32_t tile, int first) {
  using namespace cute;
  constexpr int PART = (PART_ + 63) / 64 * 64;  // a product of 96 columns takes the first of two chunks of 64
  using Columns = Int<(COLUMNS + 63) / 64 * 64>;
  auto const layout = tile_to_shape(gmma::Layout_MN_SW128_Atom<Number>{}, Shape<Columns, Int<ROWS>>{}, Step<_2, _1>{});
  auto const tensor = make_tensor(make_smem_ptr(shared_pointer(tile)), layout);
  Operand operand{true, {}, {}};
  for (int step = 0; step < ROWS / 16; ++step) {
    auto const part = local_tile(tensor, Shape<Int<PART>, _16>{}, make_coord(first / PART, step));
    operand.descriptors.push_back(gmma::make_gmma_desc<gmma::Major::MN>(part).desc_);
  }
  operand.address = [=](int step, int mn, int k) { return address_in(tensor, first + mn, step * 16 + k); };
  return operand;
}

// ---- what the kernels issue --------------------------------------------------------------------------------------------
std::vector<Wgmma> issued(std::function<void()> const& issue) {
  fa::emu::Report report;
  fa::emu::run_block(kWarpgroup, 0, 1, 0, [&] { wgmma_fence(), issue(); }, report);
  if (!report.error.empty()) std::printf("FAILED %s\n", report.error.c_str()), ++differences;
  std::vector<Wgmma> ops;
  for (auto const& product : fa::emu::machine().warps[0].products) ops.push_back(product.op);
  return ops;
}

uint64_t whole(uint32_t low) { return low | std::stoull(FA_DESCRIPTOR_HIGH, nullptr, 16) << 32; }

void compare(std::string const& what, uint32_t descriptor, bool transposed, int size, Operand const& operand,
             int step) {
  // The leading offset lies between chunks of 64 columns: of a single one it is 0 in CuTe, and never read.
  uint64_t const counts = transposed && size == 64 ? ~uint64_t{0x3fff0000} : ~uint64_t{0};
  expect(what + ", transposed", transposed, operand.transposed);
  expect(what + ", descriptor", whole(descriptor) & counts, operand.descriptors[step] & counts);
  auto const piece = [&](uint32_t address, int mn, int k) {
    for (int e = 0; e < 8; ++e) {
      expect(what + ", address", address + 2 * e, operand.address(step, mn + transposed * e, k + !transposed * e));
    }
  };
  fa::emu::visit_pieces(descriptor, transposed, 0, size, piece);
}

// Products of `a` (null if in registers) and `b`, one step after the other.
void check(std::string const& what, Operand const* a, Operand const& b, std::function<void()> const& issue) {
  std::vector<Wgmma> const ops = issued(issue);
  expect(what + ", steps", ops.size(), b.descriptors.size());
  for (std::size_t step = 0; step < ops.size() && step < b.descriptors.size(); ++step) {
    compare(what + ", B", ops[step].b, ops[step].transpose_b, ops[step].n, b, static_cast<int>(step));
    if (a) compare(what + ", A", ops[step].a, ops[step].transpose_a, 64, *a, static_cast<int>(step));
  }
}

// ---- fragments ---------------------------------------------------------------------------------------------------------
// CuTe numbers elements of 64 rows column by column.
template <class Layout>
void check_fragment(std::string const& what, Layout const& layout, int values) {
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    int const warp_row = thread / 32 * 16, lane = thread % 32;
    for (int i = 0; i < values; ++i) {
      int const ours = warp_row + fa::emu::row_of(lane, i) + 64 * fa::emu::column_of(lane, i);
      expect(what, ours, layout(thread, i));
    }
  }
}

template <int N>
void check_accumulator() {
  check_fragment("accumulator of " + std::to_string(N), gmma::CLayout_64xN<N>{}, N / 2);
}

// ---- the instances -----------------------------------------------------------------------------------------------------
template <class C>
void check_attention(std::string const& name) {
  Shared<C> const shared{fa::emu::kSharedBase};
  for (int stage = 0; stage < C::STAGES; ++stage) {
    for (int consumer = 0; consumer < C::CONSUMERS; ++consumer) {
      Operand const q = by_rows<C::BLOCK_M, C::D_QK, 64>(shared.q(), 64 * consumer);
      check(name + " scores", &q, by_rows<C::BLOCK_N, C::D_QK, C::BLOCK_N>(shared.k(stage), 0), [&] {
        float scores[C::BLOCK_N / 2];
        issue_scores<C>(scores, shared, consumer, stage);
      });
    }
    check(name + " output", nullptr, by_columns<C::BLOCK_N, C::D_V, C::D_V>(shared.v(stage), 0), [&] {
      float out[C::D_V / 2];
      uint32_t p[C::BLOCK_N / 4] = {};
      issue_output<C>(out, p, shared, stage);
    });
  }
  check_accumulator<C::BLOCK_N>();
  check_accumulator<C::D_V>();
}

// d[64, N] = rows of a [ROWS_A, COLUMNS], from `first` on, times those of b [N, COLUMNS].
template <int COLUMNS, int ROWS_A, int N>
void check_rows(std::string const& name, uint32_t a, int first, uint32_t b) {
  Operand const of_a = by_rows<ROWS_A, COLUMNS, 64>(a, first);
  check(name, &of_a, by_rows<N, COLUMNS, N>(b, 0), [&] {
    float d[N / 2];
    multiply_by_rows<Bf16, COLUMNS, ROWS_A, N>(d, k_major(a + first * kRowBytes), k_major(b));
  });
  check_accumulator<N>();
}

// d[64, COLUMNS] += registers [64, ROWS] times b [ROWS, COLUMNS].
template <int ROWS, int COLUMNS>
void check_sum(std::string const& name, uint32_t b) {
  check(name, nullptr, by_columns<ROWS, COLUMNS, COLUMNS>(b, 0), [&] {
    float d[COLUMNS / 2];
    uint32_t a[ROWS / 4] = {};
    add_product<Bf16>(d, a, n_major(b, ROWS));
  });
  check_accumulator<COLUMNS>();
}

template <class C>
void check_dq_part(std::string const& name, DkdvShared<C> const& shared, int consumer, int buffer) {
  constexpr int kHalf = C::BLOCK_M / 64 * 64 * kRowBytes;  // of dS^T: the 64 keys of one consumer
  uint32_t const ds = shared.ds(buffer) + (C::DQ_BY_ROWS ? consumer * 64 * kRowBytes : 0);
  Operand halves[2] = {by_columns<64, 64, 64>(ds, 0), by_columns<64, 64, 64>(ds + kHalf, 0)};
  Operand a = halves[0];
  a.descriptors.insert(a.descriptors.end(), halves[1].descriptors.begin(), halves[1].descriptors.end());
  a.address = [&](int step, int mn, int k) { return halves[step / 4].address(step % 4, mn, k); };
  Operand const b = by_columns<C::BLOCK_N, C::D_QK, 64>(shared.k(), C::DQ_BY_ROWS ? 0 : 64 * consumer);
  check(name + " dq", &a, b, [&] {
    float dq[32];
    issue_dq<C>(dq, shared, consumer, buffer);
  });
}

template <class C>
void check_dkdv(std::string const& name) {
  DkdvShared<C> const shared{fa::emu::kSharedBase};
  for (int stage = 0; stage < C::STAGES; ++stage) {
    for (int keys = 0; keys < C::BLOCK_N; keys += 64) {
      check_rows<C::D_QK, C::BLOCK_N, C::BLOCK_M>(name + " scores", shared.k(), keys, shared.q(stage));
      check_rows<C::D_V, C::BLOCK_N, C::BLOCK_M>(name + " dp", shared.v(), keys, shared.dout(stage));
    }
    check_sum<C::BLOCK_M, C::D_V>(name + " dv", shared.dout(stage));
    check_sum<C::BLOCK_M, C::D_QK>(name + " dk", shared.q(stage));
  }
  if constexpr (C::FUSED) {
    for (int i = 0; i < 4; ++i) check_dq_part<C>(name, shared, i % 2, i / 2);
  }
}

template <class C>
void check_dq(std::string const& name) {
  DqShared<C> const shared{fa::emu::kSharedBase};
  for (int first = 0; first < C::BLOCK_M; first += 64) {
    for (int stage = 0; stage < C::K_STAGES; ++stage) {
      check_rows<C::D_QK, C::BLOCK_M, C::BLOCK_N>(name + " scores", shared.q(), first, shared.k(stage));
      check_sum<C::BLOCK_N, C::D_QK>(name + " dq", shared.k(stage));
    }
    for (int stage = 0; stage < C::V_STAGES; ++stage) {
      check_rows<C::D_V, C::BLOCK_M, C::BLOCK_N>(name + " dp", shared.dout(), first, shared.v(stage));
    }
  }
}

}  // namespace

int main() {
#define FORWARD(D_QK, D_V, BAND, SOFTCAP, BLOCK_M, BLOCK_N, STAGES, PINGPONG, TERMS) \
  check_attention<ForwardTraits<Bf16, D_QK, D_V, BLOCK_M, BLOCK_N, STAGES, PINGPONG, BAND, SOFTCAP, TERMS>>( \
      "forward " #D_QK "/" #D_V " " #BLOCK_M "x" #BLOCK_N);
#define BACKWARD_DKDV(D_QK, D_V, SOFTCAP, BLOCK_M, BLOCK_N, STAGES, FUSED, TERMS) \
  check_dkdv<BackwardDkdvTraits<Bf16, D_QK, D_V, SOFTCAP, BLOCK_M, BLOCK_N, STAGES, FUSED, TERMS>>( \
      "backward_dkdv " #D_QK "/" #D_V " " #BLOCK_M "x" #BLOCK_N);
#define BACKWARD_DQ(D_QK, D_V, SOFTCAP, BLOCK_N, K_STAGES, V_STAGES, TERMS) \
  check_dq<BackwardDqTraits<Bf16, D_QK, D_V, SOFTCAP, BLOCK_N, K_STAGES, V_STAGES, TERMS>>("backward_dq " #D_QK \
                                                                                           "/" #D_V " 128x" #BLOCK_N);
#define DECODE(D_QK, D_V, SOFTCAP, BLOCK_N, STAGES) \
  check_attention<DecodeTraits<Bf16, D_QK, D_V, SOFTCAP, BLOCK_N, STAGES>>("decode " #D_QK "/" #D_V " 64x" #BLOCK_N);
#include "../sm90/instances.inc"
  check_fragment("operand in registers", gmma::ALayout_64x16{}, 8);
  std::printf("%d of %d statements about layouts differ from CuTe's\n", differences, compared);
  return differences != 0;
}
