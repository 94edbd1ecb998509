/* All kernels for one instruction set. Before including, define WIDTH, KERNELS and KERNELS_NAME. */
#ifndef NATIVE_PAIRS
#define NATIVE_PAIRS 0 /* 1: the instruction set multiplies pairs of bfloat16 */
#endif

#include "kernel_set.h"
#include "vec.h"
#include "pairs.h"
#include "softmax.h"
#include "gemm.h"
#include "keys.h"
#include "weigh_pairs.h"
#include "prefill.h"
#include "decode.h"
#include "merge.h"
#include "read.h"

const kernel_set KERNELS = {
    .name = KERNELS_NAME,
    .prefill_scratch = prefill_scratch,
    .prefill = prefill,
    .decode_state = decode_state,
    .decode = decode,
    .decode_merge = decode_merge,
    .decode_write = decode_write,
    .merge = merge,
    .store = store_kv,
    .read = read_bytes,
};
