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
constexpr int64 kSmall = 1 << 17;     // numbers read in about the time that other threads take to start
// Of batch-invariant calls: parts begin at multiples of so many keys, and so many query rows of each sequence are
// computed at a time, so that memory does not grow with a prompt.
constexpr int kFixedKeys = 512, kFixedRows = 32;
static_assert(kFixedKeys % kKeys == 0, "blocks lie at fixed positions, too");

struct Task {
  Sequence whole, sequence;  // and the rows of it that are being computed
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

// The first key of a task's parts.
static int64 origin_of(Call const& call, Task const& task) {
  return call.params.invariant ? task.keys.begin / kFixedKeys * kFixedKeys : task.keys.begin;
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
    int64 const begin = origin_of(call, task) + index * call.keys_per_part, end = begin + call.keys_per_part;
    Range const keys = {int(begin), int(end < task.keys.end ? end : task.keys.end)};
    call.kernels.attend(p, s, keys, scratch_at(scratch, s.rows, p.head_dim_qk),
                        part_at(parts + index * step, s.rows, p.head_dim_v));
    if (task.left.fetch_sub(1) == 1) call.kernels.join(p, s, parts, task.parts);
  }
}

static int64 rows_in_all(Params const& p) { return p.cu_seqlens_q ? p.rows_q : p.batch * p.rows_q; }

// Read from memory exactly once, whatever the compiler would rather do.
static int64 once(int32 const* x) { return __atomic_load_n(x, __ATOMIC_RELAXED); }

// The sequence whose queries begin at `first`, or false if its length or number of queries is wrong. All in 64 bits.
static bool read_sequence(Params const& p, int b, int64 first, Sequence& s) {
  int64 const s_q = (p.cu_seqlens_q ? once(p.cu_seqlens_q + b + 1) : first + p.rows_q) - first;
  int64 const have = once(p.cache_lengths + b), s_kv = have + (p.rows_new < 0 ? s_q : p.rows_new);
  if (have < 0 || s_q < 0 || s_q > p.longest_q || first + s_q > rows_in_all(p) || s_kv > p.capacity) return false;
  Band const band = make_band(int(p.left), int(p.right), true, int(s_q), int(s_kv));
  s = {b, int(have), nullptr, 0, first, 0, 0, band, int(p.heads_q * s_q)};
  return true;
}

static constexpr int64 kBytes[] = {4, 2, 2, 1};  // by Dtype

struct Span {
  char const *begin, *end;
};

struct Rows {
  char const* at;
  Strides strides;

  // From the first byte of so many rows and heads to the end of the last.
  Span span(int64 batch, int64 rows, int64 heads, int64 dim, int64 bytes) const {
    if (batch * rows * heads == 0) return {at, at};
    int64 const last = (batch - 1) * strides.batch + (rows - 1) * strides.row + (heads - 1) * strides.head;
    return {at, at + (last + dim) * bytes};
  }
};

// New rows that lie in a cache are copied, so that what is stored is what they held when the call began. False: there
// is no memory.
static bool keep_apart(Params const& p, Rows& rows, int64 dim, Memory& memory) {
  int64 const bytes = kBytes[p.cache_dtype], heads = p.heads_kv;
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch, count = p.rows_new < 0 ? p.rows_q : p.rows_new;
  auto const overlaps = [&](void const* cache, Strides const& strides, int64 width) {
    Rows const all{static_cast<char const*>(cache), strides};
    auto const a = rows.span(batch, count, heads, dim, bytes), b = all.span(p.pages, p.page_size, heads, width, bytes);
    return a.begin < b.end && b.begin < a.end;
  };
  if (!overlaps(p.k_cache, p.k_strides, p.head_dim_qk) && !overlaps(p.v_cache, p.v_strides, p.head_dim_v)) return true;
  auto* const copy = static_cast<char*>(memory.bytes(batch * count * heads * dim * bytes));
  if (!copy) return false;
  Strides const to = {count * heads * dim, heads * dim, dim};
  for (int64 n = 0; n < batch * count * heads; ++n) {
    int64 const head = n % heads, row = n / heads % count, b = n / heads / count;
    std::memcpy(copy + n * dim * bytes,
                rows.at + bytes * (b * rows.strides.batch + row * rows.strides.row + head * rows.strides.head),
                bytes * dim);
  }
  rows = {copy, to};
  return true;
}

// Stores the new rows of a sequence in one of the caches.
static void append(Params const& p, Sequence const& s, Rows const& rows, void const* cache, Strides const& to,
                   int64 dim) {
  int64 const bytes = kBytes[p.cache_dtype], have = s.have, count = s.band.s_kv - have;
  int64 const first = p.cu_seqlens_q ? s.first_row * rows.strides.row : s.b * rows.strides.batch;
  char* const target = static_cast<char*>(const_cast<void*>(cache));
  for (int64 i = 0; i < count; ++i) {
    int64 const position = have + i;
    int64 const page = page_of(s, position, p.page_size), row = s.pages ? position % p.page_size : position;
    for (int64 head = 0; head < p.heads_kv; ++head)
      std::memcpy(target + bytes * (page * to.batch + row * to.row + head * to.head),
                  rows.at + bytes * (first + i * rows.strides.row + head * rows.strides.head), bytes * dim);
  }
}

