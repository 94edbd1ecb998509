/* What a decoder layer computes beside attention; kernels/layer_ops.py says what it means.
 *
 * kernels/cpu/layer_ops.py mirrors the structures with ctypes. All elements are of one dtype, FLOAT32 or BFLOAT16, rows
 * are contiguous unless a stride is given, and sums run in float32.
 *
 * Weights of a product are packed in panels of `columns` output features (the last one filled up with zeros), so that a
 * panel is read once, from its beginning to its end:
 *   FLOAT32   [panels, in, columns]
 *   BFLOAT16  [panels, in / 2, columns, 2]     in is even
 */
#ifndef INFINITE_LLM_LAYER_OPS_H
#define INFINITE_LLM_LAYER_OPS_H

#include <stddef.h>

#include "abi.h"

enum rotation { ROTATE_HALVES = 0, ROTATE_PAIRS = 1, ROTATE_PAIRS_SHORT = 2 };
enum activation { SILU = 0, GELU_TANH = 1 };

/* out = scale * norm(x) + residual; with a delta first sum = x + delta, and sum takes the place of x. All [rows, dim];
 * delta and residual may be NULL, sum may be x or delta itself, out may be x. */
typedef struct {
    const void *x, *delta, *weight, *residual; /* weight: [dim] */
    void *sum, *out;
    int64_t rows;
    int32_t dim, dtype;
    float eps, offset, scale; /* offset: added to the weight */
} norm_call;

/* Normalises each head, then rotates it, in place: x [rows, heads, head_dim], rows stride apart. */
typedef struct {
    void *x;
    const void *weight;    /* [heads, head_dim]; NULL: no norm */
    const void *cos, *sin; /* [rows, rotary_dim]; NULL: no rotation */
    int64_t stride, rows;
    int32_t heads, head_dim, rotary_dim, rotation, dtype;
    float eps, offset;
} heads_call;

/* out = activation(gate) * up, all [rows, dim]; rows of gate and up are stride apart. */
typedef struct {
    const void *gate, *up;
    void *out;
    int64_t stride, rows;
    int32_t dim, activation, dtype;
} gate_call;

/* out = scale * (x weight^T + bias) + residual; x [rows, in], out and residual [rows, columns].
 * A gated product has 2 * out output features, those of the gate first: out = activation(gate) * up. */
typedef struct {
    const void *x, *weight, *bias, *residual; /* bias, residual may be NULL */
    void *out;
    int64_t rows;
    int32_t in, columns, dtype;
    int32_t activation; /* of a gated product; otherwise -1 */
    float scale;
} product_call;

/* out [rows, in] = rows `indices` of a product's weight [columns, in]. */
typedef struct {
    const void *weight;
    const int64_t *indices; /* [rows] */
    void *out;
    int64_t rows;
    int32_t in, columns, dtype;
} unpack_call;

/* Chooses a token from each row of logits [rows, dim]: the most probable one, or, with a scale, the first one at which
 * the cumulative weight exceeds uniform[row] of the whole; weights are 2 ** (scale[row] * logit). */
typedef struct {
    const void *logits;
    const float *scale; /* [rows], finite; may be NULL */
    const double *uniform; /* [rows], in [0, 1) */
    int64_t *tokens;
    int64_t rows, dim;
    int32_t dtype;
} choice_call;

/* One norm; weight NULL: none. */
typedef struct {
    const void *weight; /* [dim] */
    float eps, offset;
} norm_weights;

/* One product; bias may be NULL. */
typedef struct {
    const void *weight, *bias;
} product_weights;

/* A decoder layer: x += multiplier * norm(attention(norm(x))), then x += multiplier * norm(mlp(norm(x))), where
 * mlp(h) = down (activation(gate h) * up h). Products and norms as above; gate_up has 2 * inner outputs. */
typedef struct {
    norm_weights before_attention, behind_attention, before_mlp, behind_mlp;
    product_weights qkv, output, gate_up, down;
    heads_call heads; /* of q and k; heads 0: they stay as they are. x, cos, sin and sizes of the rows are not used. */
    int32_t hidden, qkv_columns, attended, inner, activation, dtype;
    float multiplier;
} decoder_layer;

/* Products of one dtype. run: panels first .. end of the output. Where there is an arrange, it has put the input in an
 * order of its own, in rows_bytes of memory, and x is that. */
