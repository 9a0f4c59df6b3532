// The forward kernel for Hopper: out = softmax(scale q k^T) v, block by block of keys, and lse.
//
// One warp loads by TMA; two or three consumer warpgroups own 64 query rows each. A consumer computes the scores of
// the next block of keys, then adds P V of the last one, and while that runs takes the softmax of the new scores:
//
//      tensor cores    S1  |  P0 V0  S2  |  P1 V1  S3  | ...
//      softmax             S1          S2          S3
//
// Consumers alternate in issuing products (ping-pong), so one's softmax also runs under another's products.
// csrc/README.md draws the roles, barriers and shared memory. This file has the setup and the start of both roles,
// which are in producer.cuh and consumer.cuh.
#pragma once
#include "consumer.cuh"
#include "producer.cuh"

namespace fa::sm90 {

template <class C>
FA_DEVICE void init_barriers(ForwardArgs const& args, Shared<C> const& shared) {
  mbarrier_init(shared.q_full(), 1);
  mbarrier_init(shared.q_empty(), C::CONSUMERS);  // one thread of each, after out has left the buffer
  for (int stage = 0; stage < C::STAGES; ++stage) {
    for (uint32 ring : {shared.k_ring(), shared.v_ring()}) {
      mbarrier_init(ring + 8 * stage, 1);
      mbarrier_init(ring + 8 * (C::STAGES + stage), 4 * C::CONSUMERS);  // one lane of each warp
    }
  }
  mbarrier_fence_init();
  tma_prefetch(&args.q);
  tma_prefetch(&args.k);
  tma_prefetch(&args.v);
  tma_prefetch(&args.out);
}

template <class C>
FA_DEVICE void forward(ForwardArgs const& args) {
  Shared<C> const shared{shared_base()};
  int const warpgroup = warp_uniform(thread_index() / kWarpgroup);
  if (thread_index() == 0) init_barriers<C>(args, shared);
  block_sync();
  if (warpgroup == 0) {
    give_registers<C::PRODUCER_REGISTERS>();
    if (warp_uniform(thread_index() / 32) == 0 && elect_one()) produce<C>(args, shared);
  } else {
    take_registers<C::CONSUMER_REGISTERS>();
    consume<C>(args, shared, warpgroup - 1);
  }
}

template <class C>
FA_GLOBAL(C::THREADS)
forward_kernel(FA_KERNEL_ARGUMENT ForwardArgs args) {
  forward<C>(args);
}

}  // namespace fa::sm90
