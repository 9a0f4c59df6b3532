// A CUDA driver that launches nothing: it records launches and tensor maps, and holds calls to the driver's documented
// rules. Contexts belong to threads: without one, calls end with 201, as on a GPU. Built and read by recording.py.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, CAPTURE_UNSUPPORTED = 900 };
enum { NAME_BYTES = 512, MOST_PARAMS = 256, DEVICES = 2, MOST = 4096, PARAM_BYTES = 4096, SHARED_DEFAULT = 49152, SHARED_LIMIT = 232448 };

typedef struct Context { int device; } Context;
typedef struct Function { Context* context; char name[NAME_BYTES]; unsigned params, sizes[MOST_PARAMS], shared; } Function;
typedef struct Launch {
  char kernel[NAME_BYTES];
  unsigned grid[3], block[3], shared, param_bytes, param_count, sizes[MOST_PARAMS];
  uint64_t stream;
  int device, follows;
  unsigned char params[PARAM_BYTES];
} Launch;
// A tensor map as it lies in the argument of a kernel; the driver's own form is secret.
typedef struct Map {
  uint64_t address, sizes[5], strides[4];
  unsigned magic, type, box[5];
  uint8_t rank, steps[5], interleave, swizzle, promotion, fill;
} Map;
enum { MAP_MAGIC = 0x4d415021 };
_Static_assert(sizeof(Map) <= 128, "it has the room of a CUtensorMap");

static Context contexts[DEVICES] = {{0}, {1}};
static __thread Context* current;
static __thread int capture_mode;  // 0 global, 1 thread local, 2 relaxed
static Function functions[MOST];
static Launch launches[MOST];
static int function_count, launch_count, capturing, version = 13000;
static char broken[1024];

static int refuse(int code, char const* rule) {
  snprintf(broken, sizeof broken, "%s", rule);
  return code;
}

// ---- for recording.py ----------------------------------------------------------------------------------------------
void rec_clear(void) {
  launch_count = 0;
  broken[0] = 0;
}
void rec_reset(void) {
  rec_clear();
  function_count = capturing = 0;
  current = 0;
  version = 13000;
}
void rec_set_version(int v) { version = v; }
void rec_set_capturing(int on) { capturing = on; }
void rec_bind(int device) { current = device < 0 ? 0 : &contexts[device]; }
int rec_launches(void) { return launch_count; }
int rec_modules(void) { return function_count; }
Launch const* rec_launch(int i) { return &launches[i]; }
char const* rec_broken(void) { return broken; }

