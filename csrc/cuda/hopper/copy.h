// Bulk copies between device and shared memory (TMA). Device code.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/driver.h"

namespace tw::cuda {

// Copies a box of the tensor from these coordinates on, innermost first, towards the barrier.
template <class... Coordinates>
__device__ void load_box(const TensorMap &map, uint64_t &barrier, void *to, Coordinates... at) {
  cute::SM90_TMA_LOAD::copy(&map, &barrier,
                            static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                            at...);
}

// Copies kCount numbers of 4 bytes; `from` is 16-byte aligned.
template <int kCount>
__device__ void load_numbers(const void *from, uint64_t &barrier, void *to) {
  cute::SM90_BULK_COPY_G2S::copy(from, &barrier, to, kCount * 4);
}

} // namespace tw::cuda
