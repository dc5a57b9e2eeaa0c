#if defined(__x86_64__)
#define TW_ISA avx2
#define TW_LANES 8
#include "sampling_kernels.h"
#endif
