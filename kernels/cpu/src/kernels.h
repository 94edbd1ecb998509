/* All kernels for one instruction set. Before including, define WIDTH, KERNELS and KERNELS_NAME. */
#include "kernel_set.h"
#include "vec.h"
#include "softmax.h"
#include "gemm.h"
#include "keys.h"
#include "prefill.h"
#include "decode.h"
#include "merge.h"

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
};
