/* The layer operations for x86-64 with AVX512: vectors of 16 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define WIDTH 16
#define LAYER_OPS avx512_layer_ops
#include "layer_op_set.h"
#endif
