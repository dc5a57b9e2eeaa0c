// A libcuda.so.1 for tests: records what it is asked to do and runs the launches in emulation. The
// call that FAKE_CUDA_FAILS names fails.
#include <cstdlib>
#include <string>

#include "cuda_emulation.h"

namespace {

using namespace tw::cuda;

// ---- What the emulation takes for granted of csrc/cuda/hopper/index.h

// A thread's share of a product is the left operand of the next one, depth 16 after depth 16 (PTX
// ISA, wgmma with m64k16: A).
constexpr bool products_are_operands() {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int e = 0; e < 64; ++e)
      if (product_row(thread, e) != 16 * (thread / 32) + thread % 32 / 4 + 8 * (e % 8 / 2 % 2) ||
          product_column(thread, e) != 16 * (e / 8) + 2 * (thread % 4) + e % 2 + 8 * (e % 8 / 4))
        return false;
  return true;
}
static_assert(products_are_operands());

// A buffer is filled for the n-th time in the phase of parity n % 2 of its barrier.
template <int kStages> constexpr bool ring_goes_round() {
  Ring<kStages> ring;
  for (int fills = 0; fills < 5 * kStages; ++fills, ring.advance()) {
    const auto at = Ring<kStages>::at(fills);
    if (ring.stage != fills % kStages || ring.parity != fills / kStages % 2u) return false;
    if (at.stage != ring.stage || at.parity != ring.parity) return false;
  }
  return true;
}
static_assert(ring_goes_round<1>() && ring_goes_round<2>() && ring_goes_round<12>());

// ----

std::string events;
char context[] = "context";

void record(const std::string &event) { events += event + "\n"; }

int answer(const char *call) {
  const char *failing = std::getenv("FAKE_CUDA_FAILS");
  return failing && failing == std::string(call);
}

} // namespace

extern "C" {

// What happened since the last call, one line each.
const char *fake_cuda_events() {
  static std::string told;
  told.swap(events);
  events.clear();
  return told.c_str();
}

int cuInit(unsigned) { return answer("cuInit"); }

int cuDeviceGetCount(int *count) {
  *count = !answer("no device");
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return answer("cuDeviceGet");
}

int cuDevicePrimaryCtxRetain(void **to, int device) {
  record("retain " + std::to_string(device));
  *to = context;
  return 0;
}

int cuCtxPushCurrent_v2(void *from) {
  record("push " + std::string(static_cast<char *>(from)));
  return 0;
}

int cuCtxPopCurrent_v2(void **to) {
  record("pop");
  *to = context;
  return 0;
}

int cuLibraryLoadFromFile(void **to, const char *file, void *, void *, unsigned, void *, void *,
                          unsigned) {
  record("load " + std::string(file));
  *to = strdup(file);
  return answer("cuLibraryLoadFromFile");
}

int cuLibraryGetKernel(void **to, void *, const char *name) {
  *to = strdup(name);
  return answer("cuLibraryGetKernel");
}

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  record("attribute " + std::to_string(attribute) + " of " + static_cast<char *>(kernel) + " on " +
         std::to_string(device) + ": " + std::to_string(value));
  return 0;
}

struct Attribute { // CUlaunchAttribute
  int id;
  alignas(8) int value[16];
};
struct Config { // CUlaunchConfig
  unsigned blocks[3], threads[3], shared_bytes;
  void *stream;
  const Attribute *attributes;
  unsigned num_attributes;
};

int cuLaunchKernelEx(const Config *config, void *kernel, void **parameters, void **) {
  const auto &[x, y, z] = config->blocks;
  const auto &[threads_x, threads_y, threads_z] = config->threads;
  constexpr int kProgrammaticStreamSerialization = 6; // CU_LAUNCH_ATTRIBUTE_... of cuda.h
  const bool early = config->num_attributes == 1;
  if (answer("cuLaunchKernelEx") || y != 1 || z != 1 || threads_y != 1 || threads_z != 1 ||
      config->num_attributes > 1)
    return 1;
  if (early && (config->attributes->id != kProgrammaticStreamSerialization ||
                config->attributes->value[0] != 1))
    return 1;
  const Launch launch{static_cast<char *>(kernel), static_cast<int>(x), static_cast<int>(threads_x),
                      static_cast<int>(config->shared_bytes), parameters[0]};
  record("launch " + launch.kernel + " on stream " +
         std::to_string(reinterpret_cast<uintptr_t>(config->stream)) + (early ? ", early" : ""));
  try {
    require(emulate_attention(launch) || emulate_decode(launch), "there is no such kernel");
    return 0;
  } catch (const std::exception &error) {
    record(error.what());
    return 1;
  }
}

int cuTensorMapEncodeTiled(void *to, int type, uint32_t rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int, int fill) {
  if (answer("cuTensorMapEncodeTiled")) return 1;
  constexpr int kFloat16 = 6, kBfloat16 = 9, kSwizzle128Bytes = 3; // CUtensorMap... of cuda.h
  if (reinterpret_cast<uintptr_t>(to) % 64 || interleave || fill || swizzle != kSwizzle128Bytes ||
      (type != kFloat16 && type != kBfloat16) || rank > 5)
    return 1;
  auto *map = new Map{static_cast<int>(rank), static_cast<char *>(address), {}, {}, {}};
  for (uint32_t i = 0; i < rank; ++i) {
    if (steps[i] != 1) return 1;
    map->sizes[i] = sizes[i], map->box[i] = box[i], map->strides[i] = i ? strides[i - 1] : 2;
  }
  std::memcpy(to, &map, sizeof map); // never freed: a launch may read it at any time
  return 0;
}

int cuGetErrorName(int, const char **name) {
  *name = "CUDA_ERROR_INVALID_VALUE";
  return 0;
}

int cuGetErrorString(int, const char **text) {
  *text = "invalid argument";
  return 0;
}
}
