/* The layer operations for x86-64 with AVX512 and tiles of bfloat16. */
#include "amx.h"
#if KNOWS_AMX
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define WIDTH 16
#define NATIVE_BFLOAT16
#define AMX
#define LAYER_OPS amx_layer_ops
#include "layer_op_set.h"
#endif
