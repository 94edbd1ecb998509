/* Several decoder layers in one call, with attention over one pool: for steps that need nothing else in between. */
#include "awake.h"
#include "layer_ops.h"

static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

int32_t layer_ops_stack(layer_context *context, kernel_context *kernels, stack_call *call) {
    const decoder_layer *first = call->layers[0].layer;
    const size_t element = first->dtype == FLOAT32 ? 4 : 2, rows = (size_t)call->attention.rows;
    const size_t x_bytes = lines(rows * (size_t)first->hidden * element);
    const size_t qkv_bytes = lines(rows * (size_t)first->qkv_columns * element);
    const size_t attended_bytes = lines(rows * (size_t)first->attended * element);
    char *memory = layer_ops_scratch(
        context, FOR_STACK, 2 * x_bytes + qkv_bytes + attended_bytes + rows * (size_t)call->attention.q_heads * 4
    );
    if (!memory) return STATUS_NO_MEMORY;
    char *qkv = memory + 2 * x_bytes;
    const size_t head = (size_t)call->attention.pool.head_dim * element;
    call->attention.q = qkv;
    call->attention.out = qkv + qkv_bytes;
    call->attention.lse = (float *)(qkv + qkv_bytes + attended_bytes);
    call->store.k = qkv + (size_t)call->attention.q_heads * head;
    call->store.v = (const char *)call->store.k + (size_t)call->store.pool.kv_heads * head;
    call->attention_ns = 0;
    const void *x = call->x;
    for (int32_t i = 0; i < call->count; i++) {
        const stacked_layer *layer = &call->layers[i];
        void *y = i + 1 == call->count ? call->y : memory + (size_t)(i % 2) * x_bytes;
        int32_t status = layer_ops_begin(
            context, layer->layer, call->attention.rows, x, layer->cos, layer->sin, layer->rotary_dim, qkv
        );
        if (status != STATUS_OK) return status;
        call->attention.pool.layer_offset = call->store.pool.layer_offset = layer->offset;
        call->attention.window = layer->window;
        call->attention.scale = layer->scale;
        call->attention.softcap = layer->softcap;
        status = kernels_store_kv(kernels, &call->store);
        const int64_t begun = now_ns();
        if (status == STATUS_OK) status = kernels_micro_attention(kernels, &call->attention);
        call->attention_ns += now_ns() - begun;
        if (status == STATUS_OK)
            status = layer_ops_finish(context, layer->layer, call->attention.rows, x, call->attention.out, y);
        if (status != STATUS_OK) return status;
        x = y;
    }
    return STATUS_OK;
}