// ---- the driver ----------------------------------------------------------------------------------------------------
int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int* found) { *found = version; return OK; }
int cuGetErrorString(int code, char const** text) {
  *text = code == INVALID_CONTEXT ? "invalid device context" : code == INVALID_HANDLE ? "invalid resource handle"
          : code == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : "invalid argument";
  return OK;
}
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal < DEVICES ? OK : 101; }
int cuDeviceGetCount(int* count) { *count = DEVICES; return OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 16 ? 132 : attribute == 97 ? SHARED_LIMIT : 0;
  return OK;
}
int cuDevicePrimaryCtxRetain(Context** context, int device) { *context = &contexts[device]; return OK; }
int cuCtxGetCurrent(Context** context) { *context = current; return OK; }
int cuCtxSetCurrent(Context* context) { current = context; return OK; }
int cuCtxPushCurrent_v2(Context* context) { current = context; return OK; }
int cuCtxPopCurrent_v2(Context** context) { *context = current; current = 0; return OK; }
int cuCtxGetDevice(int* device) {
  if (!current) return refuse(INVALID_CONTEXT, "cuCtxGetDevice without a context on this thread");
  *device = current->device;
  return OK;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  int const before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return OK;
}
// A module is text here: the name of its kernel, and the bytes of each parameter.
int cuModuleLoadData(void** module, void const* image) {
  if (!current) return refuse(INVALID_CONTEXT, "cuModuleLoadData without a context on this thread");
  if (capturing && capture_mode != 2) return refuse(CAPTURE_UNSUPPORTED, "a module was loaded during a capture");
  Function* const f = &functions[function_count++];
  f->context = current;
  f->shared = SHARED_DEFAULT;
  char const* text = image;
  int read = 0;
  f->params = 0;
  if (sscanf(text, "%511s%n", f->name, &read) != 1) return refuse(INVALID_VALUE, "a module without a kernel");
  while (f->params < MOST_PARAMS && sscanf(text += read, "%u%n", &f->sizes[f->params], &read) == 1) ++f->params;
  *module = f;
  return OK;
}
int cuModuleUnload(void* module) { return OK; }
int cuModuleGetFunction(void** function, void* module, char const* name) {
  if (!module) return refuse(INVALID_HANDLE, "a function of no module");
  *function = module;
  return current ? OK : refuse(INVALID_CONTEXT, "cuModuleGetFunction without a context on this thread");
}
int cuFuncGetAttribute(int* value, int attribute, Function* f) { *value = attribute == 0 ? 1024 : 0; return OK; }
int cuFuncSetCacheConfig(Function* f, int config) { return OK; }
int cuFuncSetAttribute(Function* f, int attribute, int value) {
  if (!f || f->context != current) return refuse(INVALID_HANDLE, "a function of another context");
  if (attribute == 8 && value > SHARED_LIMIT) return refuse(INVALID_VALUE, "more shared memory than a block can have");
  if (attribute == 8) f->shared = value < SHARED_DEFAULT ? SHARED_DEFAULT : value;
  return OK;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { *(uint64_t*)data = pointer; return OK; }

static int launch(Function* f, unsigned const* grid, unsigned const* block, unsigned shared, uint64_t stream, void** params) {
  if (!current) return refuse(INVALID_CONTEXT, "a launch without a context on this thread");
  if (!f || f->context != current) return refuse(INVALID_HANDLE, "a launch in another context than that of its module");
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535)
    return refuse(INVALID_VALUE, "a grid that is empty or too large");
  unsigned const threads = block[0] * block[1] * block[2];
  if (!threads || threads > 1024) return refuse(INVALID_VALUE, "a block of no threads, or of more than 1024");
  if (shared > f->shared) return refuse(INVALID_VALUE, "more shared memory than the function was allowed");
  unsigned bytes = 0;
  for (unsigned i = 0; i < f->params; ++i) bytes += f->sizes[i];
  if (bytes > PARAM_BYTES) return refuse(INVALID_VALUE, "more than 4 KB of parameters");
  int const has_maps = f->params && f->sizes[0] >= sizeof(Map) && ((Map const*)params[0])->magic == MAP_MAGIC;
  if (has_maps && (uintptr_t)params[0] % 64) return refuse(INVALID_VALUE, "a tensor map that is not aligned to 64 bytes");
  Launch* const l = &launches[launch_count++ % MOST];
  memset(l, 0, sizeof *l);
  snprintf(l->kernel, sizeof l->kernel, "%s", f->name);
  memcpy(l->grid, grid, sizeof l->grid);
  memcpy(l->block, block, sizeof l->block);
  l->shared = shared;
  l->stream = stream;
  l->device = current->device;
  l->param_bytes = bytes;
  l->param_count = f->params;
  for (unsigned i = 0, at = 0; i < f->params; at += f->sizes[i++]) {
    l->sizes[i] = f->sizes[i];
    memcpy(l->params + at, params[i], f->sizes[i]);
  }
  return OK;
}
int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** params, void** extra) {
  unsigned const grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return launch(f, grid, block, shared, (uint64_t)stream, params);
}
typedef struct Attribute { unsigned id, padding; int value, rest[15]; } Attribute;
typedef struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute const* attributes; unsigned count; } Config;
int cuLaunchKernelEx(Config const* c, Function* f, void** params, void** extra) {
  for (unsigned i = 0; i < c->count; ++i) {
    if (c->attributes[i].id != 6) return refuse(INVALID_VALUE, "an attribute other than programmatic serialization");
  }
  int const code = launch(f, c->grid, c->block, c->shared, (uint64_t)c->stream, params);
  if (!code) launches[(launch_count - 1) % MOST].follows = c->count && c->attributes[0].value;
  return code;
}

