// The CUDA driver, found at run time: nothing here needs CUDA's headers or links against it, so one
// build serves machines with and without a GPU. What the driver refuses is thrown as
// std::runtime_error, with the call, the name of the error and the driver's own text for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tw::cuda {

// Empty if the driver is here and has a device, else the reason in one line.
const std::string &why_no_driver();

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0; // dynamic, up to what a block can have
  // Blocks may begin once those of the launch before, a kernel of ours too, let them; they wait for
  // its results themselves (hopper/chain.h).
  bool early = false;
};

enum class Element : int { float16 = 6, float32 = 7, bfloat16 = 9 }; // CUtensorMapDataType

// A tensor of 2-byte elements in device memory that bulk copies bring to shared memory box by box,
// in the 128-byte swizzle. What lies outside the tensor arrives as 0 and is not stored.
struct Tiles {
  struct Dimension {
    int64_t size, stride; // in elements
    int box;
  };
  Element element;
  const void *data;
  std::vector<Dimension> dimensions; // innermost first, which is contiguous
};

// Empty if the copy engine takes these tiles (cuTensorMapEncodeTiled in the CUDA driver API), else
// the reason in one line.
std::string why_not(const Tiles &tiles);

// CUtensorMap: a kernel gets it inside its parameter struct.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Starts the kernels of a cubin file on a stream (CUstream). A file is loaded once and kept. While
// it lives, the primary context of the device, which PyTorch uses too, is this thread's.
class Launcher {
public:
  Launcher(int ordinal, void *stream, std::string cubin);
  ~Launcher();
  Launcher(const Launcher &) = delete;
  Launcher &operator=(const Launcher &) = delete;

  // Throws std::invalid_argument with why_not's reason.
  TensorMap tensor_map(const Tiles &tiles) const;
  // `arguments`: the kernel's one parameter, a struct by value.
  void start(const std::string &kernel, const Grid &grid, const void *arguments) const;

private:
  int device_; // CUdevice
  void *stream_;
  std::string cubin_;
};

} // namespace tw::cuda
