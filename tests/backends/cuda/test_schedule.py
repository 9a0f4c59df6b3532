"""The tile scheduler's own code, csrc/sm90/schedule.h: every tile once, no block with much more work than others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
MULTIPROCESSORS = 132

# Prints, for each line of sizes that it reads, how many tiles there are, how often they are taken, the longest block's
# work and the mean. A tile works on its blocks of keys, and on as much as one more to begin and end.
SOURCE = """
#include <cstdio>
#include <map>
#include <tuple>
#include "sm90/schedule.h"

namespace fa::emu {  // as much of a machine as the scheduler sees
static int block = 0, blocks = 1;
int block_index() { return block; }
int block_count() { return blocks; }
bool may_load(void const*, size_t) { return true; }
}
using fa::emu::block, fa::emu::blocks;
using namespace fa;
using namespace fa::sm90;

int main() {
  constexpr int kRows = 128, kKeys = 128;
  long s_q, s_kv, heads, batch, left, right, per_pass;
  while (std::scanf("%d %ld %ld %ld %ld", &blocks, &s_q, &s_kv, &heads, &batch) == 5) {
    if (std::scanf("%ld %ld %ld", &left, &right, &per_pass) != 3) return 1;
    ForwardParams p{};
    p.seqlen_q = s_q, p.seqlen_kv = s_kv, p.heads_q = heads, p.batch = batch, p.heads_per_pass = per_pass;
    p.left = left < 0 ? kUnbounded : left, p.right = right < 0 ? kUnbounded : right, p.lower_right = 1;
    std::map<std::tuple<int, int, int>, int> taken;
    long longest = 0, all = 0;
    for (block = 0; block < blocks; ++block) {
      Schedule<kRows> schedule(p);
      long work = 0;
      for (Tile tile; schedule.next(tile);) {
        ++taken[{tile.row, tile.head, tile.batch}];
        Band const band = make_band(static_cast<int>(p.left), static_cast<int>(p.right), true, tile.s_q, tile.s_kv);
        Range const keys = tile_range(band, tile.row, smaller(tile.row + kRows, tile.s_q));
        work += (keys.end + kKeys - 1) / kKeys - keys.begin / kKeys + 1;
      }
      longest = work > longest ? work : longest, all += work;
    }
    int most = 0;
    for (auto const& [tile, times] : taken) most = times > most ? times : most;
    std::printf("%zu %d %ld %f\\n", taken.size(), most, longest, static_cast<double>(all) / blocks);
  }
}
"""

# (s_q, s_kv, heads, batch): the causal shapes of a language model at head dim 128
CAUSAL = [
    (1024, 1024, 16, 16), (2048, 2048, 16, 8), (4096, 4096, 16, 4), (8192, 8192, 16, 2), (16384, 16384, 16, 1),
    (4096, 4096, 32, 1), (8192, 8192, 32, 1), (16384, 16384, 32, 1), (2048, 2048, 32, 4),
]  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile csrc/sm90/schedule.h")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text(SOURCE)
    program = folder / "schedule"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-DFA_EMULATE", f"-I{CSRC}", "-o", program, folder / "schedule.cpp"], check=True
    )
    return program


def heads_per_pass(s_kv: int, heads: int) -> int:
    """Those whose keys and values of head dim 128, in 16 bits, fit 32 MiB."""
    return max(1, min(heads, (32 << 20) // (s_kv * 512)))


def work_of(scheduler: Path, blocks: int, sizes: tuple[int, int, int, int], left: int, right: int) -> tuple[int, float]:
    """``(longest, mean)`` of the blocks' work, after a look whether every tile is taken once."""
    s_q, s_kv, heads, batch = sizes
    numbers = (blocks, *sizes, left, right, heads_per_pass(s_kv, heads * batch))
    text = " ".join(map(str, numbers))
    printed = subprocess.run([scheduler], input=text, capture_output=True, text=True, check=True).stdout.split()
    tiles, most = int(printed[0]), int(printed[1])
    assert tiles == -(-s_q // 128) * heads * batch and most == 1, (numbers, printed)
    return int(printed[2]), float(printed[3])


@pytest.mark.parametrize("sizes", CAUSAL, ids=str)
def test_causal_work_is_balanced(scheduler: Path, sizes: tuple[int, int, int, int]) -> None:
    longest, mean = work_of(scheduler, MULTIPROCESSORS, sizes, -1, 0)
    assert longest <= 1.01 * mean


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (100, 0), (200, 30), (-1, 7)])
def test_every_tile_is_taken_once(scheduler: Path, left: int, right: int) -> None:
    """With as many blocks as there may be, few tiles or many, and the last pass narrower than the others."""
    for blocks in (1, 2, 3, 7, 131, 132, 400):
        for sizes in ((1, 1, 1, 1), (300, 300, 5, 3), (700, 200, 7, 1), (200, 700, 3, 2), (16384, 16384, 3, 1)):
            work_of(scheduler, blocks, sizes, left, right)
        longest, mean = work_of(scheduler, blocks, (1280, 1280, 66, 1), -1, -1)
        assert longest == mean or 660 % blocks  # tiles of one length are shared out evenly, if they can be
