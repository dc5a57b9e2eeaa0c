#pragma once

#include <pybind11/pybind11.h>

namespace tw::cuda {

void bind_cuda(pybind11::module_ &m);

} // namespace tw::cuda
