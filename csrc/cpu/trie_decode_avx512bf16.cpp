#if defined(__x86_64__)
#define TW_ISA avx512bf16
#define TW_LANES 16
#define TW_MICRO_ROWS 8 // by 2 vectors: 16 of 32 registers hold sums
#include "trie_decode_kernels.h"
#endif
