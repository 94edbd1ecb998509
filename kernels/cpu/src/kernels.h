/* All kernels for one instruction set. Before including, define WIDTH, KERNELS and KERNELS_NAME. */
#ifndef NATIVE_PAIRS
#define NATIVE_PAIRS 0 /* 1: the instruction set multiplies pairs of bfloat16 */
#endif
#ifndef NATIVE_TILES
#define NATIVE_TILES 0 /* 1: it also multiplies tiles of bfloat16, with AMX */
#endif
/* Effective rows of a prefill task. Queries and accumulators stay in L2; where products are faster, more rows share the
 * packing of keys. */
#define PREFILL_ROWS (NATIVE_PAIRS ? 384 : 192)

#include "kernel_set.h"
#include "vec.h"
#include "pairs.h"
#include "softmax.h"
#include "gemm.h"
#include "keys.h"
#include "weigh_pairs.h"
#include "prefill.h"
#if NATIVE_TILES
#include "tiles.h"
#include "tiled_keys.h"
#include "prefill_amx.h"
#endif
#include "decode.h"
#include "merge.h"
#include "read.h"

const kernel_set KERNELS = {
    .name = KERNELS_NAME,
    .prefill_rows = PREFILL_ROWS,
#if NATIVE_TILES
    .prefill_scratch = prefill_amx_scratch,
    .prefill = prefill_amx,
#else
    .prefill_scratch = prefill_scratch,
    .prefill = prefill,
#endif
    .decode_state = decode_state,
    .decode = decode,
    .decode_merge = decode_merge,
    .decode_write = decode_write,
    .merge = merge,
    .store = store_kv,
    .read = read_bytes,
};
