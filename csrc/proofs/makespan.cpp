// How evenly the kernels' own schedulers (sm90/schedule.h, backward.h) share out work: makespan.py and
// tests/backends/cuda/test_schedule.py build and run it.
//
// Reads problems: KERNEL BLOCKS ROWS KEYS PACKED BATCH HEADS_Q HEADS_KV LEFT RIGHT HEADS_PER_PASS PARTS OVERHEAD,
// then the lengths of queries and keys: of each packed sequence, or one pair for all. For each it prints how many tiles there
// are, how often one is taken at most, the longest block's work, the mean, and the least that the longest could be. A
// tile works on its blocks of the other side, and on as much as OVERHEAD more of them to begin and end; a block takes
// its next tile when it is done with the one before.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <queue>
#include <string>
#include <tuple>
#include <vector>

#include "sm90/backward.h"
#include "sm90/schedule.h"

namespace fa::emu {  // as much of a machine as the schedulers see
static int block = 0, blocks = 1;
int block_index() { return block; }
int block_count() { return blocks; }
bool may_load(void const*, size_t) { return true; }
bool may_add(void const*, size_t) { return true; }
bool may_store(void const*, size_t) { return true; }
}  // namespace fa::emu

namespace fa {

struct Problem {
  int blocks = 0;
  long rows = 0, keys = 0, packed = 0, batch = 0, heads_q = 0, heads_kv = 0, left = 0, right = 0, per_pass = 0;
  int parts = 0;  // of dk and dv: every query head has a block of its own
  double overhead = 0;
  std::vector<int32> cu_q = {0}, cu_kv = {0};
};

static bool read(Problem& p) {
  if (std::scanf("%d %ld %ld %ld %ld", &p.blocks, &p.rows, &p.keys, &p.packed, &p.batch) != 5) return false;
  if (std::scanf("%ld %ld %ld %ld", &p.heads_q, &p.heads_kv, &p.left, &p.right) != 4) return false;
  if (std::scanf("%ld %d %lf", &p.per_pass, &p.parts, &p.overhead) != 3) return false;
  for (long n = 0; n < (p.packed ? p.batch : 1); ++n) {
    int s_q = 0, s_kv = 0;
    if (std::scanf("%d %d", &s_q, &s_kv) != 2) return false;
    p.cu_q.push_back(p.cu_q.back() + s_q), p.cu_kv.push_back(p.cu_kv.back() + s_kv);
  }
  return true;
}

template <class Params>
static Params params_of(Problem const& of) {
  Params p{};
  p.batch = of.batch, p.heads_q = of.heads_q, p.heads_kv = of.heads_kv, p.heads_per_pass = of.per_pass;
  p.seqlen_q = of.cu_q.back(), p.seqlen_kv = of.cu_kv.back();
  p.left = of.left < 0 ? kUnbounded : of.left, p.right = of.right < 0 ? kUnbounded : of.right, p.lower_right = 1;
  if (of.packed) p.cu_seqlens_q = of.cu_q.data(), p.cu_seqlens_kv = of.cu_kv.data();
  return p;
}

// The work of each tile and of each block, as blocks take tiles.
struct Account {
  std::map<std::tuple<int, int, int>, int> taken;
  double all = 0, longest = 0, shortest = 1e300;  // tile

