/* The kernels for x86-64 with AVX512 and its products of bfloat16 pairs: vectors of 16 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define WIDTH 16
#define NATIVE_PAIRS 1
#define KERNELS avx512_bf16_kernels
#define KERNELS_NAME "avx512-bf16"
#include "kernels.h"
#endif
