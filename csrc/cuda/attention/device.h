// What the trie attention kernels share: tiles of a head, the mask, a thread block. Device code.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/attention/trie_attention.h"
#include "cuda/hopper/barrier.h"
#include "cuda/hopper/copy.h"
#include "cuda/hopper/product.h"
#include "cuda/hopper/softmax.h"

namespace tw::cuda {

// Of tiles of 64 and 128 rows.
template <class Element, int D> constexpr bool tiles_are_the_copy_engines() {
  return layouts_are_the_copy_engines<Element, 64, D>() &&
         layouts_are_the_copy_engines<Element, 128, D>();
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Of a thread: setmaxnreg takes them from the copying warpgroup for the computing ones. Copies to a
// cluster take more.
constexpr int producer_registers(int sharers) { return sharers == 1 ? 24 : 40; }
constexpr int consumer_registers(int sharers) { return sharers == 1 ? 240 : 232; }
template <int kSharers>
constexpr bool kRegistersSuffice =
    producer_registers(kSharers) + kConsumers * consumer_registers(kSharers) <=
    (1 + kConsumers) * launch_registers(kThreads);
static_assert(kRegistersSuffice<1> && kRegistersSuffice<2>);

constexpr int kWarpArrivals = 4 * kConsumers; // that release a stage of a ring

// The own tiles, one for each warpgroup.
template <class Element, int D>
using OwnTiles = TileLayout<Element, kWarpgroupRows, D, kConsumers>;

// Copies rows [row, row + kRows) of one head, kRows * D * 2 bytes in all, towards the barrier.
template <int kRows, int D>
__device__ void load_tile(const TensorMap &map, uint64_t &barrier, Bits *tile, int head, int row) {
  for (int box = 0; box < D / kBoxColumns; ++box)
    load_box(map, barrier, tile + box * kRows * kBoxColumns, box * kBoxColumns, head, row);
}

// The same towards the barriers of all blocks of a cluster, each of which copies its share.
template <int kRows, int D, int kSharers>
__device__ void load_shared_tile(const TensorMap &map, uint64_t &barrier, Bits *tile, int head,
                                 int row) {
  constexpr int kBoxes = D / kBoxColumns, kShare = kBoxes / kSharers;
  static_assert(kBoxes % kSharers == 0);
  const int first = static_cast<int>(block_rank_in_cluster()) * kShare;
  for (int box = first; box < first + kShare; ++box)
    SM90_TMA_LOAD_MULTICAST_3D::copy(&map, &barrier, (1 << kSharers) - 1,
                                     static_cast<uint64_t>(Reuse::likely),
                                     tile + box * kRows * kBoxColumns, box * kBoxColumns, head, row);
}

// The scores of rows `row` and row + 8 that the trie hides become -inf.
template <class Scores>
__device__ void hide(Scores &s, int row, int first_column, const int32_t *ends) {
  CUTE_UNROLL
  for (int e = 0; e < size(s); ++e) {
    const int column = product_column(threadIdx.x, e);
    if (!visible(row + e / 2 % 2 * 8, first_column + column, ends[column])) s(e) = -INFINITY;
  }
}

// Stores a warpgroup's 64 x D tile through its own buffer in shared memory. The tile's rows beyond
// the tensor's end are cut off by the copy engine.
template <class Element, int D, class Values>
__device__ void store_tile(const TensorMap &map, Bits *buffer, const Values &values, int head,
                           int row) {
  const int barrier = threadIdx.x / 128;
  int thread = threadIdx.x % 128;
  asm volatile("" : "+r"(thread)); // or its addresses are kept, and spilled, throughout the tile
  Operand<Element, D> narrowed; // any fragment of that many elements
  narrow(values, narrowed);
  const auto copy =
      make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, SharedProduct<Element, D, 64>{});
  const auto slice = copy.get_thread_slice(thread);
  auto from = make_tensor(narrowed.data(), Fragment<D>{}.layout());
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Element *>(buffer)),
                          TileLayout<Element, kWarpgroupRows, D, 1>{});

  if (thread == 0) tma_store_wait<0>(); // the buffer's last store has read it
  cutlass::arch::NamedBarrier::sync(128, barrier);
  cute::copy(copy, slice.retile_S(from), slice.partition_D(tile(_, _, 0)));
  publish();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (thread != 0) return;
  for (int box = 0; box < D / kBoxColumns; ++box)
    SM90_TMA_STORE_3D::copy(&map, buffer + box * kWarpgroupRows * kBoxColumns, box * kBoxColumns,
                            head, row);
  tma_store_arrive();
}

// A thread block: one thread copies, two warpgroups compute. `init_barriers`, `produce` and
// `consume` are those of the kernel's Shared; that there is a template `consume` must be known here.
// Blocks of a cluster, if there are kSharers of them, reach into each other's shared memory: it must
// be there before the first of them begins and until the last has ended.
template <class Element> void consume();
template <class Element, class Shared, int kSharers = 1, class Arguments>
__device__ void run(const Arguments &a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto &shared = *reinterpret_cast<Shared *>(memory);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (kSharers > 1) {
    __syncwarp();
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<producer_registers(kSharers)>();
    if (threadIdx.x == 0) produce(a, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<consumer_registers(kSharers)>();
    consume<Element>(a, shared, warpgroup - 1);
    tma_store_wait<0>(); // shared memory must outlive the last store
  }
  if constexpr (kSharers > 1) {
    __syncwarp();
    cluster_sync();
  }
}

} // namespace tw::cuda
