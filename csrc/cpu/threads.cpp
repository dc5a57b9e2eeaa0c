#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace tw {

namespace {

struct Loop {
  Task task;
  const void *context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void work(void *data) {
  Loop &loop = *static_cast<Loop *>(data);
  const int worker = loop.workers++;
  for (int64_t i; (i = loop.next++) < loop.count;) loop.task(loop.context, i, worker);
}

// The entry that GNU's and LLVM's OpenMP runtimes share. It is looked up in the process instead of
// linked: the runtime must be the very one that torch loaded, whatever that file is called. Its
// idle threads spin for milliseconds after each of torch's loops, and a second pool would have to
// share the cores with them.
using GompParallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

GompParallel torchs_pool() {
  static const auto entry =
      reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

} // namespace

void parallel_for(int64_t count, int threads, Task task, const void *context) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  Loop loop{task, context, count};
  if (const GompParallel parallel = torchs_pool()) {
    parallel(work, &loop, threads, 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(work, &loop);
  work(&loop);
  for (std::thread &member : team) member.join();
}

} // namespace tw
