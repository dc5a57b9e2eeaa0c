// The CPU kernels' part of tw_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace tw {

void bind_cpu(pybind11::module_ &m);

} // namespace tw
