// Operations on tiles and accumulators that all kernels use: loads, products, and stores.
//
// An accumulator [64, COLUMNS] lies in COLUMNS / 2 registers of each thread (softmax.h says where). The same layout, in
// pairs of 16-bit numbers, is that of an operand in registers.
#pragma once
#include "shared.h"

namespace fa::sm90 {

// Named barriers: 0 is that of the whole block; then one per consumer for ping-pong and one per consumer for
// its own threads.
constexpr int kPingPongBarrier = 1, kOwnBarrier = 4, kConsumersBarrier = 7;

struct Place {  // the part of the fragments that this thread holds; computed again wherever needed (thread_index)
  int thread;  // among all consumers
  FA_DEVICE int consumer() const { return thread / kWarpgroup; }
  FA_DEVICE int warp() const { return thread / 32 % 4; }  // of 16 rows each
  FA_DEVICE int lane() const { return thread % 32; }
  FA_DEVICE int first_row() const { return thread / 32 * 16 + lane() / 4; }  // in the tile; the other is 8 below
  FA_DEVICE int first_column() const { return lane() % 4 * 2; }
};

FA_DEVICE Place this_place() { return {thread_index() - kWarpgroup}; }

// ---- loads -----------------------------------------------------------------------------------------------------------

// A tile of ROWS rows as CHUNKS boxes of 64 columns, on one barrier.
template <int ROWS, int CHUNKS>
FA_DEVICE void load_tile(uint32 to, TensorMap const& map, uint32 barrier, int row, int head, int batch,
                         uint64 l2_hint) {
  mbarrier_expect(barrier, ROWS * CHUNKS * kRowBytes);
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    tma_load(to + chunk * ROWS * kRowBytes, &map, barrier, chunk * kChunkColumns, row, head, batch, l2_hint);
  }
}

// Signals that the warp is done with a stage, by one lane.
template <int STAGES>
FA_DEVICE void release(Ring<STAGES>& ring) {
  if (thread_index() % 32 == 0) mbarrier_arrive(ring.empty());
  ring.advance();
}

// ---- products; each is one committed group ---------------------------------------------------------------------------

// d[64, N] = a[64, COLUMNS] b[N, COLUMNS]^T: K-major descriptors in tiles of ROWS_A and ROWS_B rows.
template <class T, int COLUMNS, int ROWS_A, int ROWS_B, int N>
FA_DEVICE void multiply_by_rows(float (&d)[N], uint32 a, uint32 b) {
  FA_UNROLL
  for (int c = 0; c < COLUMNS; c += 16) {
    wgmma_ss<0, 0>(T{}, d, a + k_major_step(ROWS_A, c), b + k_major_step(ROWS_B, c), c != 0);
  }
  wgmma_commit();
}

// d[64, N] += a[64, rows] b[rows, N]: a in registers, b an N-major descriptor.
template <class T, int A, int N>
FA_DEVICE void add_product(float (&d)[N], uint32 const (&a)[A], uint32 b) {
  FA_UNROLL
  for (int row = 0; row < 4 * A; row += 16) {
    int const i = row / 4;
    wgmma_rs<1>(T{}, d, a[i], a[i + 1], a[i + 2], a[i + 3], b + n_major_step(row), 1);
  }
  wgmma_commit();
}

// ---- between registers and memory ------------------------------------------------------------------------------------
template <class T, int N>
FA_DEVICE void pack_fragment(uint32 (&packed)[N / 2], float const (&x)[N]) {
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) packed[i] = pack(T{}, x[2 * i], x[2 * i + 1]);
}

// Into 64 rows of a tile of ROWS rows in shared memory, swizzled as TMA and wgmma expect it. `to` is where the 64 rows
// begin in the first chunk of columns.
template <int ROWS, int N>
FA_DEVICE void stage_fragment(uint32 to, uint32 const (&x)[N]) {
  Place const at = this_place();
  int const row = at.warp() * 16 + at.lane() % 16;  // whose address this lane gives
  uint32 const swizzle = row % 8 * 16;
  FA_UNROLL
  for (int j = 0; j < N / 4; ++j) {
    uint32 const column = (j % 4 * 32 + at.lane() / 16 * 16) ^ swizzle;
    store_matrices(to + row * kRowBytes + j / 4 * (ROWS * kRowBytes) + column, x[4 * j], x[4 * j + 1], x[4 * j + 2],
                   x[4 * j + 3]);
  }
}

// Stores the first `rows` rows and `columns` columns directly to global memory, for tiles of which TMA would also write
// rows of the next sequence. `to` is row 0 of the fragment.
template <int N>
FA_DEVICE void store_fragment(void* to, int64 row_stride, int rows, int columns, uint32 const (&x)[N]) {
  Place const at = this_place();
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    int const row = at.warp() * 16 + at.lane() / 4 + 8 * r;
    if (row >= rows) continue;
    uint16* const first = static_cast<uint16*>(to) + row * row_stride + at.first_column();
    FA_UNROLL
    for (int j = 0; j < N / 2; ++j) {
      if (8 * j >= columns) continue;
      store_global(reinterpret_cast<uint32*>(first + 8 * j), x[2 * j + r]);
    }
  }
}

// Zeroes the rows of a tile in shared memory outside `kept`, by all consumers: they may hold NaN, and 0 times NaN is
// NaN. A fence_proxy_async and a barrier have to follow before the tile is used.
template <int ROWS, int CHUNKS, int CONSUMERS>
FA_DEVICE void clear_rows(uint32 tile, Range kept) {
  constexpr int kPieces = CHUNKS * 8;  // of 16 bytes in a row
  for (int i = this_place().thread; i < ROWS * kPieces; i += CONSUMERS * kWarpgroup) {
    int const row = i % ROWS, piece = i / ROWS;
    if (contains(kept, row)) continue;
    store_shared(tile + (piece / 8 * ROWS + row) * kRowBytes + piece % 8 * 16, {0, 0, 0, 0});
  }
}

}  // namespace fa::sm90
