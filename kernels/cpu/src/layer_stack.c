/* Several decoder layers in one call, with attention over one pool and over what other daemons answer. Python comes in
 * where that takes more than to send queries and to take answers that come in a moment. */
#include "awake.h"
#include "layer_ops.h"
#define WIDTH 4
#include "vec.h"

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

static int32_t attend(kernel_context *kernels, stack_call *call, const stacked_layer *layer, void *out, int dtype) {
    const int64_t begun = now_ns();
    call->attention.out = out;
    call->attention.out_dtype = dtype;
    call->attention.window = layer->window;
    call->attention.scale = layer->scale;
    call->attention.softcap = layer->softcap;
    const int32_t status = kernels_micro_attention(kernels, &call->attention);
    call->local_ns += now_ns() - begun;
    return status;
}

static int sees(const stacked_layer *layer, const asking *a) {
    return layer->window <= 0 || layer->window > a->distance;
}

static int asks(const stack_call *call, const stacked_layer *layer) {
    for (int i = 0; i < call->asked_count; i++)
        if (sees(layer, call->asked[i])) return 1;
    return 0;
}

static int send_queries(stack_call *call, const stacked_layer *layer) {
    for (; call->sent < call->asked_count; call->sent++) {
        asking *a = call->asked[call->sent];
        if (!sees(layer, a)) continue;
        a->layer = layer->number;
        a->window = layer->window;
        a->scale = layer->scale;
        a->softcap = layer->softcap;
        a->q = call->qkv;
        a->out = call->merged;
        a->lse = call->lse;
        a->sent_at_ns = now_ns();
        a->sequence++;
        if (!ask(a)) {
            a->sequence--;
            return 0;
        }
        a->sums.asks++;
        a->sums.sent_bytes += a->query_bytes;
    }
    return 1;
}

static int take_answers(stack_call *call, const stacked_layer *layer) {
    for (; call->taken < call->asked_count; call->taken++) {
        asking *a = call->asked[call->taken];
        if (!sees(layer, a)) continue;
        const int64_t begun = now_ns();
        a->ending = take_answer(a);
        if (a->ending != WATCH_TAKEN) return 0;
        a->sums.answers++;
        a->sums.lates += a->late;
        a->sums.received_bytes += a->answer_bytes;
        a->sums.answers_ns += a->taken_at_ns - a->sent_at_ns;
        a->sums.merges_ns += a->merged_ns;
        a->sums.waits_ns += a->taken_at_ns - begun;
        a->sums.answered = a->sequence;
    }
    return 1;
}

/* A layer's attention with what other daemons have of it, as far as that goes: the rest is left. */
static int32_t attend_with_others(kernel_context *kernels, stack_call *call, const stacked_layer *layer) {
    const int64_t begun = now_ns();
    call->has_left = !send_queries(call, layer);
    call->asking_ns += now_ns() - begun;
    if (call->has_left) return STATUS_OK;
    const int32_t status = attend(kernels, call, layer, call->merged, FLOAT32);
    if (status != STATUS_OK) return status;
    call->has_local = 1;
    call->has_left = !take_answers(call, layer);
    if (!call->has_left) {
        const int numbers = (int)call->attention.rows * call->attention.q_heads * call->attention.pool.head_dim;
        store_as(call->attended, 0, call->merged, numbers, call->store.dtype);
    }
    return STATUS_OK;
}

static int32_t attend_layer(kernel_context *kernels, stack_call *call, const stacked_layer *layer) {
    const int others = asks(call, layer);
    call->sent = call->taken = call->has_local = 0;
    call->has_left = layer->leaves_attention || (others && !call->may_ask);
    if (call->has_left) return STATUS_OK;
    const int64_t begun = now_ns();
    const int32_t status = others ? attend_with_others(kernels, call, layer)
                                  : attend(kernels, call, layer, call->attended, call->store.dtype);
    call->attention_ns += now_ns() - begun;
    return status;
}

int32_t layer_ops_stack(layer_context *context, kernel_context *kernels, stack_call *call) {
    const size_t element = call->store.dtype == FLOAT32 ? 4 : 2, head = (size_t)call->store.pool.head_dim * element;
    const size_t x_bytes = (size_t)call->attention.rows * (size_t)call->layers[0].layer->hidden * element;
    const size_t stride = (x_bytes + 63) / 64 * 64;
    char *memory = layer_ops_scratch(context, FOR_STACK, 2 * stride); /* the layers' outputs in turn */
    if (!memory) return STATUS_NO_MEMORY;
    call->attention.q = call->qkv;
    call->attention.lse = call->lse;
    call->store.k = (const char *)call->qkv + (size_t)call->attention.q_heads * head;
    call->store.v = (const char *)call->store.k + (size_t)call->store.pool.kv_heads * head;
    for (; call->at < call->count; call->at++) {
        const stacked_layer *layer = &call->layers[call->at];
        const void *x = call->at ? memory + (size_t)(call->at - 1) % 2 * stride : call->x;
        void *y = call->at + 1 == call->count ? call->y : memory + (size_t)call->at % 2 * stride;
        int32_t status = STATUS_OK;
        if (!call->has_left) {
            status = begin_layer(context, kernels, call, layer, x);
            if (status == STATUS_OK) status = attend_layer(kernels, call, layer);
            if (status != STATUS_OK || call->has_left) return status;
        }
        call->has_left = 0;
        status = layer_ops_finish(context, layer->layer, call->attention.rows, x, call->attended, y);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}
