#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace tw {

namespace {

constexpr size_t kKeep = size_t{64} << 20;

struct Free {
  void operator()(char *p) const { std::free(p); }
};

struct Block {
  std::unique_ptr<char, Free> data;
  size_t bytes = 0;
};

} // namespace

char *scratch(size_t bytes) {
  static thread_local Block block;
  if (bytes > block.bytes || block.bytes > kKeep) {
    bytes = (bytes + 63) / 64 * 64;
    block = {}; // first gives back, then asks: never two at once
    block.data.reset(static_cast<char *>(std::aligned_alloc(64, bytes)));
    if (!block.data) throw std::bad_alloc();
    block.bytes = bytes;
  }
  return block.data.get();
}

} // namespace tw
