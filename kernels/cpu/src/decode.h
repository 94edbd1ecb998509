/* Micro-attention for few query rows: bound by reading K and V, so every byte of them is read from memory once.
 *
 * Blocks are walked outermost and KV heads inside, in the order of memory; what will be read soon, across the ends of
 * blocks and of tasks, is prefetched a little with every step. Keys and values are used where they lie; only rows that
 * are no whole vectors are widened first.
 */
INLINE int needs_widening(const pool_view *pool) { return pool->head_dim % WIDTH != 0; }

/* State of all effective rows of a segment, [kv_heads][rows]; rows = query rows * group. */
typedef struct {
    int rows, padded_dim;
    float *q, *acc; /* [kv_heads * rows][padded_dim]; q is bfloat16 where keys are read as pairs */
    uint32_t *q_columns; /* of such: [kv_heads][padded_dim / 2][rows], for tiles */
    float *widened; /* [2][KEYS][padded_dim]: a run that needs_widening */
    float *scores;  /* [rows][KEYS] */
    row_state *states;
    int32_t *pos; /* [rows] */
} decode_rows;

INLINE decode_rows decode_layout(const attention_call *call, int32_t segment, const void *memory) {
    decode_rows s;
    int64_t query_rows = call->query_start[segment + 1] - call->query_start[segment];
    s.rows = (int)(query_rows * (call->q_heads / call->pool.kv_heads));
    s.padded_dim = (int)round_up(call->pool.head_dim, WIDTH);
    int64_t all = (int64_t)s.rows * call->pool.kv_heads;
    float *next = (float *)memory;
    s.q = next, s.q_columns = (uint32_t *)next + all * s.padded_dim / 2, next += all * s.padded_dim;
    s.acc = next, next += all * s.padded_dim;
    s.widened = next, next += needs_widening(&call->pool) ? 2 * KEYS * s.padded_dim : 0;
    s.scores = next, next += s.rows * KEYS;
    s.states = (row_state *)next, next += all * (int64_t)(sizeof(row_state) / sizeof(float));
    s.pos = (int32_t *)next;
    return s;
}

static size_t decode_state(const attention_call *call, int32_t segment) {
    decode_rows s = decode_layout(call, segment, NULL);
    return (size_t)((const char *)(s.pos + s.rows) - (const char *)NULL);
}

#include "decode_floats.h"
#include "decode_tiles.h"
#include "decode_pairs.h"

/* All KV heads over one run; next is the run after it, or the same. */
INLINE void decode_run(
    const attention_call *call, const decode_rows *s, const key_run *run, const key_run *next, int dtype
) {
    const pool_view *pool = &call->pool;
    const int head_dim = pool->head_dim;
    int32_t key_pos[KEYS];
    for (int j = 0; j < KEYS; j++) key_pos[j] = j < run->count ? run->pos + j : INT32_MAX;
    int masked = run->count % WIDTH != 0 || run->pos + run->count - 1 > s->pos[0] ||
                 (call->window > 0 && (int64_t)run->pos + call->window <= s->pos[s->rows - 1]);
    for (int32_t head = 0; head < pool->kv_heads; head++) {
        const void *k = run_keys(pool, run, head, dtype), *v = run_values(pool, k, dtype);
        const void *next_k = head + 1 < pool->kv_heads ? run_keys(pool, run, head + 1, dtype)
                                                       : run_keys(pool, next, 0, dtype);
        if (dtype == BFLOAT16 && has_pairs(pool)) {
            const void *after_k = memory_ahead(pool, run, next, 2 * head);
            const void *after_v = memory_ahead(pool, run, next, 2 * head + 1);
            decode_head_pairs(call, s, head, k, v, after_k, after_v, run->count, key_pos, masked);
        } else if (needs_widening(pool)) {
            float *wide_k = s->widened, *wide_v = s->widened + KEYS * s->padded_dim;
            for (int j = 0; j < run->count; j++) {
                int64_t from = (int64_t)j * head_dim, to = (int64_t)j * s->padded_dim;
                load_query(wide_k + to, element(k, from, dtype), head_dim, 1.0f, dtype);
                load_query(wide_v + to, element(v, from, dtype), head_dim, 1.0f, dtype);
            }
            decode_head(call, s, head, wide_k, wide_v, s->padded_dim, run->count, key_pos, masked, 0, FLOAT32);
        } else {
            int64_t ahead = (intptr_t)next_k - (intptr_t)k;
            decode_head(call, s, head, k, v, head_dim, run->count, key_pos, masked, ahead, dtype);
        }
    }
}

