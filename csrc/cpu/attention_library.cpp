// The C interface of attention on a CPU: how a call is cut into items of work, its memory, its threads.
#include <atomic>
#include <cstring>
#include <new>

#include "machines.h"
#include "threads.h"

namespace fa::cpu {

constexpr double kSmall = 1 << 20;  // multiplications in about the time that other threads take to start
constexpr int kTile = 48;           // query rows that are worked on together

// A call: its boundaries, copied, so that nobody changes them after they were checked, and its items.
struct Call {
  AttentionParams const& p;
  Attention const& kernels;
  AttentionParams const* moved;       // tangents, of a Jacobian-vector product; else null
  StatisticsParams const* statistics;  // else null
  int32 const *starts_q, *starts_kv;  // of packed sequences; null where dense
  int64* first;                       // packed: the first item of each sequence, in units of heads
  int64 count = 0;
  int rows_per_item = 0;              // forward
  bool splits = false;                // backward: each part of a unit is an item
  int64* first_share = nullptr;       // bytes before the shares of each sequence, packed and split
  char* shares = nullptr;
  int* progress = nullptr;            // of each item, where items wait for others
  std::atomic<int>* left = nullptr;   // parts of each unit that are not done, where they are split
  int64 heads = p.heads_kv;           // of a sequence that have items of their own
  int64 step = 1;                     // items that a thread takes at a time: then it knows its next one
  std::atomic<int64> next{0};
  std::atomic<bool> has_failed{false};

  // Gradients of weights rather than of their statistics, whose largest keys were found before.
  bool is_of_weights() const { return statistics && statistics->dweights && !statistics->largest_key; }

  int group() const { return int(p.heads_q / p.heads_kv); }
  int s_q(int64 b) const { return int(starts_q ? starts_q[b + 1] - starts_q[b] : p.rows_q); }
  int s_kv(int64 b) const { return int(starts_kv ? starts_kv[b + 1] - starts_kv[b] : p.rows_kv); }

  Unit unit(int64 b, int64 kv_head) const {
    Band const band = make_band(int(p.left), int(p.right), p.lower_right, s_q(b), s_kv(b));
    return {int(b), int(kv_head), starts_q ? starts_q[b] : 0, starts_kv ? starts_kv[b] : 0, band};
  }

  // Items of one head of a sequence.
  int64 items_of(int64 b) const {
    return rows_per_item ? (s_q(b) + rows_per_item - 1) / rows_per_item : splits ? part_count(s_kv(b)) : 1;
  }

  struct Place {
    int64 b, kv_head, index;
  };

  Place place(int64 n) const {
    int64 b = 0;
    if (first) {
      int64 end = p.batch;  // the last sequence that begins at or before n
      while (end - b > 1) {
        int64 const middle = (b + end) / 2;
        (first[middle] <= n ? b : end) = middle;
      }
      n -= first[b];
    } else {
      int64 const each = items_of(0) * heads;
      b = n / each;
      n -= b * each;
    }
    int64 const items = items_of(b);
    return {b, n / items, items - 1 - n % items};  // the last rows first: under a causal mask they take longest
  }

  ForwardItem forward_item(int64 n) const {
    Place const at = place(n);
    int const begin = int(at.index) * rows_per_item;
    return {unit(at.b, at.kv_head), {begin, smaller(begin + rows_per_item, s_q(at.b))}};
  }

  int64 unit_index(Place const& at) const { return at.b * p.heads_kv + at.kv_head; }

  char* shares_of(Place const& at, int64 share_bytes) const {
    int64 const parts = part_count(s_kv(at.b));
    int64 const before = first_share ? first_share[at.b] : at.b * p.heads_kv * parts * share_bytes;
    return shares + before + at.kv_head * parts * share_bytes;
  }

