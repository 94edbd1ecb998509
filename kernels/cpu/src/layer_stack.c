/* Several decoder layers in one call, with attention over one pool: Python comes in where a layer needs more than that. */
#include "awake.h"
#include "layer_ops.h"

/* All of a layer before its attention, which finds its keys and values stored. */
static int32_t begin_layer(
    layer_context *context, kernel_context *kernels, stack_call *call, const stacked_layer *layer, const void *x
) {
    const int32_t status = layer_ops_begin(
        context, layer->layer, call->attention.rows, x, layer->cos, layer->sin, layer->rotary_dim, call->qkv
    );
    if (status != STATUS_OK) return status;
    call->attention.pool.layer_offset = call->store.pool.layer_offset = layer->offset;
    return kernels_store_kv(kernels, &call->store);
}

static int32_t attend(kernel_context *kernels, stack_call *call, const stacked_layer *layer) {
    const int64_t begun = now_ns();
    call->attention.window = layer->window;
    call->attention.scale = layer->scale;
    call->attention.softcap = layer->softcap;
    const int32_t status = kernels_micro_attention(kernels, &call->attention);
    call->attention_ns += now_ns() - begun;
    return status;
}

int32_t layer_ops_stack(layer_context *context, kernel_context *kernels, stack_call *call) {
    const size_t element = call->store.dtype == FLOAT32 ? 4 : 2, head = (size_t)call->store.pool.head_dim * element;
    const size_t x_bytes = (size_t)call->attention.rows * (size_t)call->layers[0].layer->hidden * element;
    const size_t lse_bytes = (size_t)call->attention.rows * (size_t)call->attention.q_heads * 4;
    const size_t stride = (x_bytes + 63) / 64 * 64;
    char *memory = layer_ops_scratch(context, FOR_STACK, 2 * stride + lse_bytes); /* the layers' outputs in turn */
    if (!memory) return STATUS_NO_MEMORY;
    call->attention.q = call->qkv;
    call->attention.out = call->attended;
    call->attention.lse = (float *)(memory + 2 * stride);
    call->store.k = (const char *)call->qkv + (size_t)call->attention.q_heads * head;
    call->store.v = (const char *)call->store.k + (size_t)call->store.pool.kv_heads * head;
    for (; call->at < call->count; call->at++) {
        const stacked_layer *layer = &call->layers[call->at];
        const void *x = call->at ? memory + (size_t)(call->at - 1) % 2 * stride : call->x;
        void *y = call->at + 1 == call->count ? call->y : memory + (size_t)call->at % 2 * stride;
        int32_t status = STATUS_OK;
        if (!call->has_left) {
            status = begin_layer(context, kernels, call, layer, x);
            if (status == STATUS_OK && layer->leaves_attention) {
                call->has_left = 1;
                return STATUS_OK;
            }
            if (status == STATUS_OK) status = attend(kernels, call, layer);
        }
        call->has_left = 0;
        if (status == STATUS_OK)
            status = layer_ops_finish(context, layer->layer, call->attention.rows, x, call->attended, y);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}
