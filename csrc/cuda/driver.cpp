#include "cuda/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/hopper/index.h"

namespace tw::cuda {

namespace {

using Result = int; // CUresult
using Handle = void *;

constexpr int kMaxDynamicSharedBytes = 8; // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kProgrammaticStreamSerialization = 6; // CU_LAUNCH_ATTRIBUTE_...

struct LaunchAttribute { // CUlaunchAttribute
  int id;
  alignas(8) int value[16];
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig { // CUlaunchConfig
  unsigned blocks[3], threads[3], shared_bytes;
  Handle stream;
  const LaunchAttribute *attributes;
  unsigned num_attributes;
};

// The entry points that are used, under the names that libcuda exports for CUDA 12 and later.
struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDeviceGetCount)(int *);
  Result (*cuDeviceGet)(int *, int);
  Result (*cuDevicePrimaryCtxRetain)(Handle *, int);
  Result (*cuCtxPushCurrent_v2)(Handle);
  Result (*cuCtxPopCurrent_v2)(Handle *);
  Result (*cuLibraryLoadFromFile)(Handle *, const char *, void *, void *, unsigned, void *, void *,
                                  unsigned);
  Result (*cuLibraryGetKernel)(Handle *, Handle, const char *);
  Result (*cuKernelSetAttribute)(int, int, Handle, int);
  Result (*cuLaunchKernelEx)(const LaunchConfig *, Handle, void **, void **);
  Result (*cuTensorMapEncodeTiled)(void *, int, uint32_t, void *, const uint64_t *,
                                   const uint64_t *, const uint32_t *, const uint32_t *, int, int,
                                   int, int);
  Result (*cuGetErrorName)(Result, const char **);
  Result (*cuGetErrorString)(Result, const char **);

  std::string why_not; // empty if all of the above are there and a device is

  Driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
      why_not = std::string("no CUDA driver: ") + dlerror();
      return;
    }
    const auto find = [&](auto &entry, const char *name) {
      entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(library, name));
      if (!entry && why_not.empty())
        why_not = std::string("the CUDA driver has no ") + name + ": CUDA 12 or later is needed";
    };
#define TW_FIND(name) find(name, #name)
    TW_FIND(cuInit);
    TW_FIND(cuDeviceGetCount);
    TW_FIND(cuDeviceGet);
    TW_FIND(cuDevicePrimaryCtxRetain);
    TW_FIND(cuCtxPushCurrent_v2);
    TW_FIND(cuCtxPopCurrent_v2);
    TW_FIND(cuLibraryLoadFromFile);
    TW_FIND(cuLibraryGetKernel);
    TW_FIND(cuKernelSetAttribute);
    TW_FIND(cuLaunchKernelEx);
    TW_FIND(cuTensorMapEncodeTiled);
    TW_FIND(cuGetErrorName);
    TW_FIND(cuGetErrorString);
#undef TW_FIND
    int count = 0;
    if (!why_not.empty()) return;
    if (const Result error = cuInit(0)) why_not = text(error, "cuInit");
    else if (const Result error = cuDeviceGetCount(&count))
      why_not = text(error, "cuDeviceGetCount");
    else if (count == 0) why_not = "the CUDA driver sees no device";
  }

  std::string text(Result error, const std::string &call) const {
    const char *name = nullptr, *description = nullptr;
    cuGetErrorName(error, &name);
    cuGetErrorString(error, &description);
    return call + ": " + (name ? name : std::to_string(error)) +
           (description ? std::string(" (") + description + ")" : "");
  }

  void check(Result error, const std::string &call) const {
    if (error) throw std::runtime_error(text(error, call));
  }
};

// Lives as long as the process: the driver may be gone before static objects are destroyed.
const Driver &any_driver() {
  static const Driver &driver = *new Driver;
  return driver;
}

const Driver &driver() {
  if (!any_driver().why_not.empty()) throw std::runtime_error(any_driver().why_not);
  return any_driver();
}

// Kernels of the files loaded so far, ready for `shared_bytes` on each device they ran on.
class Kernels {
public:
  Handle get(const std::string &cubin, const std::string &name, int device,
             unsigned shared_bytes) {
    const std::lock_guard lock(mutex_);
    Handle &library = libraries_[cubin];
    if (!library)
      driver().check(driver().cuLibraryLoadFromFile(&library, cubin.c_str(), nullptr, nullptr, 0,
                                                    nullptr, nullptr, 0),
                     "cuLibraryLoadFromFile of " + cubin);
    Handle &kernel = kernels_[{library, name}];
    if (!kernel)
      driver().check(driver().cuLibraryGetKernel(&kernel, library, name.c_str()),
                     "cuLibraryGetKernel of " + name);
    unsigned &allowed = allowed_[{kernel, device}];
    if (allowed < shared_bytes) {
      driver().check(driver().cuKernelSetAttribute(kMaxDynamicSharedBytes,
                                                   static_cast<int>(shared_bytes), kernel, device),
                     "cuKernelSetAttribute");
      allowed = shared_bytes;
    }
    return kernel;
  }

private:
  std::mutex mutex_;
  std::map<std::string, Handle> libraries_;
  std::map<std::pair<Handle, std::string>, Handle> kernels_;
  std::map<std::pair<Handle, int>, unsigned> allowed_;
};

} // namespace

