/* The layer operations for one instruction set. Before including, define WIDTH and LAYER_OPS; NATIVE_BFLOAT16 where the
 * set multiplies pairs of bfloat16. */
#include "layer_ops.h"
#include "vec.h"
#include "softmax.h"
#include "layer_op_rows.h"
#include "sampling_rows.h"
#if WIDTH == 16
#include "layer_products.h"
#endif

const layer_op_set LAYER_OPS = {
    .norm = norm_rows,
    .heads = heads_rows,
    .gate = gate_rows,
    .choose = choose_rows,
#if WIDTH == 16
    .columns = COLUMNS,
    .product = product_panels,
#ifdef NATIVE_BFLOAT16
    .products = 1 << FLOAT32 | 1 << BFLOAT16,
#else
    .products = 1 << FLOAT32,
#endif
#endif
};
