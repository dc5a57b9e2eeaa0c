// Four lanes: what every 64-bit x86 and ARM processor has.
#define TW_ISA portable
#define TW_LANES 4
#include "sampling_kernels.h"
