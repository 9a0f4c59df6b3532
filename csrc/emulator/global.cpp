// Global memory of the emulated machine: what kernels may access, and when.
#include <algorithm>

#include "machine_state.h"

namespace fa::emu {

void forget_global() { machine().global.clear(); }
void trust_kernels() { machine().is_trusting = true; }

void allow_global(void const* begin, size_t bytes) {
  machine().global.push_back({static_cast<char const*>(begin), std::vector<bool>(bytes)});
}

static Region* region_of(void const* address, size_t bytes) {
  auto const* from = static_cast<char const*>(address);
  for (Region& region : machine().global) {
    if (from >= region.begin && from + bytes <= region.begin + region.is_stored.size()) return &region;
  }
  error("an address outside of the tensors");
  return nullptr;
}

static bool is_stored(Region const& region, void const* address, size_t bytes) {
  auto const first = region.is_stored.begin() + (static_cast<char const*>(address) - region.begin);
  return std::find(first, first + static_cast<std::ptrdiff_t>(bytes), true) !=
         first + static_cast<std::ptrdiff_t>(bytes);
}

void wait_for_kernel_before() { machine().running->is_ahead = false; }

void check_is_not_ahead(char const* what) {
  if (machine().running->is_ahead)
    error(std::string(what) + " what the kernel before writes, and has not waited for it");
}

bool may_load(void const* address, size_t bytes) {
  if (machine().is_trusting) return true;
  Region const* const region = region_of(address, bytes);
  if (region && is_stored(*region, address, bytes)) check_is_not_ahead("a thread reads");
  return region != nullptr;
}

bool may_store(void const* address, size_t bytes) {
  if (machine().is_trusting) return true;
  Region* const region = region_of(address, bytes);
  if (!region) return false;
  if (is_stored(*region, address, bytes)) error("an output is stored twice");
  std::fill_n(region->is_stored.begin() + (static_cast<char const*>(address) - region->begin), bytes, true);
  return true;
}

bool may_add(void const* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) error("a misaligned addition to global memory");
  return may_load(address, bytes);
}

}  // namespace fa::emu
