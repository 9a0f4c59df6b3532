// The C interface of attention to a cache on a CPU: the plan of a call, its memory, its threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "machines.h"
#include "threads.h"

namespace fa::cpu {

constexpr int64 kParts = 64;          // about so many parts are enough for the threads of any machine
constexpr int64 kLeastKeys = 128;     // of a part: fewer are not worth the joining
constexpr int64 kSmall = 1 << 17;     // numbers of keys and values that one thread reads before others have woken up

struct Task {
  Sequence sequence;
  Range keys;        // that some row keeps
  int first_part, parts;
  int64 memory;      // where its parts begin, in floats
  std::atomic<int> left;
};

struct Call {
  Params const& params;
  Decode const& kernels;
  Task* tasks;
  int task_count;
  int64 keys_per_part;
  int part_count;
  float* parts;
  std::atomic<int> next{0};
  std::atomic<bool> has_failed{false};
};

static Task& task_of(Call const& call, int part) {
  int begin = 0, end = call.task_count;  // the last task that begins at or before `part`
  while (end - begin > 1) {
    int const middle = (begin + end) / 2;
    (call.tasks[middle].first_part <= part ? begin : end) = middle;
  }
  return call.tasks[begin];
}

static void work(void* data) {
  Call& call = *static_cast<Call*>(data);
  Params const& p = call.params;
  static thread_local Memory memory;
  for (int n; (n = call.next.fetch_add(1)) < call.part_count;) {
    Task& task = task_of(call, n);
    Sequence const& s = task.sequence;
    auto* const scratch = static_cast<float*>(memory.bytes(scratch_floats(s.rows, p.head_dim_qk) * sizeof(float)));
    if (!scratch) {
      call.has_failed = true;
      return;
    }
    int const index = n - task.first_part;
    int64 const step = part_floats(s.rows, p.head_dim_v);
    float* const parts = call.parts + task.memory;
    int64 const begin = task.keys.begin + index * call.keys_per_part, end = begin + call.keys_per_part;
    Range const keys = {int(begin), int(end < task.keys.end ? end : task.keys.end)};
    call.kernels.attend(p, s, keys, scratch_at(scratch, s.rows, p.head_dim_qk),
                        part_at(parts + index * step, s.rows, p.head_dim_v));
    if (task.left.fetch_sub(1) == 1) call.kernels.join(p, s, parts, task.parts);
  }
}

static bool has_right_length(Params const& p, int b) {
  return p.cache_lengths[b] >= 0 && p.cache_lengths[b] <= p.capacity;
}

static Sequence sequence_of(Params const& p, int b) {
  int64 const first = p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * p.rows_q;
  int const s_q = int(p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - first : p.rows_q);
  int const s_kv = p.cache_lengths[b] + int(p.rows_new < 0 ? s_q : p.rows_new);
  return {b, first, make_band(int(p.left), int(p.right), true, s_q, s_kv), int(p.heads_q) * s_q};
}

// Stores the new rows of a sequence in one of the caches.
static void append(Params const& p, Sequence const& s, void const* rows, Strides const& from, void const* cache,
                   Strides const& to, int64 dim) {
  static constexpr int64 kBytes[] = {4, 2, 2, 1};  // by Dtype
  int64 const bytes = kBytes[p.cache_dtype], have = p.cache_lengths[s.b], count = s.band.s_kv - have;
  int64 const first = p.cu_seqlens_q ? s.first_row * from.row : s.b * from.batch;
  char const* const source = static_cast<char const*>(rows);
  char* const target = static_cast<char*>(const_cast<void*>(cache));
  for (int64 i = 0; i < count; ++i) {
    int64 const position = have + i;
    int64 const page = p.block_table ? p.block_table[s.b * p.table_stride + position / p.page_size] : s.b;
    int64 const row = p.block_table ? position % p.page_size : position;
    for (int64 head = 0; head < p.heads_kv; ++head)
      std::memcpy(target + bytes * (page * to.batch + row * to.row + head * to.head),
                  source + bytes * (first + i * from.row + head * from.head), bytes * dim);
  }
}

// Whether a sequence and its page numbers stay inside the cache, as fastattn.kv_cache.check_cache_values has it.
static bool has_right_values(Params const& p, Sequence const& s, Range keys) {
  int const have = p.cache_lengths[s.b], s_q = s.band.s_q, s_kv = s.band.s_kv;
  if (s_kv > p.capacity || s_q < 0 || s_q > p.longest_q) return false;
  if (!p.block_table) return true;
  if (have < s_kv) keys = {keys.begin < keys.end ? smaller(keys.begin, have) : have, s_kv};  // written, if not read
  int32 const* const table = p.block_table + s.b * p.table_stride;
  for (int64 n = keys.begin / p.page_size; n * p.page_size < keys.end; ++n)
    if (table[n] < 0 || table[n] >= p.pages) return false;
  return true;
}

static bool has_right_boundaries(Params const& p) {
  return !p.cu_seqlens_q || (p.cu_seqlens_q[0] == 0 && p.cu_seqlens_q[p.batch] == p.rows_q);
}

// The sequences and the keys they read; how many these are in all, or -1 if a value is wrong.
static int64 look_up(Call& call) {
  Params const& p = call.params;
  int64 keys = 0;
  if (!has_right_boundaries(p)) return -1;
  for (int b = 0; b < call.task_count; ++b) {
    Task& task = call.tasks[b];
    if (!has_right_length(p, b)) return -1;
    task.sequence = sequence_of(p, b);
    task.keys = tile_range(task.sequence.band, 0, task.sequence.band.s_q);
    keys += task.keys.end - task.keys.begin;
    if (!has_right_values(p, task.sequence, task.keys)) return -1;
  }
  return keys;
}

// Cuts the keys into parts, by shapes alone: the same call gives the same bits on any number of threads.
static bool plan(Call& call, int64 keys) {
  Params const& p = call.params;
  int64 floats = 0;
  int64 const even = (keys / kParts + kKeys - 1) / kKeys * kKeys;
  call.keys_per_part = even > kLeastKeys ? even : kLeastKeys;
  for (int b = 0; b < call.task_count; ++b) {
    Task& task = call.tasks[b];
    int64 const length = task.keys.end - task.keys.begin;
    task.parts = int(length ? (length + call.keys_per_part - 1) / call.keys_per_part : 1);
    task.left = task.parts;
    task.first_part = call.part_count;
    task.memory = floats;
    call.part_count += task.parts;
    floats += task.parts * part_floats(task.sequence.rows, p.head_dim_v);
  }
  static thread_local Memory memory;
  call.parts = static_cast<float*>(memory.bytes(floats * sizeof(float)));
  return call.parts != nullptr;
}

static Outcome run(Call& call) {
  Params const& p = call.params;
  int64 const keys = look_up(call);
  if (keys < 0) return kWrongValues;
  if (!plan(call, keys)) return kNoMemory;
  for (int b = 0; b < call.task_count; ++b) {
    Sequence const& s = call.tasks[b].sequence;
    if (p.new_keys) append(p, s, p.new_keys, p.new_keys_strides, p.k_cache, p.k_strides, p.head_dim_qk);
    if (p.new_values) append(p, s, p.new_values, p.new_values_strides, p.v_cache, p.v_strides, p.head_dim_v);
  }
  bool const is_small = keys * p.heads_kv * (p.head_dim_qk + p.head_dim_v) < kSmall;
  int64 const threads = p.threads < call.part_count ? p.threads : call.part_count;
  on_threads(is_small ? 1 : threads, work, &call);
  return call.has_failed ? kNoMemory : kDone;
}

static Outcome decode(Params const& params) {
  Machine const* const machine = machine_for(params.machine);
  if (!machine) return kNoMachine;
  Task* const tasks = new (std::nothrow) Task[params.batch];
  if (!tasks) return kNoMemory;
  Call call{params, *machine->decode, tasks, int(params.batch), 0, 0, nullptr};
  Outcome const outcome = run(call);
  delete[] tasks;
  return outcome;
}

}  // namespace fa::cpu

FA_PUBLIC long long fa_cpu_version() { return fa::cpu::kVersion; }
FA_PUBLIC long long fa_cpu_bytes() { return sizeof(fa::cpu::Params); }
FA_PUBLIC long long fa_cpu_decode(const char* packed) {
  fa::cpu::Params params;
  std::memcpy(&params, packed, sizeof params);
  return fa::cpu::decode(params);
}
