// A parallel loop on the threads that torch already keeps.
#pragma once

#include <cstdint>

namespace tw {

// Calls task(context, index, worker) once for every index in [0, count), in any order, on at most
// `threads` threads, the calling one among them; worker, in [0, threads), tells the threads apart.
// The task must not throw. With one thread or one index nothing leaves the calling thread.
using Task = void (*)(const void *context, int64_t index, int worker);
void parallel_for(int64_t count, int threads, Task task, const void *context);

} // namespace tw
