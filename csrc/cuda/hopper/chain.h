// Launches that begin before the one before them has ended (PTX ISA, griddepcontrol; Grid::early in
// cuda/driver.h). Device code.
#pragma once

namespace tw::cuda {

// The next launch may begin once every block has been here or ended.
__device__ inline void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Returns once the launch before has ended and all its writes can be seen; what came before that one
// can be seen without it.
__device__ inline void wait_for_last_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

} // namespace tw::cuda
