/* Answers the queries of decode steps without Python between them: reads QUERY messages from a ring, computes, and
 * writes PARTIAL messages into the other one. The messages are services/dataplane/wire.py's. Whatever is not a query of
 * the present plan, in every field, is left in the ring for the caller. */
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <sys/socket.h>
#include <time.h>

#include "ring.h"

#define WIRE_VERSION 2
#define QUERY 2
#define PARTIAL 3

/* Looks between two glances at the clock: about a microsecond. */
#define LOOKS 32
/* Between two glances at the descriptor and offers of the core to whoever wants it. */
#define OFFER_NS 10000
/* Between two glances at the clock if nobody else has had the core meanwhile. */
#define ALONE_NS 50000
/* For how long at most the caller is away while one query follows the other. */
#define MOST_NS 20000000

typedef struct __attribute__((packed)) {
    uint8_t version, kind;
    uint16_t layer;
    uint32_t rows;
    uint64_t sequence, step;
    uint32_t block, generation;
    uint16_t q_heads, head_dim;
    uint8_t dtype, out_dtype;
    uint8_t unused[2];
    float scale, softcap;
    uint32_t window;
    uint8_t rest[12];
} wire_header;
_Static_assert(sizeof(wire_header) == 64, "services/dataplane/wire.py");

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Leaves a core's units to its other thread for a moment. */
static void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t element_bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Whether a query asks for what the plan was made for. */
static int fits(const answering *a, const wire_header *query, uint64_t size) {
    const attention_call *call = &a->attention;
    const int64_t elements = call->rows * call->q_heads * call->pool.head_dim;
    return query->version == WIRE_VERSION && query->kind == QUERY && query->step == a->step &&
           query->rows == call->rows && query->q_heads == call->q_heads && query->head_dim == call->pool.head_dim &&
           query->dtype == call->pool.dtype && query->out_dtype == call->out_dtype && query->layer < a->layers &&
           query->window <= INT32_MAX && isfinite(query->scale) && isfinite(query->softcap) &&
           size == sizeof(wire_header) + (uint64_t)(elements * element_bytes(call->pool.dtype));
}

/* Answers the next message of the ring. 0: it is left to the caller, or nothing is there. */
static int answer_one(answering *a) {
    ring_message message;
    wire_header header;
    if (ring_peek(&a->in, a->max_message, &message) != RING_MESSAGE || message.size < sizeof header) return 0;
    memcpy(&header, message.data, sizeof header);
    if (!fits(a, &header, message.size)) return 0;
    attention_call *call = &a->attention;
    const int64_t heads = call->rows * call->q_heads;
    const uint64_t out_bytes = (uint64_t)(heads * call->pool.head_dim * element_bytes(call->out_dtype));
    const uint64_t size = sizeof header + out_bytes + 4 * (uint64_t)heads;
    uint64_t end;
    char *answer = size <= a->max_message ? ring_reserve(&a->out, size, &end) : NULL;
    if (!answer) return 0;
    call->q = message.data + sizeof header;
    call->out = answer + sizeof header;
    call->lse = (float *)(answer + sizeof header + out_bytes);
    call->pool.layer_offset = header.layer * a->layer_stride;
    call->window = (int32_t)header.window;
    call->scale = header.scale;
    call->softcap = header.softcap;
    const int64_t begun = now_ns();
    if (kernels_micro_attention(a->kernels, call) != STATUS_OK) return 0;
    const int64_t ended = now_ns();
    /* A session that has ended may have had its blocks given away while they were read: look at that after them. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(a->ended, __ATOMIC_RELAXED) != a->ended_before) return 0;
    const wire_header reply = {
        .version = WIRE_VERSION,
        .kind = PARTIAL,
        .layer = header.layer,
        .rows = header.rows,
        .sequence = header.sequence,
        .step = header.step,
        .q_heads = header.q_heads,
        .head_dim = header.head_dim,
        .dtype = header.out_dtype,
    };
    memcpy(answer, &reply, sizeof reply);
    ring_release(&a->in, &message); /* before the answer, which says so */
    if (ring_publish(&a->out, answer, size, end)) send(a->bell_fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    a->answered++;
    a->computed_ns += ended - begun;
    a->answered_at_ns = ended;
    a->received_bytes += (int64_t)message.size;
    a->sent_bytes += (int64_t)size;
    return 1;
}

int32_t watch_counters(const watch_call *call) {
    int64_t now = now_ns(), offered = now, until = now + call->spin_ns;
    const int64_t latest = now + call->spin_ns + MOST_NS;
    for (;;) {
        for (int look = 0; look < LOOKS; look++) {
            for (int32_t i = 0; i < call->count; i++) {
                if (__atomic_load_n(call->counters[i], __ATOMIC_ACQUIRE) == call->seen[i]) continue;
                answering *answering = call->answering[i];
                if (!answering || !answer_one(answering)) return WATCH_CHANGED;
                call->seen[i] = answering->in.at;
                now = now_ns();
                until = now + call->spin_ns < latest ? now + call->spin_ns : latest;
            }
            pause_core();
        }
        if (now - offered >= OFFER_NS) {
            struct pollfd ready = {.fd = call->fd, .events = POLLIN};
            if (poll(&ready, 1, 0) > 0) return WATCH_READY;
            sched_yield();
            offered = now;
        }
        const int64_t then = now;
        now = now_ns();
        if (now - then > ALONE_NS) return WATCH_CONTENDED;
        if (now >= until) return WATCH_TIMEOUT;
    }
}
