#pragma once

#include <pybind11/pybind11.h>

namespace tw::cuda {

void bind_attention(pybind11::module_ &m);

} // namespace tw::cuda
