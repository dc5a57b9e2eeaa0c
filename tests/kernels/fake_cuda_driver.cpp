// A libcuda.so.1 for tests: prints what it is asked to do, one line a call, and does nothing. The
// call that FAKE_CUDA_FAILS names fails.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int answer(const char *call) {
  const char *failing = std::getenv("FAKE_CUDA_FAILS");
  return failing && !std::strcmp(failing, call) ? 1 : 0;
}

char context[] = "context", library[] = "library";

} // namespace

extern "C" {

int cuInit(unsigned) { return answer("cuInit"); }

int cuDeviceGetCount(int *count) {
  *count = answer("no device") ? 0 : 1;
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return answer("cuDeviceGet");
}

int cuDevicePrimaryCtxRetain(void **to, int device) {
  std::printf("retain %d\n", device);
  *to = context;
  return 0;
}

int cuCtxPushCurrent_v2(void *from) {
  std::printf("push %s\n", static_cast<const char *>(from));
  return 0;
}

int cuCtxPopCurrent_v2(void **to) {
  std::printf("pop\n");
  *to = context;
  return 0;
}

int cuLibraryLoadFromFile(void **to, const char *file, void *, void *, unsigned, void *, void *,
                          unsigned) {
  std::printf("load %s\n", file);
  *to = library;
  return answer("cuLibraryLoadFromFile");
}

int cuLibraryGetKernel(void **to, void *, const char *name) {
  *to = strdup(name);
  return answer("cuLibraryGetKernel");
}

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  std::printf("attribute %d of %s on %d: %d\n", attribute, static_cast<const char *>(kernel),
              device, value);
  return 0;
}

int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void *stream, void **,
                   void **) {
  if (y != 1 || z != 1 || threads_y != 1 || threads_z != 1) return 1;
  std::printf("launch %s: %u blocks of %u threads, %u bytes, stream %" PRIuPTR "\n",
              static_cast<const char *>(kernel), x, threads_x, shared,
              reinterpret_cast<uintptr_t>(stream));
  return answer("cuLaunchKernel");
}

int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int, int fill) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || interleave || fill) return 1;
  std::printf("map type %d swizzle %d at %" PRIuPTR ":", type, swizzle,
              reinterpret_cast<uintptr_t>(address));
  for (uint32_t i = 0; i < rank; ++i)
    std::printf(" %" PRIu64 "/%" PRIu64 "/%u/%u", sizes[i], i ? strides[i - 1] : 0, box[i],
                steps[i]);
  std::printf("\n");
  return answer("cuTensorMapEncodeTiled");
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
