/* The kernels for x86-64 with AVX2: vectors of 8 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define WIDTH 8
#define KERNELS avx2_kernels
#define KERNELS_NAME "avx2"
#include "kernels.h"
#endif
