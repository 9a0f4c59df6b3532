// Threads of torch, and the memory that each keeps.
//
// They come through the one function of GNU's OpenMP runtime that starts them (LLVM's and Intel's have it, too); it is
// looked up when the library is loaded, and without it one thread does all. So no compiler flag, no second pool of
// threads, and `torch.set_num_threads` holds.
#pragma once

#include <cstdlib>

#include "params.h"

extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);

namespace fa::cpu {

static inline void on_threads(int64 threads, void (*work)(void*), void* data) {
  if (GOMP_parallel && threads > 1) GOMP_parallel(work, data, unsigned(threads), 0);
  else work(data);
}

// Memory that a thread keeps from call to call: fresh pages of memory cost more than what is computed in them.
class Memory {
 public:
  ~Memory() { std::free(bytes_); }

  // At least so many bytes, aligned to a cache line; null if there are none left.
  void* bytes(int64 count) {
    if (kExact ? count != size_ || !bytes_ : count > size_ || !bytes_) {
      std::free(bytes_);
      size_ = kExact ? count : (count < kLarge ? count + count / 2 : count) / 4096 * 4096 + 4096;
      if (posix_memalign(&bytes_, kExact ? 64 : 4096, size_)) {
        bytes_ = nullptr;
        size_ = 0;
      }
    }
    return bytes_;
  }

  // Memory of long sequences is returned: it would stand beside the results of the next call.
  void give_back() {
    if (size_ <= kMostKept) return;
    std::free(bytes_);
    bytes_ = nullptr;
    size_ = 0;
  }

 private:
#ifdef __SANITIZE_ADDRESS__  // no room behind what was asked for, so that an access there is reported
  static constexpr bool kExact = true;
#else
  static constexpr bool kExact = false;
#endif
  static constexpr int64 kMostKept = 8 << 20, kLarge = 1 << 20;  // from kLarge on, no room to grow

  void* bytes_ = nullptr;
  int64 size_ = 0;
};

}  // namespace fa::cpu
