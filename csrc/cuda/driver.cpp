#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

namespace tw::cuda {

namespace {

using Result = int; // CUresult
using Handle = void *;

constexpr int kMaxDynamicSharedBytes = 8; // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

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
  Result (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                           unsigned, Handle, void **, void **);
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
    TW_FIND(cuLaunchKernel);
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

  std::string text(Result error, const char *call) const {
    const char *name = nullptr, *description = nullptr;
    cuGetErrorName(error, &name);
    cuGetErrorString(error, &description);
    return std::string(call) + ": " + (name ? name : std::to_string(error)) +
           (description ? std::string(" (") + description + ")" : "");
  }

  void check(Result error, const char *call) const {
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
  Handle get(const std::string &cubin, const char *name, int device, unsigned shared_bytes) {
    const std::lock_guard lock(mutex_);
    Handle &library = libraries_[cubin];
    if (!library)
      driver().check(driver().cuLibraryLoadFromFile(&library, cubin.c_str(), nullptr, nullptr, 0,
                                                    nullptr, nullptr, 0),
                     ("cuLibraryLoadFromFile of " + cubin).c_str());
    Handle &kernel = kernels_[{library, name}];
    if (!kernel)
      driver().check(driver().cuLibraryGetKernel(&kernel, library, name),
                     ("cuLibraryGetKernel of " + std::string(name)).c_str());
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

OnDevice::OnDevice(int ordinal) {
  driver().check(driver().cuDeviceGet(&handle_, ordinal), "cuDeviceGet");
  // Retained once and for all: PyTorch keeps the context alive just as long.
  static std::mutex mutex;
  static std::map<int, Handle> &contexts = *new std::map<int, Handle>;
  const std::lock_guard lock(mutex);
  Handle &context = contexts[handle_];
  if (!context)
    driver().check(driver().cuDevicePrimaryCtxRetain(&context, handle_),
                   "cuDevicePrimaryCtxRetain");
  driver().check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
}

OnDevice::~OnDevice() {
  Handle context;
  driver().cuCtxPopCurrent_v2(&context);
}

void launch(const OnDevice &device, void *stream, const std::string &cubin, const char *kernel,
            const Grid &grid, const void *arguments) {
  static Kernels &kernels = *new Kernels;
  const Handle function = kernels.get(cubin, kernel, device.handle(), grid.shared_bytes);
  void *parameters[] = {const_cast<void *>(arguments)};
  driver().check(driver().cuLaunchKernel(function, grid.blocks, 1, 1, grid.threads, 1, 1,
                                         grid.shared_bytes, stream, parameters, nullptr),
                 (std::string("cuLaunchKernel of ") + kernel).c_str());
}

std::string why_not(const Tiles &tiles) {
  const uint64_t element = tiles.element == Element::float32 ? 4 : 2;
  if (tiles.rank < 1 || tiles.rank > Tiles::kMaxRank)
    return "a tensor of " + std::to_string(tiles.rank) + " dimensions, not 1 to 5";
  if (tiles.address % 16) return "an address that is not a multiple of 16 bytes";
  for (int i = 0; i < tiles.rank; ++i) {
    const std::string dimension = " in dimension " + std::to_string(i);
    if (tiles.sizes[i] == 0 || tiles.sizes[i] > uint64_t{1} << 32)
      return "a size of " + std::to_string(tiles.sizes[i]) + dimension + ", not 1 to 2^32";
    if (i > 0 && (tiles.strides[i] % 16 || tiles.strides[i] >= uint64_t{1} << 40))
      return "a stride of " + std::to_string(tiles.strides[i]) + " bytes" + dimension +
             ", not a multiple of 16 below 2^40";
    if (tiles.box[i] == 0 || tiles.box[i] > 256)
      return "a box of " + std::to_string(tiles.box[i]) + " elements" + dimension +
             ", not 1 to 256";
  }
  const uint64_t row = tiles.box[0] * element;
  if (row % 16) return "a box of " + std::to_string(row) + " bytes a row, not a multiple of 16";
  const uint64_t span = uint64_t{16} << static_cast<int>(tiles.swizzle);
  if (tiles.swizzle != Swizzle::none && row > span)
    return "a box of " + std::to_string(row) + " bytes a row, above the swizzle's " +
           std::to_string(span);
  return "";
}

TensorMap tensor_map(const OnDevice &, const Tiles &tiles) {
  const std::string reason = why_not(tiles);
  if (!reason.empty()) throw std::invalid_argument("the copy engine does not take " + reason);
  constexpr int kNoInterleave = 0, kPromoteTo256Bytes = 3, kFillWithZero = 0;
  const uint32_t every_element[Tiles::kMaxRank] = {1, 1, 1, 1, 1};
  // The driver writes to 64-byte boundaries only, and GCC does not lay every temporary that a result
  // of this function goes to on one.
  alignas(TensorMap) uint64_t encoded[16];
  driver().check(
      driver().cuTensorMapEncodeTiled(
          encoded, static_cast<int>(tiles.element), static_cast<uint32_t>(tiles.rank),
          reinterpret_cast<void *>(tiles.address), tiles.sizes, tiles.strides + 1, tiles.box,
          every_element, kNoInterleave, static_cast<int>(tiles.swizzle), kPromoteTo256Bytes,
          kFillWithZero),
      "cuTensorMapEncodeTiled");
  TensorMap map;
  std::copy_n(encoded, 16, map.opaque);
  return map;
}

} // namespace tw::cuda