// Stores all new rows. False, and nothing stored, if there is no memory.
static bool append(Call const& call) {
  Params const& p = call.params;
  static thread_local Memory for_keys, for_values;
  Rows keys{static_cast<char const*>(p.new_keys), p.new_keys_strides};
  Rows values{static_cast<char const*>(p.new_values), p.new_values_strides};
  if (p.new_keys && !keep_apart(p, keys, p.head_dim_qk, for_keys)) return false;
  if (p.new_values && !keep_apart(p, values, p.head_dim_v, for_values)) return false;
  for (int b = 0; b < call.task_count; ++b) {
    Sequence const& s = call.tasks[b].sequence;
    if (p.new_keys) append(p, s, keys, p.k_cache, p.k_strides, p.head_dim_qk);
    if (p.new_values) append(p, s, values, p.v_cache, p.v_strides, p.head_dim_v);
  }
  return true;
}

// The pages that a sequence reads or writes, as many as there are.
static Range pages_of(Params const& p, Task const& task) {
  int const have = task.sequence.have, s_kv = task.sequence.band.s_kv;
  Range keys = task.keys;
  if (have < s_kv) keys = {keys.begin < keys.end ? smaller(keys.begin, have) : have, s_kv};  // written, if not read
  return {int(keys.begin / p.page_size), int((keys.end + p.page_size - 1) / p.page_size)};
}

// Copies their numbers and checks the copies, as fastattn.kv_cache.check_cache_values has it.
static bool read_pages(Params const& p, Task& task, int32* copy) {
  Sequence& s = task.sequence;
  Range const used = pages_of(p, task);
  s.pages = copy, s.first_page = used.begin;
  for (int64 n = used.begin; n < used.end; ++n) {
    int64 const page = once(p.block_table + s.b * p.table_stride + n);
    if (page < 0 || page >= p.pages) return false;
    copy[n - used.begin] = int32(page);
  }
  return true;
}

// Reads the lengths of the sequences: which keys they read. How many these are in all, or -1 if a value is wrong.
static int64 look_up(Call& call) {
  Params const& p = call.params;
  int64 keys = 0, first = p.cu_seqlens_q ? once(p.cu_seqlens_q) : 0;
  if (first != 0) return -1;
  for (int b = 0; b < call.task_count; ++b) {
    Task& task = call.tasks[b];
    if (!read_sequence(p, b, first, task.sequence)) return -1;
    int const s_q = task.sequence.band.s_q;
    first += s_q;
    task.keys = tile_range(task.sequence.band, 0, s_q);
    keys += task.keys.end - task.keys.begin;
  }
  return first == rows_in_all(p) ? keys : -1;
}

static Outcome look_up_pages(Call& call) {
  Params const& p = call.params;
  if (!p.block_table) return kDone;
  int64 count = 0;
  for (int b = 0; b < call.task_count; ++b) {
    Range const used = pages_of(p, call.tasks[b]);
    count += used.end - used.begin;
  }
  static thread_local Memory memory;
  auto* copy = static_cast<int32*>(memory.bytes(count * sizeof(int32)));
  if (!copy) return kNoMemory;
  for (int b = 0; b < call.task_count; ++b) {
    if (!read_pages(p, call.tasks[b], copy)) return kWrongValues;
    Range const used = pages_of(p, call.tasks[b]);
    copy += used.end - used.begin;
  }
  return kDone;
}

// Cuts the keys into parts, by shapes alone: the same call gives the same bits on any number of threads.
static bool plan(Call& call, int64 keys) {
  Params const& p = call.params;
  int64 floats = 0;
  int64 const even = (keys / kParts + kKeys - 1) / kKeys * kKeys;
  call.keys_per_part = p.invariant ? kFixedKeys : even > kLeastKeys ? even : kLeastKeys;
  call.part_count = 0;
  for (int b = 0; b < call.task_count; ++b) {
    Task& task = call.tasks[b];
    int64 const length = task.keys.end - origin_of(call, task);
    task.parts = int(length > 0 ? (length + call.keys_per_part - 1) / call.keys_per_part : task.sequence.rows > 0);
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

// Takes from each sequence the rows from `first` on.
static void take_rows(Call& call, int first) {
  for (int b = 0; b < call.task_count; ++b) {
    Task& task = call.tasks[b];
    Sequence const& whole = task.whole;
    Sequence& s = task.sequence = whole;
    int const count = larger(0, smaller(kFixedRows, whole.band.s_q - first));
    s.first_query = first;
    s.first_row += first;
    s.rows = int(call.params.heads_q) * count;
    s.band.diagonal += first;
    s.band.s_q = count;
    // a tree counts depths, which may be anywhere in it
    task.keys = call.params.tree ? tile_range(whole.band, 0, count ? whole.band.s_q : 0) : tile_range(s.band, 0, count);
    s.first_key = task.keys.begin;
  }
}

static bool attend(Call& call, int64 keys) {
  Params const& p = call.params;
  bool const is_small = keys * p.heads_kv * (p.head_dim_qk + p.head_dim_v) < kSmall;
  int64 const threads = p.threads < call.part_count ? p.threads : call.part_count;
  call.next = 0;
  on_threads(is_small ? 1 : threads, work, &call);
  return !call.has_failed;
}

static Outcome run(Call& call) {
  Params const& p = call.params;
  int64 const keys = look_up(call);
  if (keys < 0) return kWrongValues;
  if (Outcome const outcome = look_up_pages(call)) return outcome;
  if (!p.invariant) return plan(call, keys) && append(call) && attend(call, keys) ? kDone : kNoMemory;
  for (int b = 0; b < call.task_count; ++b) call.tasks[b].whole = call.tasks[b].sequence;
  take_rows(call, 0);
  if (!plan(call, keys) || !append(call)) return kNoMemory;
  for (int first = 0; first < p.longest_q; first += kFixedRows) {
    take_rows(call, first);
    if (!plan(call, keys) || !attend(call, keys)) return kNoMemory;
  }
  return kDone;
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