/* The first run of the task that is begun next, if there is one and its rows see any of its keys. */
INLINE void upcoming_run(const attention_call *call, const decode_queue *queue, key_run *run) {
    const int64_t index = atomic_load_explicit(queue->next, memory_order_relaxed) - queue->first;
    if (index < 0 || index >= queue->count) return;
    const decode_task task = queue->tasks[index];
    const int32_t pos = call->query_pos[task.segment];
    const int32_t rows = call->query_start[task.segment + 1] - call->query_start[task.segment];
    key_cursor cursor = key_cursor_at(call, task.entry, task.end, pos, pos + rows - 1);
    next_run(&cursor, KEYS, run);
}

INLINE void decode_as(
    const attention_call *call, decode_task task, const decode_queue *queue, void *memory, int dtype
) {
    const pool_view *pool = &call->pool;
    const decode_rows s = decode_layout(call, task.segment, memory);
    const int group = call->q_heads / pool->kv_heads, head_dim = pool->head_dim;
    const int64_t first_row = call->query_start[task.segment];
    for (int e = 0; e < s.rows; e++) s.pos[e] = call->query_pos[task.segment] + e / group;
    for (int i = 0; i < s.rows * pool->kv_heads; i++) {
        int e = i % s.rows, head = i / s.rows * group + e % group;
        int64_t index = (first_row + e / group) * call->q_stride + (int64_t)head * head_dim;
        if (dtype == BFLOAT16 && has_pairs(pool))
            memcpy((uint16_t *)s.q + (int64_t)i * head_dim, element(call->q, index, dtype), (size_t)head_dim * 2);
        else
            load_query(
                s.q + (int64_t)i * s.padded_dim, element(call->q, index, dtype), head_dim, query_factor(call), dtype
            );
        row_reset(&s.states[i]);
    }
    memset(s.acc, 0, sizeof(float) * (size_t)s.padded_dim * (size_t)(s.rows * pool->kv_heads));
    begin_tiles(call, &s);

    key_cursor cursor = key_cursor_at(call, task.entry, task.end, s.pos[0], s.pos[s.rows - 1]);
    key_run run, next;
    for (int more = next_run(&cursor, KEYS, &run); more; run = next) {
        next = run;
        more = next_run(&cursor, KEYS, &next);
        if (!more) upcoming_run(call, queue, &next);
        decode_run(call, &s, &run, &next, dtype);
    }
    end_tiles(call, &s);
}

static void decode(const attention_call *call, decode_task task, const decode_queue *queue, void *state) {
    switch (call->pool.dtype) {
        case FLOAT32: decode_as(call, task, queue, state, FLOAT32); break;
        case BFLOAT16: decode_as(call, task, queue, state, BFLOAT16); break;
        default: decode_as(call, task, queue, state, FLOAT16); break;
    }
}

/* state becomes the state of both tasks' keys. */
static void decode_merge(const attention_call *call, int32_t segment, void *state, const void *other) {
    const decode_rows a = decode_layout(call, segment, state), b = decode_layout(call, segment, other);
    for (int i = 0; i < a.rows * call->pool.kv_heads; i++) {
        row_state *x = &a.states[i];
        const row_state *y = &b.states[i];
        if (y->maximum == -INFINITY) continue;
        float larger = x->maximum > y->maximum ? x->maximum : y->maximum;
        vf keep = splat(exp2_not_positive(splat(x->maximum - larger))[0]);
        vf add = splat(exp2_not_positive(splat(y->maximum - larger))[0]);
        x->maximum = larger;
        store(x->sum, keep * load(x->sum) + add * load(y->sum));
        float *to = a.acc + (int64_t)i * a.padded_dim;
        const float *from = b.acc + (int64_t)i * a.padded_dim;
        for (int d = 0; d < a.padded_dim; d += WIDTH) store(to + d, keep * load(to + d) + add * load(from + d));
    }
}

static void decode_write(const attention_call *call, int32_t segment, const void *state) {
    const decode_rows s = decode_layout(call, segment, state);
    const int group = call->q_heads / call->pool.kv_heads, head_dim = call->pool.head_dim;
    for (int i = 0; i < s.rows * call->pool.kv_heads; i++) {
        int e = i % s.rows, head = i / s.rows * group + e % group;
        int64_t index = (call->query_start[segment] + (int64_t)(e / group)) * call->q_heads + head;
        float scale, *acc = s.acc + (int64_t)i * s.padded_dim;
        call->lse[index] = row_finish(s.states[i].maximum, s.states[i].sum, &scale);
        for (int d = 0; d < s.padded_dim; d += WIDTH) store(acc + d, load(acc + d) * splat(scale));
        if (has_pairs(&call->pool)) join_row(acc, head_dim);
        store_as(call->out, index * head_dim, acc, head_dim, call->out_dtype);
    }
}
