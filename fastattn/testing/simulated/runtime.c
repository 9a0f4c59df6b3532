// The part of the CUDA runtime that csrc/sm90/host.cu and the code around its launches ask for, over the recording
// driver. Built and read by recording.py.
#include "driver.c"

typedef struct Dim3 { unsigned x, y, z; } Dim3;
typedef struct Entry { void const* host; char const* name; } Entry;
enum { INVALID_DEVICE = 101, INVALID_FUNCTION = 98, MAX_DYNAMIC_SHARED = 8 };

static Entry entries[MOST];
static int entry_count;
static unsigned (*argument_bytes)(char const*);
static __thread int device_of_thread, last_error;
static __thread struct { Dim3 grid, block; size_t shared; void* stream; } configured;

void rec_set_argument_bytes(unsigned (*of_kernel)(char const*)) { argument_bytes = of_kernel; }

static int noted(int error) { return error ? (last_error = error) : OK; }

// A kernel has a function in each context that it is launched in, as modules of the runtime have.
static Function* function_of(void const* host) {
  Entry const* entry = 0;
  for (int i = 0; i < entry_count; ++i) if (entries[i].host == host) entry = &entries[i];
  if (!entry) return 0;
  if (!current) current = &contexts[device_of_thread];  // the runtime binds a context where it needs one
  for (int i = 0; i < function_count; ++i) {
    if (functions[i].context == current && strcmp(functions[i].name, entry->name) == 0) return &functions[i];
  }
  Function* const f = &functions[function_count++];
  f->context = current;
  f->shared = SHARED_DEFAULT;
  f->params = 1;
  f->sizes[0] = argument_bytes(entry->name);
  snprintf(f->name, sizeof f->name, "%s", entry->name);
  return f;
}

// ---- what nvcc generates calls of ------------------------------------------------------------------------------------
void** __cudaRegisterFatBinary(void* binary) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 1; }
void __cudaRegisterFunction(void** handle, char const* host, char* device, char const* name, int limit, void* thread,
                            void* block, void* block_size, void* grid_size, int* warp) {
  if (entry_count < MOST) entries[entry_count++] = (Entry){host, name};
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configured.grid = grid, configured.block = block, configured.shared = shared, configured.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared, *stream = configured.stream;
  return OK;
}
int cudaLaunchKernel(void const* host, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  unsigned const blocks[3] = {grid.x, grid.y, grid.z}, threads[3] = {block.x, block.y, block.z};
  Function* const f = function_of(host);
  return noted(f ? launch(f, blocks, threads, (unsigned)shared, (uint64_t)stream, arguments) : INVALID_FUNCTION);
}
typedef struct LaunchConfig { Dim3 grid, block; size_t shared; void* stream; Attribute const* attributes; unsigned count; } LaunchConfig;
int cudaLaunchKernelExC(LaunchConfig const* c, void const* host, void** arguments) {
  Config const config = {{c->grid.x, c->grid.y, c->grid.z}, {c->block.x, c->block.y, c->block.z}, (unsigned)c->shared,
                         c->stream, c->attributes, c->count};
  Function* const f = function_of(host);
  return noted(f ? cuLaunchKernelEx(&config, f, arguments, 0) : INVALID_FUNCTION);
}
// As nvcc 13 has it: the kernel is looked up first.
int __cudaGetKernel(void** kernel, void const* host) { *kernel = (void*)host; return OK; }
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// ---- what the host code calls --------------------------------------------------------------------------------------
int cudaGetLastError(void) {
  int const error = last_error;
  last_error = OK;
  return error;
}
char const* cudaGetErrorString(int code) {
  char const* text;
  cuGetErrorString(code, &text);
  return text;
}
int cudaGetDevice(int* device) { *device = device_of_thread; return OK; }
int cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return noted(INVALID_DEVICE);
  device_of_thread = device;
  current = &contexts[device];
  return OK;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) { return noted(cuDeviceGetAttribute(value, attribute, device)); }
int cudaFuncSetAttribute(void const* host, int attribute, int value) {
  Function* const f = function_of(host);
  return noted(f ? cuFuncSetAttribute(f, attribute, value) : INVALID_FUNCTION);
}
int cudaGetDriverEntryPointByVersion(char const* symbol, void** function, unsigned wanted, unsigned long long flags, int* result) {
  int const is_known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && wanted <= (unsigned)version;
  *function = is_known ? (void*)cuTensorMapEncodeTiled : 0;
  *result = is_known ? 0 : 1;  // found, or not
  return OK;
}
