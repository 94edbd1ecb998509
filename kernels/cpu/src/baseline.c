/* The kernels for any processor: vectors of 4 floats (SSE2 on x86-64, NEON on aarch64). */
#define WIDTH 4
#define KERNELS baseline_kernels
#define KERNELS_NAME "baseline"
#include "kernels.h"
