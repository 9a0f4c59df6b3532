// Random decoding problems: their sizes and options. decode_case.cpp fills and checks them.
#include <algorithm>
#include <cmath>

#include "decode_case.h"

namespace fa::emu {

static int random_queries(Random& random, int group) {
  if (random.one_in(2)) return 1;
  return random.between(1, random.one_in(4) ? 1 + 150 / group : 6);
}

static int random_keys(Random& random, int page_size) {
  if (random.one_in(10)) return 0;
  if (random.one_in(6)) return random.between(1, 5);
  if (random.one_in(4)) return std::min(1024, (random.between(1, 600) + page_size - 1) / page_size * page_size);
  return random.between(1, random.one_in(4) ? 1100 : 400);
}

// Each new key follows one of the three before it, or none: deep trees.
static void add_trees(Random& random, DecodeCase& c) {
  c.right = 0;
  c.shares_tree = !c.is_packed && random.one_in(2);
  for (int n = 0; n < c.batch; ++n) {
    std::vector<int> parents;
    for (int i = 0; i < c.s_q[n]; ++i) parents.push_back(random.between(std::max(-1, i - 3), i - 1));
    c.parents.push_back(c.shares_tree && n > 0 ? c.parents[0] : parents);
  }
}

DecodeCase random_decode_case(Shape const& shape, uint32_t seed) {
  static int const kPageSizes[] = {8, 16, 24, 64, 72, 128, 256, 1, 2, 4, 100};  // TMA loads the first seven alone
  Random random{std::mt19937(seed)};
  DecodeCase c{};
  c.seed = seed;
  c.batch = random.between(1, 4);
  c.heads_kv = random.between(1, 2);
  c.group = random.one_in(3) ? 1 : random.one_in(12) ? random.between(65, 70) : random.between(2, 9);
  c.d_qk = random.one_in(2) ? shape.d_qk : random.between(1, shape.d_qk / 8) * 8;
  c.d_v = random.one_in(2) ? shape.d_v : random.between(1, shape.d_v / 8) * 8;
  c.is_packed = random.one_in(2);
  bool const is_contiguous = random.one_in(3);
  c.has_table = !is_contiguous || random.one_in(3);
  c.page_size = kPageSizes[random.between(0, shape.is_gathered ? 10 : 6)];
  int const s_q = random_queries(random, c.group);
  for (int n = 0; n < c.batch; ++n) {
    c.s_q.push_back(!c.is_packed ? s_q : random.one_in(5) ? 0 : random_queries(random, c.group));
    c.s_kv.push_back(random_keys(random, c.page_size));
  }
  if (random.one_in(2)) {  // appended in the same call
    c.new_keys = c.is_packed ? -1 : random.one_in(2) ? s_q : random.between(1, s_q);
    for (int n = 0; n < c.batch; ++n) c.s_kv[n] = std::max(c.s_kv[n], c.is_packed ? c.s_q[n] : c.new_keys);
    c.stores = random.one_in(2);
  }
  bool const has_many_splits = random.one_in(15);  // more than a warp has lanes, and keys for them
  if (has_many_splits) c.s_kv[0] = 64 * random.between(33, 45);
  int const longest = std::max(1, *std::max_element(c.s_kv.begin(), c.s_kv.end()));
  if (is_contiguous) c.page_size = longest + (random.one_in(2) ? 0 : random.between(1, 100));
  c.max_pages = is_contiguous ? 1 : (longest + c.page_size - 1) / c.page_size + random.between(0, 2);
  c.spare = random.between(0, 2);
  c.heads_first = random.one_in(2);
  c.padding = shape.is_e4m3 ? 2 * random.between(0, 1) : random.between(0, 2);
  c.left = random.one_in(3) ? random.between(0, random.one_in(2) ? 4 : 500) : -1;
  c.right = random.one_in(4) ? -1 : random.one_in(4) ? random.between(1, 100) : 0;
  c.scale = float(random.between(1, 4) / std::sqrt(c.d_qk));
  c.softcap = shape.has_softcap && !(shape.is_gathered && random.one_in(2)) ? random.between(1, 8) : 0;
  c.sinks = random.one_in(2) ? 0 : random.between(1, 2);
  c.splits = has_many_splits ? random.between(33, kMostSplits) : random.one_in(3) ? 1 : random.between(2, 9);
  c.has_equal_keys = random.one_in(5);
  bool const are_queries = c.new_keys < 0 || (c.new_keys > 0 && c.new_keys == s_q);
  if (are_queries && random.one_in(2)) add_trees(random, c);
  if (shape.is_e4m3) {
    c.d_qk = (c.d_qk + 8) / 16 * 16, c.d_v = (c.d_v + 8) / 16 * 16;
    c.scales = random.between(0, 2);
    c.stores = c.has_equal_keys = false;
  }
  if (shape.is_gathered && random.one_in(2)) {
    c.slopes = random.between(0, 2);
    c.bias = c.is_packed ? 0 : random.between(0, 3);
    c.has_equal_keys = false;
  }
  return c;
}

std::string describe(DecodeCase const& c) {
  std::string lengths;
  for (int n = 0; n < c.batch; ++n) lengths += " " + std::to_string(c.s_q[n]) + "x" + std::to_string(c.s_kv[n]);
  return "seed " + std::to_string(c.seed) + (c.is_packed ? " packed" : " dense") + ", S_q x S_kv" + lengths + ", new " +
         std::to_string(c.new_keys) + (c.stores ? " to store" : "") + ", H_kv " + std::to_string(c.heads_kv) + " G " +
         std::to_string(c.group) + ", D " + std::to_string(c.d_qk) + "/" + std::to_string(c.d_v) + ", " +
         std::to_string(c.max_pages) + " pages of " + std::to_string(c.page_size) +
         (c.has_table ? "" : " without table") + ", band (" + std::to_string(c.left) + ", " + std::to_string(c.right) +
         "), softcap " + std::to_string(static_cast<int>(c.softcap)) + ", sinks " + std::to_string(c.sinks) +
         ", splits " + std::to_string(c.splits) +
         (c.parents.empty() ? ""
          : c.shares_tree   ? ", one tree"
                            : ", trees") +
         ", slopes " + std::to_string(c.slopes) + ", bias " + std::to_string(c.bias) +
         (c.has_equal_keys ? ", equal keys" : "");
}

}  // namespace fa::emu
