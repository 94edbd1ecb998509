/* Asks a daemon for attention without Python between the layers: sends a QUERY, and merges the PARTIAL that comes back
 * where it lies. Whatever else comes is left to the caller. */
#include "awake.h"
#include "channel.h"
#include "wire.h"

static uint64_t out_bytes(const asking *a) { return vectors_bytes(a->count, a->q_heads, a->head_dim, a->out_dtype); }

int32_t ask(asking *a) {
    const uint64_t row = vectors_bytes(1, a->q_heads, a->head_dim, a->dtype);
    const uint64_t size = sizeof(wire_header) + (uint64_t)a->count * row;
    uint64_t end = 0;
    for (int64_t i = 0; a->rows && i < a->count; i++)
        if (a->rows[i] < 0 || a->rows[i] >= a->batch_rows) return 0;
    char *query = channel_reserve(&a->channel, size, &end);
    if (!query) return 0;
    const wire_header header = {
        .version = WIRE_VERSION,
        .kind = WIRE_QUERY,
        .layer = (uint16_t)a->layer,
        .rows = (uint32_t)a->count,
        .sequence = a->sequence,
        .step = a->step,
        .q_heads = (uint16_t)a->q_heads,
        .head_dim = (uint16_t)a->head_dim,
        .dtype = (uint8_t)a->dtype,
        .out_dtype = (uint8_t)a->out_dtype,
        .scale = a->scale,
        .softcap = a->softcap,
        .window = (uint32_t)a->window,
    };
    memcpy(query, &header, sizeof header);
    char *to = query + sizeof header;
    for (int64_t i = 0; i < a->count; i++, to += row)
        memcpy(to, (const char *)a->q + (uint64_t)(a->rows ? a->rows[i] : i) * a->q_stride_bytes, row);
    channel_publish(&a->channel, query, size, end);
    a->query_bytes = (int64_t)size;
    return 1;
}

/* Merges a message if it is the answer that is waited for, in every field. */
static int take(asking *a, const ring_message *message) {
    wire_header header;
    const uint64_t size = sizeof header + out_bytes(a) + vectors_bytes(a->count, a->q_heads, 1, FLOAT32);
    if (message->size != size) return 0;
    memcpy(&header, message->data, sizeof header);
    if (header.version != WIRE_VERSION || header.kind != WIRE_PARTIAL || header.sequence != a->sequence ||
        header.rows != a->count || header.dtype != a->out_dtype)
        return 0;
    const merge_call merge = {
        .out = a->out,
        .lse = a->lse,
        .part_out = message->data + sizeof header,
        .part_lse = (const float *)(message->data + sizeof header + out_bytes(a)),
        .rows = a->rows,
        .out_rows = a->batch_rows,
        .count = a->count,
        .heads = a->q_heads,
        .head_dim = a->head_dim,
        .part_dtype = a->out_dtype,
    };
    a->taken_at_ns = now_ns();
    if (kernels_merge_partials(a->kernels, &merge) != STATUS_OK) return 0;
    channel_release(&a->channel, message);
    a->merged_ns = now_ns() - a->taken_at_ns;
    a->answer_bytes = (int64_t)size;
    return 1;
}

int32_t take_answer(asking *a) {
    ring_message message = {0};
    enum ring_state state = channel_peek(&a->channel, &message);
    a->late = state == RING_EMPTY;
    if (a->late) {
        awake awake = stay_awake(a->spin_ns);
        int32_t ending;
        do {
            for (int look = 0; look < LOOKS && state == RING_EMPTY; look++) {
                pause_core();
                state = channel_peek(&a->channel, &message);
            }
            if (state == RING_EMPTY && glance(&awake, -1, &ending)) return ending;
        } while (state == RING_EMPTY);
    }
    return state == RING_MESSAGE && take(a, &message) ? WATCH_TAKEN : WATCH_CHANGED;
}
