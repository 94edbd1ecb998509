/* The kernels for aarch64 with products of bfloat16 pairs: vectors of 4 floats. */
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+bf16")
#define WIDTH 4
#define NATIVE_PAIRS 1
#define KERNELS neon_bf16_kernels
#define KERNELS_NAME "neon-bf16"
#include "kernels.h"
#endif
