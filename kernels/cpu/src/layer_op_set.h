/* The layer operations for one instruction set. Before including, define WIDTH and LAYER_OPS; NATIVE_BFLOAT16 where the
 * set multiplies pairs of bfloat16, and AMX where it multiplies tiles of them. */
#include "layer_ops.h"
#include "vec.h"
#include "softmax.h"
#include "layer_op_rows.h"
#include "sampling_rows.h"
#if WIDTH >= 8
#include "product_rows.h"
#include "layer_products.h"
#endif
#ifdef AMX
#include "tiles.h"
#include "layer_products_amx.h"
#endif

const layer_op_set LAYER_OPS = {
    .norm = norm_rows,
    .heads = heads_rows,
    .gate = gate_rows,
    .choose = choose_rows,
#if WIDTH >= 8
    .products[FLOAT32] = {COLUMNS, product_floats},
#endif
#ifdef AMX
    .products[BFLOAT16] = {AMX_COLUMNS, product_amx, amx_rows_bytes, arrange_amx_rows},
#elif defined(NATIVE_BFLOAT16)
    .products[BFLOAT16] = {COLUMNS, product_pairs},
#elif WIDTH == 8
    .products[BFLOAT16] = {COLUMNS, product_pairs, widened_bytes, widen_rows},
#endif
};