  BackwardItem backward_item(int64 n) const {
    Place const at = place(n);
    int const parts = part_count(s_kv(at.b)), index = int(at.index);
    BackwardItem item{unit(at.b, at.kv_head), {0, parts}, nullptr, nullptr, nullptr};
    if (splits) {
      item.parts = {index, index + 1};
      item.dq_shares = shares_of(at, kernels.share_bytes(p, item.unit));
    }
    if (progress) {
      int64 const each = items_of(at.b), own = unit_index(at) * each + index;
      item.progress = progress + own;
      if (int64 const back = units_back(at)) item.before = progress + own - back * each;
    }
    return item;
  }

  // How many units before this one the last one is that adds to the same dbias; 0 if there is none.
  int64 units_back(Place const& at) const {
    bool const shares_heads = p.bias && !p.dbias_head, shares_batch = !p.dbias_batch;
    if (shares_heads && at.kv_head) return 1;
    if (!shares_batch || !at.b) return 0;
    return shares_heads ? 1 : p.heads_kv;
  }
};

// Memory of one call, of a size known beforehand.
template <class T>
static T* taken(char*& at, int64 count) {
  T* const piece = reinterpret_cast<T*>(at);
  at += (count * int64(sizeof(T)) + 63) / 64 * 64;
  return piece;
}

static bool is_right(int32 const* starts, int64 count, int64 rows) {
  if (starts[0] != 0 || starts[count] != rows) return false;
  for (int64 b = 0; b < count; ++b)
    if (starts[b] > starts[b + 1]) return false;
  return true;
}

// Copies the boundaries of packed sequences, and allocates what is computed for each.
static Outcome copy_boundaries(Call& call) {
  AttentionParams const& p = call.p;
  if (!p.cu_seqlens_q) return kDone;
  static thread_local Memory memory;
  char* at = static_cast<char*>(memory.bytes((p.batch + 1) * 24 + 256));
  if (!at) return kNoMemory;
  call.first = taken<int64>(at, p.batch + 1);
  call.first_share = taken<int64>(at, p.batch + 1);
  int32* const starts[2] = {taken<int32>(at, p.batch + 1), taken<int32>(at, p.batch + 1)};
  std::memcpy(starts[0], p.cu_seqlens_q, (p.batch + 1) * sizeof(int32));
  std::memcpy(starts[1], p.cu_seqlens_kv, (p.batch + 1) * sizeof(int32));
  call.starts_q = starts[0];
  call.starts_kv = starts[1];
  bool const is_fine = is_right(starts[0], p.batch, p.rows_q) && is_right(starts[1], p.batch, p.rows_kv);
  return is_fine ? kDone : kWrongValues;
}

static void count_items(Call& call) {
  AttentionParams const& p = call.p;
  if (!call.first) {
    call.count = p.batch ? p.batch * call.heads * call.items_of(0) : 0;
    return;
  }
  for (int64 b = 0; b < p.batch; ++b) {
    call.first[b] = call.count;
    call.count += call.heads * call.items_of(b);
  }
  call.first[p.batch] = call.count;
}

// Multiplications of the forward pass, were every pair kept.
static double work_of(Call const& call) {
  AttentionParams const& p = call.p;
  double pairs = 0;
  if (!call.first) pairs = double(p.batch) * double(p.rows_q) * double(p.rows_kv);
  else
    for (int64 b = 0; b < p.batch; ++b) pairs += double(call.s_q(b)) * call.s_kv(b);
  return pairs * double(p.heads_q * (p.head_dim_qk + p.head_dim_v));
}

static bool are_few(int64 units, int64 threads) { return units % threads && units < 4 * threads; }

// The longest of a packed batch's sequences.
static int64 longest(Call const& call) {
  int64 most = 0;
  for (int64 b = 0; b < call.p.batch; ++b)
    if (call.s_q(b) > most) most = call.s_q(b);
  return most;
}

// Query rows of an item: all, unless threads would be without work. A row's bits do not depend on it.
static int rows_of_item(Call const& call, int64 threads) {
  AttentionParams const& p = call.p;
  int64 rows = call.first ? longest(call) : p.rows_q;
  int64 const all = call.first ? p.rows_q : p.batch * p.rows_q;
  bool const splits =
      threads > 1 && (call.first ? rows * 4 * threads > all * p.heads_kv : are_few(p.batch * p.heads_kv, threads));
  if (splits) rows = all * p.heads_kv / (4 * threads);
  return int((rows < kTile ? kTile : rows + kTile - 1) / kTile * kTile);
}

template <class Item, class Bytes, class Run>
static void take_items(Call& call, Memory& memory, Item const& item_at, Bytes const& bytes, Run const& run) {
  for (int64 n; (n = call.next.fetch_add(call.step)) < call.count;) {
    int64 const end = n + call.step < call.count ? n + call.step : call.count;
    auto item = item_at(n);
    for (; n < end; ++n) {
      void* const scratch = memory.bytes(bytes(item));
      if (!scratch) {
        call.has_failed = true;
        return;
      }
      auto const following = item_at(n + 1 < end ? n + 1 : n);
      run(item, n + 1 < end ? &following : nullptr, scratch);
      item = following;
    }
  }
  memory.give_back();
}

static thread_local Memory scratch_memory;

static void work_forward(void* data) {
  Call& call = *static_cast<Call*>(data);
  take_items(
      call, scratch_memory, [&](int64 n) { return call.forward_item(n); },
      [&](ForwardItem const& item) { return call.kernels.forward_bytes(call.p, item); },
      [&](ForwardItem const& item, ForwardItem const* next, void* memory) {
        call.kernels.forward(call.p, item, next, memory);
      });
}

static void work_jvp(void* data) {
  Call& call = *static_cast<Call*>(data);
  take_items(
      call, scratch_memory, [&](int64 n) { return call.forward_item(n); },
      [&](ForwardItem const& item) { return call.kernels.jvp_bytes(call.p, *call.moved, item); },
      [&](ForwardItem const& item, ForwardItem const*, void* memory) {
        call.kernels.jvp(call.p, *call.moved, item, memory);
      });
}

static void work_statistics(void* data) {
  Call& call = *static_cast<Call*>(data);
  take_items(
      call, scratch_memory, [&](int64 n) { return call.forward_item(n); },
      [&](ForwardItem const& item) { return call.kernels.statistics_bytes(call.p, *call.statistics, item); },
      [&](ForwardItem const& item, ForwardItem const*, void* memory) {
        call.kernels.statistics(call.p, *call.statistics, item, memory);
      });
}

static void work_weights(void* data) {
  Call& call = *static_cast<Call*>(data);
  take_items(
      call, scratch_memory, [&](int64 n) { return call.forward_item(n); },
      [&](ForwardItem const& item) { return call.kernels.weights_bytes(call.p, *call.statistics, item); },
      [&](ForwardItem const& item, ForwardItem const*, void* memory) {
        call.kernels.weights(call.p, *call.statistics, item, memory);
      });
}

static void work_backward(void* data) {
  Call& call = *static_cast<Call*>(data);
  take_items(
      call, scratch_memory, [&](int64 n) { return call.backward_item(n); },
      [&](BackwardItem const& item) {
        return call.moved             ? call.kernels.backward_jvp_bytes(call.p, *call.moved, item)
               : call.is_of_weights() ? call.kernels.weights_backward_bytes(call.p, *call.statistics, item)
                                      : call.kernels.backward_bytes(call.p, item);
      },
      [&](BackwardItem const& item, BackwardItem const* next, void* memory) {
        if (call.moved) call.kernels.backward_jvp(call.p, *call.moved, item, memory);
        else if (call.is_of_weights()) call.kernels.weights_backward(call.p, *call.statistics, item, memory);
        else if (call.statistics) call.kernels.statistics_backward(call.p, *call.statistics, item, memory);
        else call.kernels.backward(call.p, item, next, memory);
        if (!call.splits || !call.p.dq) return;
        Unit const& unit = item.unit;
        if (call.left[unit.b * call.p.heads_kv + unit.kv_head].fetch_sub(1) == 1)
          call.kernels.add_shares(call.p, unit, item.dq_shares);
      });
}

static int64 threads_for(Call const& call, double work) {
  return work < kSmall ? 1 : call.p.threads < call.count ? call.p.threads : call.count;
}

static void run(Call& call, double work, void (*function)(void*)) {
  int64 const threads = threads_for(call, work);
  call.step = call.count / (16 * (threads ? threads : 1));
  if (call.step < 1 || call.progress) call.step = 1;
  if (call.count) on_threads(threads, function, &call);
}

static Outcome forward(Call& call) {
  if (Outcome const outcome = copy_boundaries(call)) return outcome;
  StatisticsParams const* const of = call.statistics;
  if (of && longest(call) > of->parts * of->rows_per_part) return kWrongValues;
  double const work = work_of(call);
  call.rows_per_item = of ? int(of->rows_per_part) : rows_of_item(call, work < kSmall ? 1 : call.p.threads);
  count_items(call);
  run(call, work, of ? work_statistics : call.moved ? work_jvp : work_forward);
  return call.has_failed ? kNoMemory : kDone;
}

// Rows of averages are few enough to stay in a cache, and to leave no thread without work.
static int rows_of_averages(AttentionParams const& p) {
  constexpr int64 kWords = 96 << 10;
  int64 const fitting = kWords / (p.rows_kv ? p.rows_kv : 1), fair = p.batch * p.rows_q / (4 * p.threads);
  int64 const tiles = (fitting < fair ? fitting : fair) / kTile;
  return int(tiles ? tiles : 1) * kTile;
}

static Outcome weights(Call& call) {
  StatisticsParams const& of = *call.statistics;
  if (call.p.cu_seqlens_q) return kWrongValues;
  double const work = work_of(call);
  if (of.averages) call.heads = 1;
  call.rows_per_item = of.averages ? rows_of_averages(call.p) : rows_of_item(call, work < kSmall ? 1 : call.p.threads);
  count_items(call);
  run(call, work, work_weights);
  return call.has_failed ? kNoMemory : kDone;
}

// Where parts of units are items: where each leaves its share of dq, and how many are not done.
static bool make_shares(Call& call, Memory& memory) {
  AttentionParams const& p = call.p;
  int64 bytes = 0;
  for (int64 b = 0; b < p.batch; ++b) {
    if (call.first_share) call.first_share[b] = bytes;
    bytes += p.heads_kv * part_count(call.s_kv(b)) * call.kernels.share_bytes(p, call.unit(b, 0));
  }
  int64 const units = p.batch * p.heads_kv;
  char* at = static_cast<char*>(memory.bytes(bytes + units * int64(sizeof(std::atomic<int>)) + 128));
  if (!at) return false;
  call.shares = taken<char>(at, bytes);
  call.left = taken<std::atomic<int>>(at, units);
  for (int64 n = 0; n < units; ++n) new (call.left + n) std::atomic<int>(part_count(call.s_kv(n / p.heads_kv)));
  return true;
}

// Sums over the batch, of gradients that all sequences share, are left to the caller.
static Outcome backward(Call& call) {
  if (Outcome const outcome = copy_boundaries(call)) return outcome;
  AttentionParams const& p = call.p;
  double const work = work_of(call);
  int64 const threads = work < kSmall ? 1 : p.threads;
  bool const shares_keys = p.dbias && !p.dbias_key && p.rows_kv > 1;  // parts of one unit would add to the same numbers
  call.splits =
      threads > 1 && !shares_keys &&
      (call.first ? longest(call) * 2 * threads > p.rows_q * p.heads_kv : are_few(p.batch * p.heads_kv, threads));
  static thread_local Memory shares, progress;
  if (call.splits && !make_shares(call, shares)) return kNoMemory;
  count_items(call);
  if (p.dbias && (!p.dbias_batch || !p.dbias_head)) {
    call.progress = static_cast<int*>(progress.bytes(call.count * int64(sizeof(int)) + 64));
    if (!call.progress) return kNoMemory;
    std::memset(call.progress, 0, call.count * sizeof(int));
  }
  run(call, work, work_backward);
  return call.has_failed ? kNoMemory : kDone;
}

static Outcome weights_backward(Call& call) {
  AttentionParams const& p = call.p;
  if (p.cu_seqlens_q) return kWrongValues;
  if (!call.kernels.are_small_weights(p, call.unit(0, 0))) {
    Call rows{p, call.kernels, nullptr, call.statistics, nullptr, nullptr, nullptr};
    if (Outcome const outcome = weights(rows)) return outcome;
  }
  return backward(call);
}

static Outcome attend(AttentionParams const& p, AttentionParams const* moved, StatisticsParams const* statistics,
                      Outcome (*pass)(Call&)) {
  Machine const* const machine = machine_for(p.machine);
  if (!machine) return kNoMachine;
  Call call{p, machine->attention(p.dtype), moved, statistics, nullptr, nullptr, nullptr};
  return pass(call);
}

static Outcome attend(const char* packed, const char* packed_moved, Outcome (*pass)(Call&)) {
  AttentionParams p, moved;
  std::memcpy(&p, packed, sizeof p);
  if (packed_moved) std::memcpy(&moved, packed_moved, sizeof moved);
  return attend(p, packed_moved ? &moved : nullptr, nullptr, pass);
}

static Outcome describe(const char* packed, const char* packed_statistics, Outcome (*pass)(Call&)) {
  AttentionParams p;
  StatisticsParams statistics;
  std::memcpy(&p, packed, sizeof p);
  std::memcpy(&statistics, packed_statistics, sizeof statistics);
  p.v = nullptr;
  p.head_dim_v = 1;
  p.dropout_threshold = 0;
  return attend(p, nullptr, &statistics, pass);
}

}  // namespace fa::cpu

