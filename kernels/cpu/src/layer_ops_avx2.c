/* The layer operations for x86-64 with AVX2: vectors of 8 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define WIDTH 8
#define LAYER_OPS avx2_layer_ops
#include "layer_op_set.h"
#endif