typedef struct {
    int32_t columns; /* of a panel; 0: there are none */
    void (*run)(const product_call *call, int64_t first, int64_t end);
    size_t (*rows_bytes)(const product_call *call);
    void (*arrange)(const product_call *call, void *to);
} products;

/* One instruction set. Rows first .. end. */
typedef struct {
    products products[BFLOAT16 + 1]; /* by dtype */
    void (*norm)(const norm_call *call, int64_t first, int64_t end);
    void (*heads)(const heads_call *call, int64_t first, int64_t end);
    void (*gate)(const gate_call *call, int64_t first, int64_t end);
    void (*choose)(const choice_call *call, int64_t first, int64_t end);
} layer_op_set;

extern const layer_op_set baseline_layer_ops, avx2_layer_ops, avx512_layer_ops, avx512_bf16_layer_ops, amx_layer_ops;

typedef struct layer_context layer_context;

/* A context serves one caller at a time. NULL: no memory or no threads. */
EXPORT layer_context *layer_ops_open(int32_t num_threads);
EXPORT void layer_ops_close(layer_context *context);
/* Columns of a panel; 0 where there are no products of this dtype. */
EXPORT int32_t layer_ops_columns(const layer_context *context, int32_t dtype);

EXPORT void layer_ops_norm(const layer_context *context, const norm_call *call);
EXPORT void layer_ops_heads(const layer_context *context, const heads_call *call);
EXPORT void layer_ops_gate(const layer_context *context, const gate_call *call);
EXPORT int32_t layer_ops_product(layer_context *context, const product_call *call);

/* In the calling thread. STATUS_BAD_INDEX: a row that the weight does not have. */
EXPORT int32_t layer_ops_unpack(const layer_context *context, const unpack_call *call);
/* In the calling thread, without a context. */
EXPORT void choose_tokens(const choice_call *call);

/* Memory of the context for this many bytes, until the next call for the same use; NULL: there is none. */
enum scratch_use { FOR_HALF_LAYER, FOR_PRODUCT, FOR_STACK, SCRATCH_USES };
void *layer_ops_scratch(layer_context *context, enum scratch_use use, size_t size);

/* The two halves of a layer, before and behind attention. x, y [rows, hidden]; qkv [rows, qkv_columns]; attended
 * [rows, attended]; cos, sin [rows, rotary_dim] or NULL. y may not be x. */
EXPORT int32_t layer_ops_begin(
    layer_context *context, const decoder_layer *layer, int64_t rows, const void *x, const void *cos, const void *sin,
    int32_t rotary_dim, void *qkv
);
EXPORT int32_t layer_ops_finish(
    layer_context *context, const decoder_layer *layer, int64_t rows, const void *x, const void *attended, void *y
);

/* One of several layers. */
typedef struct {
    const decoder_layer *layer;
    const void *cos, *sin; /* as above */
    int64_t offset;        /* of the layer in a block */
    int32_t number, rotary_dim, window;
    float scale, softcap;
    int32_t leaves_attention; /* to the caller; keys and values are stored */
} stacked_layer;

/* Layers one behind the other, with attention over one pool: x, y [rows, hidden]; qkv [rows, q, k and v] and attended
 * [rows, q_heads, head_dim] are those of the layer in progress. What a layer brings is filled into attention, store and
 * what is asked of other daemons: of each one in asked that any row of the layer sees keys of. */
typedef struct {
    const stacked_layer *layers;
    const void *x;
    void *y, *qkv, *attended;
    float *merged, *lse; /* [rows, q_heads, head_dim] and [rows, q_heads]: what answers are merged into */
    asking *const *asked;
    attention_call attention;
    store_call store;
    int64_t attention_ns, local_ns, asking_ns; /* what attention has taken; the own pool's part; sending queries */
    int32_t count;
    int32_t at;       /* the layer in progress; 0 at first */
    int32_t has_left; /* it has left its attention to the caller; 0 at first */
    int32_t asked_count, may_ask; /* not may_ask: layers that would ask leave their attention */
    /* Of a layer that has left its attention after it began to ask: how many of asked it is done with sending to and
     * taking from, and whether the local part is in merged and lse. */
    int32_t sent, taken, has_local;
} stack_call;

/* Goes on up to the end (at is count then), or to the next layer that leaves its attention to the caller: as it was told
 * to, or because a query could not be sent, or because an answer has not come within spin_ns. */
EXPORT int32_t layer_ops_stack(layer_context *context, kernel_context *kernels, stack_call *call);

#endif
