// Barriers in shared memory (PTX ISA, mbarrier). Device code.
#pragma once

#include <cstdint>

#include <cute/arch/util.hpp>
#include <cutlass/arch/barrier.h>

namespace tw::cuda {

__device__ inline uint32_t shared_address(const void *p) { return cute::cast_smem_ptr_to_uint(p); }

__device__ inline void init(uint64_t &barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(uint64_t &barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives, and lets the phase wait for that many copied bytes too.
__device__ inline void arrive_expecting(uint64_t &barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Returns once the phase of that parity is complete. No access of memory moves above it, as the
// compiler may move one above CUTLASS's wait.
__device__ inline void wait(uint64_t &barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete)
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(complete)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
}

// The same, its loop hidden from the compiler, which unrolls loops around it more readily.
__device__ inline void wait_hidden(uint64_t &barrier, uint32_t parity) {
  cutlass::arch::ClusterBarrier::wait(&barrier, parity);
  asm volatile("" ::: "memory");
}

// One arrival from each warp.
__device__ inline void arrive_of_warp(uint64_t &barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// The same, which counts for so many.
__device__ inline void arrive_of_warp(uint64_t &barrier, int arrivals) {
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(arrivals)
                 : "memory");
}

// The same, when all its lanes are here: for buffers that lanes read themselves.
__device__ inline void release(uint64_t &barrier) {
  __syncwarp();
  arrive_of_warp(barrier);
}

// The same at this barrier of every block of a cluster.
template <int kBlocks> __device__ void release_in_cluster(uint64_t &barrier) {
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  cutlass::arch::ClusterBarrier::arrive(&barrier, lane, lane < kBlocks);
}

// Ordinary writes to shared memory before it are seen by products and bulk copies after the next
// barrier of the threads (PTX ISA, async proxy).
__device__ inline void publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

} // namespace tw::cuda
