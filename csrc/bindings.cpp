// tw_kernels._C: the compiled half of tw_kernels, free of torch.
#include <pybind11/pybind11.h>

#include "cpu/bindings_cpu.h"
#include "cuda/bindings.h"
#include "trie/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tw_kernels.";
  tw::bind_trie(m);
  tw::bind_decode_plan(m);
  tw::bind_cpu(m);
  tw::cuda::bind_cuda(m);
}
