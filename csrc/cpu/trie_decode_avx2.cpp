#if defined(__x86_64__)
#define TW_ISA avx2
#define TW_LANES 8
#define TW_MICRO_ROWS 6 // by 2 vectors: 12 of 16 registers hold sums
#include "trie_decode_kernels.h"
#endif
