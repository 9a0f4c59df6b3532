// The state of the simulated devices, and their memory: host memory that is counted, and NaN until written.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <unordered_set>

namespace simulated {

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::Storage;
using Stack = torch::jit::Stack;

constexpr DeviceIndex kDevices = 2;
constexpr int kWaits = 0, kLaunches = 1;  // what `told` is told of

struct Machine {
  std::atomic<bool> is_on{false};
  std::atomic<int64_t> next_stream{1};
  std::array<std::atomic<int64_t>, kDevices> held{}, peak{};
  int (*told)(int what, char const* name) = nullptr;  // Python's: not 0 refuses
  std::unordered_set<std::string> unchecked;          // operators that check the devices of their operands themselves
  std::recursive_mutex recording;
  std::vector<std::function<void()>>* graph = nullptr;  // while capturing
  int64_t capturing_stream = -1;
};

// Never destroyed: tensors outlive everything.
Machine& machine() {
  static Machine* const it = new Machine;
  return *it;
}

thread_local DeviceIndex current_device = 0;
thread_local std::array<int64_t, kDevices> current_streams{};

bool is_capturing() {
  return machine().graph != nullptr && current_streams[current_device] == machine().capturing_stream;
}

// The host waits for the device, which a capture refuses, and so does torch.cuda.set_sync_debug_mode("error").
void wait(char const* name) {
  TORCH_CHECK(!is_capturing(), "CUDA error: operation not permitted when stream is capturing (", name, ")");
  if (machine().is_on && machine().told) {
    TORCH_CHECK(machine().told(kWaits, name) == 0, "called a synchronizing CUDA operation: ", name);
  }
}

void record(std::function<void()> step) {
  std::lock_guard<std::recursive_mutex> lock(machine().recording);
  if (is_capturing()) machine().graph->push_back(std::move(step));
}

// Which addresses are memory of a device now.
struct Places {
  struct Place {
    uintptr_t end;
    DeviceIndex device;
  };
  std::mutex lock;
  std::multimap<uintptr_t, Place> by_begin;  // results of one operator may share their memory

  static Places& all() {
    static Places* const it = new Places;
    return *it;
  }
  auto add(uintptr_t begin, size_t bytes, DeviceIndex device) {
    std::lock_guard<std::mutex> guard(lock);
    return by_begin.insert({begin, {begin + bytes, device}});
  }
  void remove(std::multimap<uintptr_t, Place>::iterator place) {
    std::lock_guard<std::mutex> guard(lock);
    by_begin.erase(place);
  }
  int device_of(uintptr_t address) {  // -1: of none
    std::lock_guard<std::mutex> guard(lock);
    auto const next = by_begin.upper_bound(address);
    if (next == by_begin.begin()) return -1;
    Place const& place = std::prev(next)->second;
    return address < place.end ? place.device : -1;
  }
};

struct Held {  // what keeps bytes alive, counted as memory of a device
  Storage host;
  DeviceIndex device;
  size_t bytes;
  std::multimap<uintptr_t, Places::Place>::iterator place;
  Held(Storage s, DeviceIndex d) : host(std::move(s)), device(d), bytes(host.nbytes()) {
    place = Places::all().add(reinterpret_cast<uintptr_t>(host.data()), bytes, d);
    int64_t const now = machine().held[d] += static_cast<int64_t>(bytes);
    int64_t seen = machine().peak[d];
    while (now > seen && !machine().peak[d].compare_exchange_weak(seen, now)) {
    }
  }
  ~Held() {
    Places::all().remove(place);
    machine().held[device] -= static_cast<int64_t>(bytes);
  }
};

c10::DataPtr on_device(Storage host, Device device) {
  record([host] {});  // what a capture allocates stays as long as its graph, whose kernels know addresses alone
  void* const data = host.mutable_data();
  return {data, new Held(std::move(host), device.index()), [](void* x) { delete static_cast<Held*>(x); }, device};
}

struct Allocator final : c10::Allocator {
  // Every byte is 0xff: NaN in each floating type, a wild index in each integer, true as a boolean.
  c10::DataPtr allocate(size_t bytes) override {
    c10::Storage host(c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), false);
    if (bytes) std::memset(host.mutable_data(), 0xff, bytes);
    return on_device(std::move(host), Device(c10::kCUDA, current_device));
  }
  void copy_data(void* to, void const* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator* allocator() {
  static Allocator* const it = new Allocator;
  return it;
}

bool is_simulated(Tensor const& x) { return x.defined() && x.is_cuda(); }

Tensor like(Tensor const& x, Storage storage, DispatchKey key) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), x.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

// A storage in host memory over the bytes of a device's.
Storage host_storage(Storage const& storage) {
  void* const data = const_cast<void*>(storage.data());
  c10::DataPtr bytes(data, new Storage(storage), [](void* x) { delete static_cast<Storage*>(x); }, c10::kCPU);
  return Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(bytes), c10::GetCPUAllocator(), true);
}

Storage device_storage(Storage const& host, Device device) {
  return Storage(c10::Storage::use_byte_size_t(), host.nbytes(), on_device(host, device), allocator(), true);
}

Tensor on_host(Tensor const& x) { return like(x, host_storage(x.storage()), DispatchKey::CPU); }

}  // namespace simulated
