// Working memory that outlives a call, so that small calls do not pay for fresh pages.
#pragma once

#include <cstddef>

namespace tw {

// At least `bytes` bytes aligned to 64, uninitialised. One block per calling thread: it stays valid
// until that thread asks again. A block over 64 MiB is given back at the next call.
// Throws std::bad_alloc.
char *scratch(size_t bytes);

} // namespace tw