FA_PUBLIC long long fa_cpu_attention_version() { return fa::cpu::kAttentionVersion; }
FA_PUBLIC long long fa_cpu_attention_bytes() { return sizeof(fa::cpu::AttentionParams); }
FA_PUBLIC long long fa_cpu_forward(const char* packed) { return fa::cpu::attend(packed, nullptr, fa::cpu::forward); }
FA_PUBLIC long long fa_cpu_backward(const char* packed) { return fa::cpu::attend(packed, nullptr, fa::cpu::backward); }

// Their Jacobian-vector products: results are those of the pass, moved along the tangents of the second struct.
FA_PUBLIC long long fa_cpu_jvp(const char* packed, const char* moved) {
  return fa::cpu::attend(packed, moved, fa::cpu::forward);
}
FA_PUBLIC long long fa_cpu_backward_jvp(const char* packed, const char* moved) {
  return fa::cpu::attend(packed, moved, fa::cpu::backward);
}

// Statistics of the weights, or what their gradient needs of each row; and the gradients of the inputs.
FA_PUBLIC long long fa_cpu_statistics(const char* packed, const char* statistics) {
  return fa::cpu::describe(packed, statistics, fa::cpu::forward);
}
FA_PUBLIC long long fa_cpu_statistics_backward(const char* packed, const char* statistics) {
  return fa::cpu::describe(packed, statistics, fa::cpu::backward);
}

// The weights; and the gradients of q, k, bias and sinks out of theirs, with memory for lse and its gradient.
FA_PUBLIC long long fa_cpu_weights(const char* packed, const char* statistics) {
  return fa::cpu::describe(packed, statistics, fa::cpu::weights);
}
FA_PUBLIC long long fa_cpu_weights_backward(const char* packed, const char* statistics) {
  return fa::cpu::describe(packed, statistics, fa::cpu::weights_backward);
}
