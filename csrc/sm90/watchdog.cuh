// mbarriers of the watchdog build (-DFA_WATCHDOG=MILLISECONDS): a wait that would hang says which role of which block
// waits for which barrier, and ends the kernel. For the first run on a GPU; slow, since a call stands beside the wgmmas.
//
// Barriers are numbered as they lie in shared memory, from the first that the kernel initialises; csrc/README.md has
// their order. The emulator's clock counts rounds of its scheduler.
#pragma once

namespace fa::sm90 {

constexpr uint32 kNoBarrier = 0xffffffffu;
FA_MODULE_VARIABLE uint32 first_barrier = kNoBarrier;  // offset in shared memory; the same for all blocks of a kernel

FA_DEVICE void mbarrier_init(uint32 barrier, uint32 arrivals) {
  if (first_barrier == kNoBarrier) first_barrier = barrier - shared_base();
  mbarrier_begin(barrier, arrivals);
}

FA_DEVICE void mbarrier_wait(uint32 barrier, uint32 parity) {
  uint64 const end = watch_time() + FA_WATCHDOG;
  int const thread = thread_index();
  bool const is_consumer = thread >= 128;
  while (!mbarrier_try_wait(barrier, parity)) {
    if (watch_time() < end || (is_consumer && thread % 32)) continue;  // of a consumer's warps the first lane alone
    end_in_sentence(is_consumer ? "consumer" : "producer", is_consumer ? thread / 128 - 1 : 0, block_index(),
                    static_cast<int>(barrier - shared_base() - first_barrier) / 8, parity);
  }
}

}  // namespace fa::sm90
