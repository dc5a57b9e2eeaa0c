#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tw {

const char *name(Isa isa) {
  switch (isa) {
  case Isa::avx512bf16: return "avx512bf16";
  case Isa::avx512: return "avx512";
  case Isa::avx2: return "avx2";
  default: return "portable";
  }
}

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  // The subsets are those that CMakeLists.txt compiles the kernels of each set for. GCC's and
  // Clang's test also asks whether the operating system saves the wide registers.
  switch (isa) {
  case Isa::avx512bf16: return is_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  case Isa::avx512:
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  default: return true;
  }
#else
  return isa == Isa::portable;
#endif
}

Isa chosen_isa() {
  const char *wanted = std::getenv("TW_CPU");
  const bool free_choice = !wanted || !*wanted;
  for (const Isa isa : kBestFirst) {
    if (!free_choice && std::string(wanted) != name(isa)) continue;
    if (is_supported(isa)) return isa;
    if (!free_choice)
      throw std::invalid_argument(std::string("TW_CPU=") + wanted +
                                  ": this processor does not have it; unset TW_CPU");
  }
  throw std::invalid_argument(std::string("TW_CPU=") + wanted +
                              ": not one of avx512bf16, avx512, avx2, portable");
}

} // namespace tw
