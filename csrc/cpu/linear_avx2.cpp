#if defined(__x86_64__)
#define TW_ISA avx2
#define TW_LANES 8
#include "linear_kernels.h"
#endif
