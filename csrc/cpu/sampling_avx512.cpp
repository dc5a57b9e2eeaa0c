#if defined(__x86_64__)
#define TW_ISA avx512
#define TW_LANES 16
#include "sampling_kernels.h"
#endif
