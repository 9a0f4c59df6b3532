// Two CUDA devices that are not there, for a CPU build of torch. Their memory is host memory that says "cuda:0"; their
// operators are torch's own for CPUs, run on aliases of that memory, so results are real. What only a device does is
// imitated: it refuses operands of other devices, waits are counted, a capture is recorded and replayed, fresh memory is
// NaN. Loaded by build.py, before torch's first backward pass, which starts a thread for each device there is.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/copy.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>

#include "memory.h"

namespace simulated {

struct CudaGenerator;
at::Generator host_generator(std::optional<at::Generator> const& given, Device device);

// Which operands have to be on one device: torch's generated code says so of most operators. Those that it lets through
// are element by element, and take numbers from the host, or find places, and take these from the host.
enum class Check { kAll, kButNumbers, kNone };

Check check_of(std::string const& name) {
  if (machine().unchecked.count(name) == 0 || name.rfind("aten::masked_fill", 0) == 0) return Check::kAll;
  bool const is_index = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;
  return is_index ? Check::kNone : Check::kButNumbers;
}

// One call of an operator: its operands on the host, and the way back.
struct Call {
  std::vector<std::pair<Tensor, Tensor>> operands;  // (on the device, on the host)
  std::vector<std::pair<c10::StorageImpl*, Storage>> storages;
  std::optional<Device> device;
  std::string mixed;

  Tensor to_host(Tensor const& x, Check how) {
    if (!x.defined()) return x;
    bool const is_number = x.unsafeGetTensorImpl()->is_wrapped_number() || (x.is_cpu() && x.dim() == 0);
    if (how == Check::kAll || (how == Check::kButNumbers && !is_number)) check(x.device());
    if (!x.is_cuda()) return x;
    if (!device || device->is_cpu()) device = x.device();
    for (auto const& [there, here] : operands) {
      if (there.is_same(x)) return here;
    }
    c10::StorageImpl* const of = x.storage().unsafeGetStorageImpl();
    auto found = std::find_if(storages.begin(), storages.end(), [&](auto const& pair) { return pair.first == of; });
    if (found == storages.end()) found = storages.insert(storages.end(), {of, host_storage(x.storage())});
    operands.emplace_back(x, like(x, found->second, DispatchKey::CPU));
    return operands.back().second;
  }

