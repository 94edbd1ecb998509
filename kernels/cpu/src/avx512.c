/* The kernels for x86-64 with AVX512: vectors of 16 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define WIDTH 16
#define KERNELS avx512_kernels
#define KERNELS_NAME "avx512"
#include "kernels.h"
#endif
