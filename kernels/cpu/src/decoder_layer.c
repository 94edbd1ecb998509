/* The two halves of a decoder layer, each in one call. */
#include "layer_ops.h"

static size_t row_bytes(const decoder_layer *layer, int64_t rows, int32_t columns) {
    return ((size_t)rows * (size_t)columns * (layer->dtype == FLOAT32 ? 4 : 2) + 63) / 64 * 64;
}

/* out = scale * norm(x) + residual */
static void normalise(
    const layer_context *context, const decoder_layer *layer, norm_weights norm, int64_t rows, const void *x,
    const void *residual, float scale, void *out
) {
    norm_call call = {.x = x, .residual = residual, .weight = norm.weight, .out = out};
    call.rows = rows;
    call.dim = layer->hidden;
    call.dtype = layer->dtype;
    call.eps = norm.eps;
    call.offset = norm.offset;
    call.scale = scale;
    layer_ops_norm(context, &call);
}

static product_call product_of(
    const decoder_layer *layer, product_weights weights, int64_t rows, const void *x, int32_t in, void *out,
    int32_t columns
) {
    return (product_call){.x = x, .weight = weights.weight, .bias = weights.bias, .out = out, .rows = rows, .in = in,
                          .columns = columns, .dtype = layer->dtype, .activation = -1, .scale = 1};
}

int32_t layer_ops_begin(
    layer_context *context, const decoder_layer *layer, int64_t rows, const void *x, const void *cos, const void *sin,
    int32_t rotary_dim, void *qkv
) {
    if (layer->before_attention.weight) {
        void *h = layer_ops_scratch(context, FOR_HALF_LAYER, row_bytes(layer, rows, layer->hidden));
        if (!h) return STATUS_NO_MEMORY;
        normalise(context, layer, layer->before_attention, rows, x, NULL, 1, h);
        x = h;
    }
    product_call product = product_of(layer, layer->qkv, rows, x, layer->hidden, qkv, layer->qkv_columns);
    const int32_t status = layer_ops_product(context, &product);
    if (status != STATUS_OK || !layer->heads.heads) return status;
    heads_call heads = layer->heads;
    heads.x = qkv;
    heads.cos = cos;
    heads.sin = sin;
    heads.rotary_dim = rotary_dim;
    heads.stride = layer->qkv_columns;
    heads.rows = rows;
    layer_ops_heads(context, &heads);
    return STATUS_OK;
}

/* y = x + multiplier * norm(product of h), the norm only where there is one; y may be x. h is overwritten then. */
static int32_t add_product(
    layer_context *context, const decoder_layer *layer, product_weights weights, norm_weights norm, int64_t rows,
    const void *h, int32_t in, const void *x, void *product, void *y
) {
    product_call call = product_of(layer, weights, rows, h, in, norm.weight ? product : y, layer->hidden);
    if (!norm.weight) {
        call.residual = x;
        call.scale = layer->multiplier;
    }
    const int32_t status = layer_ops_product(context, &call);
    if (status == STATUS_OK && norm.weight) normalise(context, layer, norm, rows, product, x, layer->multiplier, y);
    return status;
}

int32_t layer_ops_finish(
    layer_context *context, const decoder_layer *layer, int64_t rows, const void *x, const void *attended, void *y
) {
    const size_t hidden_bytes = row_bytes(layer, rows, layer->hidden);
    char *h = layer_ops_scratch(context, FOR_HALF_LAYER, hidden_bytes + row_bytes(layer, rows, layer->inner));
    if (!h) return STATUS_NO_MEMORY;
    char *inner = h + hidden_bytes;
    int32_t status =
        add_product(context, layer, layer->output, layer->behind_attention, rows, attended, layer->attended, x, h, y);
    if (status != STATUS_OK) return status;
    const void *input = y;
    if (layer->before_mlp.weight) {
        normalise(context, layer, layer->before_mlp, rows, y, NULL, 1, h);
        input = h;
    }
    product_call gated = product_of(layer, layer->gate_up, rows, input, layer->hidden, inner, layer->inner);
    gated.activation = layer->activation;
    status = layer_ops_product(context, &gated);
    if (status != STATUS_OK) return status;
    return add_product(context, layer, layer->down, layer->behind_mlp, rows, inner, layer->inner, y, h, y);
}
