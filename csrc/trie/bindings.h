#pragma once

#include <pybind11/pybind11.h>

namespace tw {

void bind_trie(pybind11::module_ &m);
void bind_decode_plan(pybind11::module_ &m);

} // namespace tw
