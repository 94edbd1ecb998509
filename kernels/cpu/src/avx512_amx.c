/* The kernels for x86-64 with AVX512, its products of bfloat16 pairs, and AMX's of bfloat16 tiles. */
#include "amx.h"
#if KNOWS_AMX
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#define WIDTH 16
#define NATIVE_PAIRS 1
#define NATIVE_TILES 1
#define KERNELS avx512_amx_kernels
#define KERNELS_NAME "avx512-amx"
#include "kernels.h"
#endif