  double add(sm90::Tile const& tile, double work) {
    ++taken[{tile.row, tile.head, tile.batch}];
    all += work, longest = work > longest ? work : longest, shortest = work < shortest ? work : shortest;
    return work;
  }
  void print(double makespan, size_t blocks) const {
    int most = 0;
    for (auto const& [tile, times] : taken) most = times > most ? times : most;
    double const mean = all / static_cast<double>(blocks),
                 rounds = static_cast<double>((taken.size() + blocks - 1) / blocks) * shortest;
    double const tile = longest > rounds ? longest : rounds;
    std::printf("%zu %d %f %f %f\n", taken.size(), most, makespan, mean, mean > tile ? mean : tile);
  }
};

using Moment = std::pair<double, int>;  // when a block is free, and which
using Free = std::priority_queue<Moment, std::vector<Moment>, std::greater<Moment>>;

static double blocks_between(Range const& range, long size) {
  return range.begin < range.end ? static_cast<double>((range.end + size - 1) / size - range.begin / size) : 0;
}

template <int ROWS>
static void forward(Problem const& of) {
  ForwardParams p = params_of<ForwardParams>(of);
  int32 counter = 0;
  if (of.packed || of.left >= 0 || of.right >= 0) p.counter = &counter;
  emu::blocks = of.blocks;
  std::vector<sm90::Schedule<ROWS>> schedules;
  Free free;
  for (emu::block = 0; emu::block < of.blocks; ++emu::block) {
    schedules.emplace_back(p);
    free.push({0, emu::block});
  }
  Account account;
  double makespan = 0;
  while (!free.empty()) {
    auto const [now, block] = free.top();
    free.pop();
    emu::block = block;
    sm90::Tile tile{};
    if (!schedules[static_cast<size_t>(block)].next(tile)) continue;
    Band const band = make_band(static_cast<int>(p.left), static_cast<int>(p.right), true, tile.s_q, tile.s_kv);
    Range const keys = tile_range(band, tile.row, smaller(tile.row + ROWS, tile.s_q));
    double const end = now + account.add(tile, blocks_between(keys, of.keys) + of.overhead);
    makespan = end > makespan ? end : makespan;
    free.push({end, block});
  }
  account.print(makespan, static_cast<size_t>(of.blocks));
  if (counter) std::fprintf(stderr, "the counter is left at %d\n", counter), std::exit(1);
}

// The hardware starts the blocks of a backward kernel in order, each when one before has ended.
template <int BLOCK, sm90::Of OF>
static void backward(Problem const& of) {
  constexpr bool OF_KEYS = OF == sm90::Of::kKeys;
  BackwardParams p = params_of<BackwardParams>(of);
  float part = 0;
  if (of.parts) p.dk_parts = &part;
  auto const padded = [&](int64 rows) {
    return (rows + (of.packed ? of.batch * kPaddedRows : 0) + kPaddedRows - 1) / kPaddedRows * kPaddedRows;
  };
  p.padded_q = padded(p.seqlen_q), p.padded_kv = padded(p.seqlen_kv), p.kv_heads_per_pass = of.per_pass;
  Free free;
  for (int block = 0; block < of.blocks; ++block) free.push({0, block});
  Account account;
  double makespan = 0;
  for (int index = 0; index < sm90::tile_count<BLOCK, OF>(p); ++index) {
    sm90::Tile const tile = sm90::find_tile<BLOCK, OF>(p, index);
    if (tile.row >= (OF_KEYS ? tile.s_kv : tile.s_q)) continue;
    Band const band = sm90::band_of(p, tile), turned = OF_KEYS ? transposed(band) : band;
    Range const range = tile_range(turned, tile.row, smaller(tile.row + BLOCK, turned.s_q));
    sm90::Heads const heads = sm90::query_heads(p, tile);
    double const times = OF_KEYS ? heads.end - heads.first : 1;
    auto const [now, block] = free.top();
    free.pop();
    double const end =
        now + account.add(tile, times * blocks_between(range, OF_KEYS ? of.rows : of.keys) + of.overhead);
    makespan = end > makespan ? end : makespan;
    free.push({end, block});
  }
  account.print(makespan, static_cast<size_t>(of.blocks));
}

static bool run(std::string const& kernel, Problem const& p) {
  if (kernel == "forward" && p.rows == 128) forward<128>(p);
  else if (kernel == "forward" && p.rows == 192) forward<192>(p);
  else if (kernel == "dkdv" && p.keys == 128) backward<128, sm90::Of::kKeys>(p);
  else if (kernel == "dkdv" && p.keys == 64) backward<64, sm90::Of::kKeys>(p);
  else if (kernel == "dq" && p.rows == 128) backward<128, sm90::Of::kQueries>(p);
  else return false;
  return true;
}

}  // namespace fa

int main() {
  char kernel[16];
  while (std::scanf("%15s", kernel) == 1) {
    fa::Problem problem;
    if (!fa::read(problem) || !fa::run(kernel, problem))
      return std::fprintf(stderr, "%s: no such problem\n", kernel), 1;
  }
  return 0;
}