  void check(Device on) {
    if (!device) device = on;
    if (*device == on || !mixed.empty()) return;
    mixed = c10::str("Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                     on, "!");
    if (device->is_cpu()) device = on;
  }

  // What came out: an operand itself, a view of one, or new memory.
  Tensor to_device(Tensor const& x) {
    if (!x.defined() || !x.has_storage() || !x.is_cpu()) return x;
    for (auto const& [there, here] : operands) {
      if (here.is_same(x)) return there;
    }
    for (auto const& [there, here] : operands) {
      if (here.storage().unsafeGetStorageImpl() == x.storage().unsafeGetStorageImpl()) {
        return like(x, there.storage(), DispatchKey::CUDA);
      }
    }
    return like(x, device_storage(x.storage(), *device), DispatchKey::CUDA);
  }

  // An operand given to be written may have been made larger.
  void take_over_resized() {
    for (auto const& [there, here] : operands) {
      c10::TensorImpl* const impl = there.unsafeGetTensorImpl();
      if (here.storage().data() != there.storage().data()) {
        impl->set_storage_keep_dtype(device_storage(here.storage(), there.device()));
      }
      if (here.sizes() != there.sizes() || here.strides() != there.strides()) {
        impl->set_sizes_and_strides(here.sizes(), here.strides(), here.storage_offset());
      }
    }
  }
};

template <class List, class Convert>
IValue mapped(List const& given, Convert convert) {
  auto list = given.copy();
  for (size_t i = 0; i < list.size(); ++i) list.set(i, convert(list.get(i)));
  return list;
}

template <class Convert>
IValue each_tensor(IValue const& value, Convert convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) return mapped(value.toTensorList(), convert);
  if (value.isOptionalTensorList()) {
    return mapped(value.toOptionalTensorList(), [&](std::optional<Tensor> const& x) -> std::optional<Tensor> {
      return x ? std::optional<Tensor>(convert(*x)) : std::nullopt;
    });
  }
  return value;
}

bool waits(std::string const& name) {
  static std::unordered_set<std::string> const those{
      "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::equal",
      "aten::masked_select.out", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::bincount",
      "aten::repeat_interleave.Tensor", "aten::unique_dim_consecutive", "aten::_unique", "aten::histc"};
  return those.count(name) != 0;
}

void run_on_host(c10::OperatorHandle const& op, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
}

// Do again what was captured, and put its results where the first ones lie.
void record_again(c10::OperatorHandle const& op, Stack const& given, Stack const& results) {
  record([op, given, results] {
    Stack stack = given;
    run_on_host(op, &stack);
    for (size_t i = 0; i < results.size(); ++i) {
      if (!results[i].isTensor() || !results[i].toTensor().defined()) continue;
      Tensor const &first = results[i].toTensor(), &now = stack[i].toTensor();
      if (first.data_ptr() != now.data_ptr()) first.copy_(now);
    }
  });
}

void fallback(c10::OperatorHandle const& op, Stack* stack) {
  c10::FunctionSchema const& schema = op.schema();
  std::string const name = c10::toString(op.operator_name());
  size_t const count = schema.arguments().size();
  Check const how = check_of(name);
  Call call;
  Stack given;
  for (size_t i = 0; i < count; ++i) {
    IValue const& value = (*stack)[stack->size() - count + i];
    if (value.isDevice()) {
      if (value.toDevice().is_cuda()) {
        call.device = value.toDevice().has_index() ? value.toDevice() : Device(c10::kCUDA, current_device);
      }
      given.emplace_back(Device(c10::kCPU));
    } else if (schema.arguments()[i].name() == "pin_memory") {
      given.emplace_back();
    } else {
      given.push_back(each_tensor(value, [&](Tensor const& x) { return call.to_host(x, how); }));
    }
  }
  TORCH_CHECK(call.mixed.empty(), call.mixed, " (when running ", name, ")");
  if (!call.device) call.device = Device(c10::kCUDA, current_device);
  for (size_t i = 0; i < count; ++i) {
    if (schema.arguments()[i].name() != "generator") continue;
    given[i] = host_generator(given[i].toOptional<at::Generator>(), *call.device);
  }
  if (waits(name)) wait(name.c_str());
  Stack results = given;
  run_on_host(op, &results);
  bool const is_view = !schema.returns().empty() && schema.returns()[0].alias_info() != nullptr &&
                       !schema.returns()[0].alias_info()->isWrite();
  if (!is_view && is_capturing()) record_again(op, given, results);
  torch::jit::drop(*stack, count);
  for (IValue const& result : results) {
    stack->push_back(each_tensor(result, [&](Tensor const& x) { return call.to_device(x); }));
  }
  if (schema.is_mutable()) call.take_over_resized();
}

// --- operators that torch does not send through the fallback ---------------------------------------------------------

struct OnDevice {  // current while in scope
  DeviceIndex before = current_device;
  explicit OnDevice(std::optional<Device> device) {
    if (device && device->has_index()) current_device = device->index();
    TORCH_CHECK(current_device < kDevices, "CUDA error: invalid device ordinal");
  }
  ~OnDevice() { current_device = before; }
};

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice const on(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(), DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  OnDevice const on(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(),
                                           DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& self, Tensor const& source, bool non_blocking) {
  if (self.is_cuda() != source.is_cuda() && !non_blocking) wait("aten::copy_");
  Tensor const to = is_simulated(self) ? on_host(self) : self;
  Tensor const from = is_simulated(source) ? on_host(source) : source;
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from);
  record([to, from] { to.copy_(from); });
  return self;
}

int64_t choose_attention(Tensor const&, Tensor const&, Tensor const&, std::optional<Tensor> const&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // the formula: torch's fused kernels for devices are not there
}

void record_stream(Tensor&, c10::Stream) {}

Tensor alias(Tensor const& x) { return is_simulated(x) ? on_host(x) : x; }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("_fused_sdp_choice", TORCH_FN(choose_attention));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("resize_", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// --- random numbers --------------------------------------------------------------------------------------------------

struct CudaGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit CudaGenerator(DeviceIndex index)
      : GeneratorImpl(Device(c10::kCUDA, index), DispatchKeySet(DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator(c10::default_rng_seed_val)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(c10::TensorImpl const& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  CudaGenerator* clone_impl() const override {
    auto* const copy = new CudaGenerator(device().index());
    copy->host = host.clone();
    return copy;
  }
};

at::Generator& default_generator(DeviceIndex index) {
  static auto* const all = new std::array<at::Generator, kDevices>{at::make_generator<CudaGenerator>(DeviceIndex(0)),
                                                                   at::make_generator<CudaGenerator>(DeviceIndex(1))};
  return all->at(index < 0 ? current_device : index);
}

// What UntypedStorage.resize_(0) does on a GPU; torch refuses it in a build without CUDA.
void release(int64_t storage) {
  auto* const found = reinterpret_cast<c10::StorageImpl*>(storage);
  found->set_data_ptr_noswap(c10::DataPtr(nullptr, found->device()));
  found->set_nbytes(0);
}

void use_generator(std::optional<at::Generator> given) { default_generator(given->device().index()) = *given; }

TORCH_LIBRARY(fastattn_simulated, m) {
  m.def("alias_on_host(Tensor(a) x) -> Tensor(a)");
  m.def("use_generator(Generator? given) -> ()", TORCH_FN(use_generator));
  m.def("release(int storage) -> ()", TORCH_FN(release));
}
TORCH_LIBRARY_IMPL(fastattn_simulated, CompositeExplicitAutograd, m) { m.impl("alias_on_host", TORCH_FN(alias)); }

at::Generator host_generator(std::optional<at::Generator> const& given, Device device) {
  at::Generator const chosen = given && given->defined() ? *given : default_generator(device.index());
  TORCH_CHECK(chosen.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", chosen.device().type(),
              "'");
  return static_cast<CudaGenerator*>(chosen.unsafeGetGeneratorImpl())->host;
}

// --- what torch asks of a device -------------------------------------------------------------------------------------

struct Moment {
  std::chrono::steady_clock::time_point at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    Device const before(c10::kCUDA, current_device);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(Device device) const override {
    if (!device.has_index()) return;
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal");
    current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index() && device.index() < kDevices) current_device = device.index();
  }
  static c10::Stream stream(int64_t id, DeviceIndex index) {
    return c10::Stream(c10::Stream::UNSAFE, Device(c10::kCUDA, index), id);
  }
  static DeviceIndex index_of(Device device) { return device.has_index() ? device.index() : current_device; }
  c10::Stream getStream(Device device) const override {
    return stream(current_streams[index_of(device)], index_of(device));
  }
  c10::Stream getDefaultStream(Device device) const override { return stream(0, index_of(device)); }
  c10::Stream getNewStream(Device device, int) const override {
    return stream(machine().next_stream++, index_of(device));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream given) const override {
    c10::Stream const before = getStream(given.device());
    current_streams[given.device_index()] = given.id();
    return before;
  }
  void* getStreamNativeHandle(c10::Stream const given) const override { return reinterpret_cast<void*>(given.id()); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, c10::Stream const&, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Moment;
    static_cast<Moment*>(*event)->at = std::chrono::steady_clock::now();
  }
  void block(void*, c10::Stream const&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  bool queryStream(c10::Stream const&) const override { return true; }
  bool isStreamCapturing(c10::Stream const& given) const override {
    return machine().graph != nullptr && given.id() == machine().capturing_stream;
  }
  void synchronizeStream(c10::Stream const&) const override { wait("synchronize"); }
  void synchronizeEvent(void*) const override { wait("synchronize"); }
  void synchronizeDevice(DeviceIndex) const override { wait("synchronize"); }
  void recordDataPtrOnStream(c10::DataPtr const&, c10::Stream const&) const override {}
  double elapsedTime(void* first, void* second, DeviceIndex) const override {
    auto const between = static_cast<Moment*>(second)->at - static_cast<Moment*>(first)->at;
    return std::chrono::duration<double, std::milli>(between).count();
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return deviceCount(); }
  DeviceIndex current_device() const override { return simulated::current_device; }
  DeviceIndex getCurrentDevice() const override { return simulated::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { simulated::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    DeviceIndex const before = simulated::current_device;
    if (index >= 0) simulated::current_device = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(void const*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return allocator(); }
  Device getDeviceFromPtr(void*) const override { return {c10::kCUDA, simulated::current_device}; }
  at::Generator const& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<CudaGenerator>(index < 0 ? simulated::current_device : index);
  }
  void deviceSynchronize(DeviceIndex) const override { wait("synchronize"); }
};

// torch has made its hooks, and keeps them, before anyone can register others: their virtual functions become these.
// Neither class has members of its own.
void exchange_hooks(bool on) {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  static auto* const mine = new Hooks;
  static void* torchs = nullptr;
  auto* const hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (!torchs) std::memcpy(&torchs, static_cast<void*>(hooks), sizeof torchs);
  std::memcpy(static_cast<void*>(hooks), on ? static_cast<void*>(mine) : static_cast<void*>(&torchs), sizeof torchs);
}

}  // namespace simulated

// --- for build.py and machine.py -------------------------------------------------------------------------------------

using simulated::machine;

extern "C" {
void sim_turn(int on, int (*told)(int, char const*)) {
  c10::SetAllocator(c10::kCUDA, simulated::allocator());
  simulated::exchange_hooks(on != 0);
  machine().told = told;
  machine().is_on = on != 0;
}
void sim_set_unchecked(char const* name) { machine().unchecked.insert(name); }
int sim_device() { return simulated::current_device; }
int sim_exchange_device(int index) {
  int const before = simulated::current_device;
  if (index >= 0) simulated::current_device = static_cast<c10::DeviceIndex>(index);
  return before;
}
long long sim_stream(int device) { return simulated::current_streams.at(device); }
void sim_set_stream(int device, long long id) { simulated::current_streams.at(device) = id; }
int sim_device_of(unsigned long long address) { return simulated::Places::all().device_of(address); }
long long sim_held(int device) { return machine().held.at(device); }
long long sim_peak(int device) { return machine().peak.at(device); }
void sim_reset_peak(int device) { machine().peak.at(device) = machine().held.at(device).load(); }
int sim_is_capturing() { return simulated::is_capturing(); }
void* sim_begin_capture() {
  machine().capturing_stream = simulated::current_streams[simulated::current_device];
  return machine().graph = new std::vector<std::function<void()>>;
}
void sim_end_capture() { machine().graph = nullptr; }
void sim_capture_call(void (*call)(long long), long long id) {
  simulated::record([call, id] { call(id); });
}
int sim_replay(void* graph) {
  auto& steps = *static_cast<std::vector<std::function<void()>>*>(graph);
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto const& step : steps) step();
  return static_cast<int>(steps.size());
}
void sim_free_graph(void* graph) { delete static_cast<std::vector<std::function<void()>>*>(graph); }
}
