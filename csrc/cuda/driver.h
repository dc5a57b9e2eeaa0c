// The CUDA driver, found at run time: nothing here needs CUDA's headers or links against it, so one
// build serves machines with and without a GPU.
#pragma once

#include <cstdint>
#include <string>

namespace tw::cuda {

// Empty if the driver is here and has a device, else the reason in one line.
const std::string &why_no_driver();

// While it lives, the primary context of a device, which PyTorch uses too, is this thread's.
// Throws std::runtime_error, as everything here does that the driver refuses: with the call, the
// name of the error and the driver's own text for it.
class OnDevice {
public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;

  int handle() const { return handle_; }

private:
  int handle_; // CUdevice
};

struct Grid {
  unsigned blocks, threads, shared_bytes; // shared: dynamic, up to what a block can have
};

// Starts a kernel of a cubin file on a stream (CUstream). `arguments` is the kernel's one parameter,
// a struct by value. A file is loaded once and kept.
void launch(const OnDevice &device, void *stream, const std::string &cubin, const char *kernel,
            const Grid &grid, const void *arguments);

enum class Element : int { float16 = 6, float32 = 7, bfloat16 = 9 };       // CUtensorMapDataType
enum class Swizzle : int { none = 0, bytes32 = 1, bytes64 = 2, bytes128 = 3 }; // CUtensorMapSwizzle

// A tensor in device memory that bulk copies bring to shared memory box by box; dimension 0 is the
// innermost and contiguous. What lies outside the tensor arrives as 0.
struct Tiles {
  static constexpr int kMaxRank = 5;
  Element element;
  Swizzle swizzle;
  int rank;
  uint64_t address;
  uint64_t sizes[kMaxRank];   // elements
  uint64_t strides[kMaxRank]; // bytes; that of dimension 0 is not read
  uint32_t box[kMaxRank];     // elements
};

// Empty if the copy engine takes these tiles (cuTensorMapEncodeTiled in the CUDA driver API), else
// the reason in one line.
std::string why_not(const Tiles &tiles);

// CUtensorMap: a kernel gets it inside its parameter struct.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Throws std::invalid_argument with why_not's reason.
TensorMap tensor_map(const OnDevice &device, const Tiles &tiles);

} // namespace tw::cuda
