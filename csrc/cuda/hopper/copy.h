// Copies between device and shared memory: in bulk (TMA), and 16 bytes a thread. Device code.
#pragma once

#include <cstdint>

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/driver.h"

namespace tw::cuda {

// Whether L2 should keep what was copied.
enum class Reuse : uint64_t {
  likely = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
  none = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
};

// Copies a box of the tensor from these coordinates on, innermost first, towards the barrier.
template <class... Coordinates>
__device__ void load_box(const TensorMap &map, uint64_t &barrier, Reuse reuse, void *to,
                         Coordinates... at) {
  cute::SM90_TMA_LOAD::copy(&map, &barrier, static_cast<uint64_t>(reuse), to, at...);
}
template <class... Coordinates>
__device__ void load_box(const TensorMap &map, uint64_t &barrier, void *to, Coordinates... at) {
  load_box(map, barrier, Reuse::likely, to, at...);
}

// Copies kCount numbers of 4 bytes; `from` is 16-byte aligned.
template <int kCount>
__device__ void load_numbers(const void *from, uint64_t &barrier, void *to) {
  cute::SM90_BULK_COPY_G2S::copy(from, &barrier, to, kCount * 4);
}

// Starts to copy 16 bytes of this thread's.
__device__ inline void start_copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cute::cast_smem_ptr_to_uint(to)),
               "l"(from)
               : "memory");
}

// Returns once those that this thread has started have arrived.
__device__ inline void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

} // namespace tw::cuda