const std::string &why_no_driver() { return any_driver().why_not; }

Launcher::Launcher(int ordinal, void *stream, std::string cubin)
    : stream_(stream), cubin_(std::move(cubin)) {
  driver().check(driver().cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  // Retained for the life of the process: PyTorch keeps the context alive just as long.
  static std::mutex mutex;
  static std::map<int, Handle> &contexts = *new std::map<int, Handle>;
  const std::lock_guard lock(mutex);
  Handle &context = contexts[device_];
  if (!context)
    driver().check(driver().cuDevicePrimaryCtxRetain(&context, device_),
                   "cuDevicePrimaryCtxRetain");
  driver().check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
}

Launcher::~Launcher() {
  Handle context;
  driver().cuCtxPopCurrent_v2(&context);
}

void Launcher::start(const std::string &kernel, const Grid &grid, const void *arguments) const {
  static Kernels &kernels = *new Kernels;
  const auto blocks = static_cast<unsigned>(grid.blocks);
  const auto threads = static_cast<unsigned>(grid.threads);
  const auto shared_bytes = static_cast<unsigned>(grid.shared_bytes);
  const Handle function = kernels.get(cubin_, kernel, device_, shared_bytes);
  void *parameters[] = {const_cast<void *>(arguments)};
  const LaunchAttribute early{kProgrammaticStreamSerialization, {1}};
  const LaunchConfig config{{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, stream_,
                            &early,         grid.early};
  driver().check(driver().cuLaunchKernelEx(&config, function, parameters, nullptr),
                 "cuLaunchKernelEx of " + kernel);
}

std::string why_not(const Tiles &tiles) {
  if (reinterpret_cast<uint64_t>(tiles.data) % 16)
    return "an address that is not a multiple of 16 bytes";
  for (size_t i = 0; i < tiles.dimensions.size(); ++i) {
    const auto &[size, stride, box] = tiles.dimensions[i];
    const std::string dimension = " in dimension " + std::to_string(i);
    const int64_t bytes = stride * kElementBytes;
    if (size < 1 || size > int64_t{1} << 32)
      return "a size of " + std::to_string(size) + dimension + ", not 1 to 2^32";
    if (i > 0 && (bytes % 16 || bytes < 0 || bytes >= int64_t{1} << 40))
      return "a stride of " + std::to_string(bytes) + " bytes" + dimension +
             ", not a multiple of 16 below 2^40";
  }
  return "";
}

TensorMap Launcher::tensor_map(const Tiles &tiles) const {
  const std::string reason = why_not(tiles);
  if (!reason.empty()) throw std::invalid_argument("the copy engine does not take " + reason);
  constexpr int kNoInterleave = 0, kSwizzle128Bytes = 3, kPromoteTo256Bytes = 3, kFillWithZero = 0;
  constexpr int kMaxRank = 5;
  uint64_t sizes[kMaxRank], strides[kMaxRank]; // bytes
  uint32_t box[kMaxRank], every_element[kMaxRank] = {1, 1, 1, 1, 1};
  const size_t rank = tiles.dimensions.size();
  for (size_t i = 0; i < rank; ++i) {
    sizes[i] = static_cast<uint64_t>(tiles.dimensions[i].size);
    strides[i] = static_cast<uint64_t>(tiles.dimensions[i].stride) * kElementBytes;
    box[i] = static_cast<uint32_t>(tiles.dimensions[i].box);
  }
  // The driver writes to 64-byte boundaries only, and GCC does not lay every temporary that a result
  // of this function goes to on one.
  alignas(TensorMap) uint64_t encoded[16];
  driver().check(driver().cuTensorMapEncodeTiled(
                     encoded, static_cast<int>(tiles.element), static_cast<uint32_t>(rank),
                     const_cast<void *>(tiles.data), sizes, strides + 1, box, every_element,
                     kNoInterleave, kSwizzle128Bytes, kPromoteTo256Bytes, kFillWithZero),
                 "cuTensorMapEncodeTiled");
  TensorMap map;
  std::copy_n(encoded, 16, map.opaque);
  return map;
}

} // namespace tw::cuda