// CUDA driver API, "Tensor Map Object Management". A rule that it states and no driver enforces is left out: that each
// stride divides the next, which (row, head) order breaks.
int cuTensorMapEncodeTiled(Map* map, int type, unsigned rank, void* address, uint64_t const* sizes, uint64_t const* strides,
                           unsigned const* box, unsigned const* steps, int interleave, int swizzle, int promotion, int fill) {
  static unsigned const swizzle_bytes[] = {0, 32, 64, 128};
  if ((uintptr_t)map % 64) return refuse(INVALID_VALUE, "tensorMap: not aligned to 64 bytes");
  if (type != 6 && type != 9) return refuse(INVALID_VALUE, "tensorDataType: neither fp16 nor bf16");
  if (rank < 1 || rank > 5) return refuse(INVALID_VALUE, "tensorRank: not from 1 to 5");
  if (!address || (uintptr_t)address % 16) return refuse(INVALID_VALUE, "globalAddress: null, or not a multiple of 16");
  if (interleave) return refuse(INVALID_VALUE, "interleave: its rules are not written down here");
  if (swizzle < 0 || swizzle > 3) return refuse(INVALID_VALUE, "swizzle: not from none to 128 bytes");
  if (promotion < 0 || promotion > 3) return refuse(INVALID_VALUE, "l2Promotion: not from none to 256 bytes");
  if (fill < 0 || fill > 1) return refuse(INVALID_VALUE, "oobFill: neither zeros nor NaN");
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32)) return refuse(INVALID_VALUE, "globalDim: 0, or more than 2^32");
    if (box[i] == 0 || box[i] > 256) return refuse(INVALID_VALUE, "boxDim: 0, or more than 256");
    if (steps[i] == 0 || steps[i] > 8) return refuse(INVALID_VALUE, "elementStrides: 0, or more than 8");
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    if (strides[i] == 0 || strides[i] % 16 || strides[i] >= (1ull << 40))
      return refuse(INVALID_VALUE, "globalStrides: not a multiple of 16 below 2^40");
  }
  if (box[0] * 2 % 16) return refuse(INVALID_VALUE, "boxDim[0]: not a multiple of 16 bytes");
  if (swizzle && box[0] * 2 > swizzle_bytes[swizzle]) return refuse(INVALID_VALUE, "boxDim[0]: wider than the swizzle");
  memset(map, 0, 128);
  map->magic = MAP_MAGIC;
  map->address = (uint64_t)address;
  map->type = type;
  map->rank = rank;
  memcpy(map->sizes, sizes, rank * sizeof *sizes);
  memcpy(map->strides, strides, (rank - 1) * sizeof *strides);
  memcpy(map->box, box, rank * sizeof *box);
  for (unsigned i = 0; i < rank; ++i) map->steps[i] = steps[i];
  map->interleave = interleave, map->swizzle = swizzle, map->promotion = promotion, map->fill = fill;
  return OK;
}
int cuTensorMapReplaceAddress(Map* map, void* address) {
  if ((uintptr_t)map % 64) return refuse(INVALID_VALUE, "tensorMap: not aligned to 64 bytes");
  if (map->magic != MAP_MAGIC) return refuse(INVALID_VALUE, "tensorMap: never encoded");
  if (!address || (uintptr_t)address % 16) return refuse(INVALID_VALUE, "globalAddress: null, or not a multiple of 16");
  map->address = (uint64_t)address;
  return OK;
}
// ---- what Triton's launcher is linked with, too -----------------------------------------------------------------------
int cuCtxSetLimit(int limit, size_t value) { return OK; }
int cuCtxGetLimit(size_t* value, int limit) { *value = 0; return OK; }
