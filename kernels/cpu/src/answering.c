/* Answers the queries of decode steps without Python between them: receives QUERY messages, computes, and sends PARTIAL
 * messages. The messages are services/dataplane/wire.py's. Whatever is not a query of the present plan, in every field,
 * is left to the caller. */
#include <math.h>
#include <stddef.h>

#include "awake.h"
#include "channel.h"
#include "wire.h"

/* For how long at most the caller is away while one query follows the other. */
#define MOST_NS 20000000

/* Whether a query asks for what the plan was made for. */
static int fits(const answering *a, const wire_header *query, uint64_t size) {
    const attention_call *call = &a->attention;
    return query->version == WIRE_VERSION && query->kind == WIRE_QUERY && query->step == a->step &&
           query->rows == call->rows && query->q_heads == call->q_heads && query->head_dim == call->pool.head_dim &&
           query->dtype == call->pool.dtype && query->out_dtype == call->out_dtype && query->layer < a->layers &&
           query->window <= INT32_MAX && isfinite(query->scale) && isfinite(query->softcap) &&
           size == sizeof *query + vectors_bytes(call->rows, call->q_heads, call->pool.head_dim, call->pool.dtype);
}

enum outcome { ANSWERED, NOTHING, LEFT };

/* Answers the next message, unless it is LEFT to the caller. */
static enum outcome answer_one(answering *a) {
    ring_message message = {0};
    wire_header header;
    const enum ring_state state = channel_peek(&a->channel, &message);
    if (state == RING_EMPTY) return NOTHING;
    if (state == RING_BROKEN || message.size < sizeof header) return LEFT;
    memcpy(&header, message.data, sizeof header);
    if (!fits(a, &header, message.size)) return LEFT;
    attention_call *call = &a->attention;
    const uint64_t out_bytes = vectors_bytes(call->rows, call->q_heads, call->pool.head_dim, call->out_dtype);
    const uint64_t size = sizeof header + out_bytes + vectors_bytes(call->rows, call->q_heads, 1, FLOAT32);
    uint64_t end = 0;
    char *answer = channel_reserve(&a->channel, size, &end);
    if (!answer) return LEFT;
    call->q = message.data + sizeof header;
    call->out = answer + sizeof header;
    call->lse = (float *)(answer + sizeof header + out_bytes);
    call->pool.layer_offset = header.layer * a->layer_stride;
    call->window = (int32_t)header.window;
    call->scale = header.scale;
    call->softcap = header.softcap;
    const int64_t begun = now_ns();
    if (kernels_micro_attention(a->kernels, call) != STATUS_OK) return LEFT;
    const int64_t ended = now_ns();
    /* A session that has ended may have had its blocks given away while they were read: look at that after them. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(a->ended, __ATOMIC_RELAXED) != a->ended_before) return LEFT;
    const wire_header reply = {
        .version = WIRE_VERSION,
        .kind = WIRE_PARTIAL,
        .layer = header.layer,
        .rows = header.rows,
        .sequence = header.sequence,
        .step = header.step,
        .q_heads = header.q_heads,
        .head_dim = header.head_dim,
        .dtype = header.out_dtype,
    };
    memcpy(answer, &reply, sizeof reply);
    channel_release(&a->channel, &message); /* before the answer, which says so */
    channel_publish(&a->channel, answer, size, end);
    a->answered++;
    a->computed_ns += ended - begun;
    a->answered_at_ns = ended;
    a->received_bytes += (int64_t)message.size;
    a->sent_bytes += (int64_t)size;
    return ANSWERED;
}

int32_t watch_connections(const watch_call *call) {
    awake awake = stay_awake(call->spin_ns);
    const int64_t latest = awake.until + MOST_NS;
    int32_t ending;
    do {
        for (int look = 0; look < LOOKS; look++) {
            for (int32_t i = 0; i < call->count; i++) {
                const uint64_t *counter = call->counters[i];
                if (counter && __atomic_load_n(counter, __ATOMIC_ACQUIRE) == call->seen[i]) continue;
                answering *answering = call->answering[i];
                const enum outcome outcome = answering ? answer_one(answering) : LEFT;
                if (outcome == NOTHING) continue;
                if (outcome == LEFT) return WATCH_CHANGED;
                call->seen[i] = answering->channel.in.at;
                awake.now = now_ns();
                awake.until = awake.now + call->spin_ns < latest ? awake.now + call->spin_ns : latest;
            }
            pause_core();
        }
    } while (!glance(&awake, call->fd, &ending));
    return ending;
}
