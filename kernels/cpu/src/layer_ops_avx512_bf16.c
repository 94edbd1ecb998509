/* The layer operations for x86-64 with AVX512 and its bfloat16 products. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define WIDTH 16
#define NATIVE_BFLOAT16
#define LAYER_OPS avx512_bf16_layer_ops
#include "layer_op_set.h"
#endif
