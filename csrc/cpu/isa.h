// Which instruction set the CPU kernels run on, chosen at run time.
#pragma once

namespace tw {

enum class Isa { portable, avx2, avx512, avx512bf16 };

constexpr Isa kBestFirst[] = {Isa::avx512bf16, Isa::avx512, Isa::avx2, Isa::portable};

// The best set that this processor has, or the one that the environment variable TW_CPU names.
// Throws std::invalid_argument if TW_CPU names none, or one that this processor lacks. Reads the
// environment at every call, so that one process can run all of them.
Isa chosen_isa();

const char *name(Isa isa);
bool is_supported(Isa isa);

} // namespace tw
