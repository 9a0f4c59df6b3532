// Copies by threads (cp.async): each arrives at once, or as late as it may, when its thread waits for its group.
#include <algorithm>

#include "machine_state.h"

namespace fa::emu {

static void arrive(Copy& copy) {
  check_write(copy.to, static_cast<uint32_t>(copy.bytes), "a copy writes over");
  uint8_t* const target = shared_bytes(copy.to, copy.bytes);
  if (copy.from) std::copy_n(static_cast<uint8_t const*>(copy.from), copy.bytes, target);
  else std::fill_n(target, copy.bytes, 0);
  copy.is_there = true;
}

void copy_async(uint32_t to, void const* from, int bytes, bool exists) {
  auto const step = static_cast<uint32_t>(bytes);
  if (to % step || reinterpret_cast<uintptr_t>(from) % step) error("a misaligned copy to shared memory");
  if (exists && !may_load(from, step)) return;
  Fiber& self = *machine().running;
  check_write(to, step, "a copy writes over");
  note("write", to, to + step);
  note_write((to - kSharedBase) / 16, {static_cast<uint32_t>(self.thread), self.clock[self.thread]});
  std::fill_n(shared_bytes(to, bytes), bytes, 0xff);
  self.copies.push_back({to, exists ? from : nullptr, bytes, false});
  ++self.open_copies;
  if (machine().random() % 4 == 0) arrive(self.copies.back());
}

void copies_commit() {
  Fiber& self = *machine().running;
  self.copy_groups.push_back(self.open_copies);
  self.open_copies = 0;
}

// What has arrived counts as written now: who was told of it before has read too early.
void copies_wait(int groups_left) {
  Machine& m = machine();
  Fiber& self = *m.running;
  for (; static_cast<int>(self.copy_groups.size()) > groups_left; self.copy_groups.pop_front()) {
    for (size_t i = 0; i < self.copy_groups.front(); ++i) {
      Copy& copy = self.copies.front();
      if (!copy.is_there) arrive(copy);
      uint32_t const granule = (copy.to - kSharedBase) / 16;
      note("write", copy.to, copy.to + static_cast<uint32_t>(copy.bytes));
      note_write(granule, {static_cast<uint32_t>(self.thread), self.clock[self.thread]});
      m.unfenced_writer[granule] = static_cast<uint16_t>(self.thread + 1);
      m.is_written[granule] = true;
      self.unfenced.push_back(granule);
      self.copies.pop_front();
    }
  }
  ++m.report->copies;
}

}  // namespace fa::emu
