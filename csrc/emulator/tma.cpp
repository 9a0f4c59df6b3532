// TMA of the emulated machine: loads that arrive later in any order, stores that read and write later, the swizzle.
#include <algorithm>

#include "machine_state.h"

namespace fa::emu {

uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Calls visit(offset in the box, address in the tensor or null if outside) for every element of the box at `at`.
template <class Visit>
static void visit_box(Map const& map, int const (&at)[4], Visit visit) {
  uint32_t offset = 0;
  int i[4];
  for (i[3] = 0; i[3] < map.box[3]; ++i[3])
    for (i[2] = 0; i[2] < map.box[2]; ++i[2])
      for (i[1] = 0; i[1] < map.box[1]; ++i[1])
        for (i[0] = 0; i[0] < map.box[0]; ++i[0], offset += 2) {
          int64_t address = 0;
          bool inside = true;
          for (int d = 0; d < 4; ++d) {
            int64_t const x = int64_t{at[d]} + i[d];
            inside = inside && x >= 0 && x < map.size[d];
            address += x * map.stride[d];
          }
          visit(offset, inside ? static_cast<char*>(map.base) + address : nullptr);
        }
}

static uint32_t box_bytes(Map const& map) { return 2u * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

static void check_map(Map const& map, uint32_t shared) {
  // The swizzle goes by address and repeats after 8 rows (CUDA C++ Programming Guide, "The Swizzle Modes").
  if (shared % 1024) error("a TMA box begins off the rows of its swizzle");
  if (map.stride[0] != 2 || map.box[0] * 2 > 128) error("a box is wider than the swizzle");
  for (int d = 0; d < 4; ++d) {
    if (map.size[d] < 1 || map.box[d] < 1 || map.box[d] > 256) error("a tensor map with an impossible size");
    if (d > 0 && (map.stride[d] % 16 || map.stride[d] < 0)) error("a tensor map with a stride that 16 does not divide");
  }
  if (reinterpret_cast<uintptr_t>(map.base) % 16) error("a tensor map with a base that 16 does not divide");
}

// A load on an mbarrier writes these bytes some time from now.
static void begin_write(uint32_t to, uint32_t bytes, uint32_t barrier, char const* who) {
  check_write(to, bytes, who);
  note("load", to, to + bytes, barrier);
  Mbarrier const& reports_to = mbarrier_at(barrier);
  for (uint32_t granule = (to - kSharedBase) / 16; granule < (to + bytes - kSharedBase) / 16; ++granule) {
    note_write(granule, {loads_of(reports_to.number), reports_to.completed + 1});
  }
  std::fill_n(shared_bytes(to, static_cast<int>(bytes)), bytes, 0xff);
}

// A store of the running thread reads these bytes some time from now.
static void begin_store(uint32_t from, uint32_t bytes, std::function<void(std::vector<uint8_t> const&)> write) {
  Machine& m = machine();
  note("store", from, from + bytes);
  uint32_t const warp = static_cast<uint32_t>(thread_index() / 32), time = static_cast<uint32_t>(m.stores.size() + 1);
  for (uint32_t granule = (from - kSharedBase) / 16; granule < (from + bytes - kSharedBase) / 16; ++granule) {
    note_read(granule, {stores_of(warp), time});
  }
  m.running->open_stores.push_back(m.stores.size());
  m.stores.push_back({from, std::vector<uint8_t>(bytes), std::move(write), false, false});
}

void tma_load(uint32_t to, Map const* map, uint32_t barrier, int const (&at)[4]) {
  Machine& m = machine();
  check_map(*map, to);
  check_is_not_ahead("a TMA load reads");
  uint32_t const bytes = box_bytes(*map);
  begin_write(to, bytes, barrier, "a TMA load writes over");
  m.loads.push_back([=, x = std::vector<int>(at, at + 4)] {
    check_write(to, bytes, "a TMA load writes over");
    visit_box(*map, {x[0], x[1], x[2], x[3]}, [&](uint32_t offset, char const* from) {
      uint8_t* const target = shared_bytes(swizzled(to + offset), 2);
      target[0] = from ? static_cast<uint8_t>(from[0]) : 0;
      target[1] = from ? static_cast<uint8_t>(from[1]) : 0;
    });
    std::fill_n(machine().unfenced_writer.begin() + (to - kSharedBase) / 16, bytes / 16, 0);
    ++machine().report->loads;
    complete_bytes(barrier, bytes);
  });
}

void bulk_load(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) error("a bulk load that 16 does not divide");
  if (!may_load(from, bytes)) return;
  begin_write(to, bytes, barrier, "a bulk load writes over");
  machine().loads.push_back([=] {
    check_write(to, bytes, "a bulk load writes over");
    std::copy_n(static_cast<uint8_t const*>(from), bytes, shared_bytes(to, static_cast<int>(bytes)));
    std::fill_n(machine().is_written.begin() + (to - kSharedBase) / 16, bytes / 16, true);
    ++machine().report->loads;
    complete_bytes(barrier, bytes);
  });
}

void tma_store(Map const* map, uint32_t from, int const (&at)[4]) {
  check_map(*map, from);
  auto const write = [=, x = std::vector<int>(at, at + 4)](std::vector<uint8_t> const& data) {
    visit_box(*map, {x[0], x[1], x[2], x[3]}, [&](uint32_t offset, char* to) {
      if (to && may_store(to, 2)) std::copy_n(data.data() + (swizzled(from + offset) - from), 2, to);
    });
    ++machine().report->stores;
  };
  begin_store(from, box_bytes(*map), write);
}

void tma_store_commit() {
  note("store_commit");
  Fiber& self = *machine().running;
  self.stores.insert(self.stores.end(), self.open_stores.begin(), self.open_stores.end());
  self.open_stores.clear();
  self.store_groups.push_back(self.stores.size());
}

void bulk_add(float* to, uint32_t from, uint32_t bytes) {
  if (from % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16) error("a bulk addition that 16 does not divide");
  if (!may_load(to, bytes)) return;
  auto const add = [=](std::vector<uint8_t> const& data) {
    float x;
    for (size_t i = 0; i < data.size() / 4; ++i) {
      std::copy_n(data.data() + 4 * i, 4, reinterpret_cast<uint8_t*>(&x));
      to[i] += x;
    }
    ++machine().report->stores;
  };
  begin_store(from, bytes, add);
}

void tma_store_wait(bool only_read, int groups_left) {
  note("store_wait", static_cast<uint64_t>(groups_left));
  Fiber const* self = machine().running;
  if (!self->open_stores.empty()) error("a wait for TMA stores that were not committed");
  int const groups = static_cast<int>(self->store_groups.size()) - groups_left;
  auto const end = self->stores.begin() + static_cast<long>(groups > 0 ? self->store_groups[groups - 1] : 0);
  block_until(
      [=] {
        auto const& all = machine().stores;
        return std::all_of(self->stores.begin(), end,
                           [&](size_t i) { return only_read ? all[i].is_read : all[i].is_written; });
      },
      "its TMA stores");
  uint32_t& over = machine().running->clock[stores_of(static_cast<uint32_t>(thread_index() / 32))];
  if (end != self->stores.begin()) over = std::max(over, static_cast<uint32_t>(*(end - 1) + 1));
}

}  // namespace fa::emu
