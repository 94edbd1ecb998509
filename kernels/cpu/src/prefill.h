/* Micro-attention for many query rows: blocked matrix products over tiles of KEYS keys.
 *
 * A task holds the queries and accumulators of one row tile and one KV head; all its query heads share the tile's keys.
 * Effective row e = query row * group + head in the group. A key tile is packed once, keys transposed, from one or
 * several blocks, and used by all rows of the task. Where the processor multiplies pairs of bfloat16, queries, keys
 * and values stay pairs, and weights become pairs: a second product for what their rounding loses would take as long as
 * products of float32, twice the time. A rounded weight is the same however keys are split (softmax.h).
 */
#define KEY_STRIDE (KEYS + WIDTH) /* packing writes whole vectors, up to WIDTH - 1 beyond the last key */
#define PANEL (MAX_VECTORS * WIDTH)

typedef struct {
    float *keys;     /* [padded_dim][KEY_STRIDE] transposed, or [padded_dim / 2][KEY_STRIDE] pairs */
    float *values;   /* panels of PANEL columns, each [KEYS][PANEL], or pairs of keys [KEYS / 2][padded_dim], separated */
    int32_t pos[KEYS];
    int count;
} key_tile;

typedef struct {
    int rows, padded_dim;
    float *q, *acc; /* [rows][padded_dim]; q: or [rows][padded_dim / 2] pairs */
    row_state *states;
    int32_t *pos;   /* [rows] */
    key_tile tile;
} row_tile;

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

INLINE int effective_rows(const attention_call *call) {
    int group = call->q_heads / call->pool.kv_heads;
    int rows = PREFILL_ROWS / group > 0 ? PREFILL_ROWS / group : 1;
    return (int)round_up((int64_t)rows * group, MAX_ROWS);
}

static size_t prefill_scratch(const attention_call *call) {
    int64_t dim = round_up(call->pool.head_dim, WIDTH), rows = effective_rows(call);
    int64_t floats = 2 * rows * dim + dim * KEY_STRIDE + KEYS * round_up(dim, PANEL);
    return (size_t)(floats * 4 + rows * (int64_t)(sizeof(row_state) + sizeof(int32_t)) + 64);
}

/* Whether prefill keeps pairs. */
INLINE int keeps_pairs(const pool_view *pool, int dtype) {
    return NATIVE_PAIRS && dtype == BFLOAT16 && has_pairs(pool);
}

/* A square of keys' pairs: WIDTH keys from the j-th on, VECTOR dimensions from the d-th on, into columns. */
INLINE void pack_pairs(key_tile *tile, const uint16_t *keys, int j, int count, int d, int head_dim) {
    vf x[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        x[i] = j + i < count ? (vf)load_pairs(keys + (int64_t)(j + i) * head_dim + d) : (vf){0};
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) store(tile->keys + (d / 2 + i) * KEY_STRIDE + tile->count + j, x[i]);
}

/* The t-th key's values, each beside that of its neighbour: the even key's first. In the order of separated dimensions. */
INLINE void pack_value_row(key_tile *tile, const uint16_t *values, int t, int head_dim) {
    float *pairs = tile->values + (int64_t)(t / 2) * head_dim;
    for (int d = 0; d < head_dim; d += VECTOR, pairs += VECTOR) {
        const vi x = load_pairs(values + d);
        if (t % 2 == 0) {
            store(pairs, (vf)(x & splat_int(0xffff)));
            store(pairs + WIDTH, (vf)((vu)x >> 16));
        } else {
            store(pairs, (vf)((vi)load(pairs) | (vi)firsts(x)));
            store(pairs + WIDTH, (vf)((vi)load(pairs + WIDTH) | (vi)seconds(x)));
        }
    }
}

/* Appends a run to the tile: keys into columns, values into rows, from tile->count on. */
INLINE void pack_run(
    key_tile *tile, const void *keys, const void *values, int count, int head_dim, int dtype, int paired
) {
    if (paired) {
        for (int d = 0; d < head_dim; d += VECTOR)
            for (int j = 0; j < count; j += WIDTH) pack_pairs(tile, keys, j, count, d, head_dim);
        for (int j = 0; j < count; j++)
            pack_value_row(tile, (const uint16_t *)values + (int64_t)j * head_dim, tile->count + j, head_dim);
        return;
    }
    for (int d = 0; d < head_dim; d += WIDTH) {
        for (int j = 0; j < count; j += WIDTH) {
            vf x[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                x[i] = j + i < count
                           ? load_padded(element(keys, (int64_t)(j + i) * head_dim, dtype), d, head_dim, dtype)
                           : (vf){0};
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) store(tile->keys + (d + i) * KEY_STRIDE + tile->count + j, x[i]);
        }
        float *column = tile->values + d / PANEL * PANEL * KEYS + d % PANEL;
        for (int j = 0; j < count; j++)
            store(
                column + (tile->count + j) * PANEL,
                load_padded(element(values, (int64_t)j * head_dim, dtype), d, head_dim, dtype)
            );
    }
}

/* Fills the tile with the next keys under the cursor, from as many blocks as it takes. */
INLINE int fill_tile(key_tile *tile, key_cursor *cursor, int32_t head, int dtype) {
    const pool_view *pool = &cursor->call->pool;
    key_run run;
    tile->count = 0;
    while (tile->count < KEYS && next_run(cursor, KEYS - tile->count, &run)) {
        const void *keys = run_keys(pool, &run, head, dtype);
        pack_run(
            tile, keys, run_values(pool, keys, dtype), run.count, pool->head_dim, dtype, keeps_pairs(pool, dtype)
        );
        for (int j = 0; j < run.count; j++) tile->pos[tile->count + j] = run.pos + j;
        tile->count += run.count;
    }
    for (int j = tile->count; j < KEYS; j++) tile->pos[j] = INT32_MAX;
    return tile->count;
}

/* The matrix products of MAX_ROWS rows. They are functions of their own because they need all registers. */
static NOINLINE void score_rows(const float *q, int dim, const key_tile *tile, int keys, float *scores, int paired) {
    if (paired) gemm(MAX_ROWS, keys, dim / 2, q, dim / 2, tile->keys, KEY_STRIDE, 0, PAIRS, scores, KEYS, NULL, 0);
    else gemm(MAX_ROWS, keys, dim, q, dim, tile->keys, KEY_STRIDE, 0, FLOAT32, scores, KEYS, NULL, 0);
}

/* Of the first count keys. Weights are [MAX_ROWS][KEYS], or [MAX_ROWS][KEYS / 2] pairs. */
static NOINLINE void weigh_values(
    const float *weights, const key_tile *tile, int count, int dim, float *acc, const float *rescale, int paired
) {
    const void *values = tile->values;
    if (paired) gemm(MAX_ROWS, dim, (count + 1) / 2, weights, KEYS / 2, values, dim, 0, PAIRS, acc, dim, rescale, 0);
    else gemm(MAX_ROWS, dim, count, weights, KEYS, values, PANEL, KEYS, FLOAT32, acc, dim, rescale, 0);
}

/* Scores become weights, in their place or as pairs. */
INLINE void softmax_row(row_state *row, float *scores, int keys, float factor, float *pairs, int paired) {
#if NATIVE_PAIRS
    if (paired) {
        online_softmax_pairs(row, scores, keys, factor, pairs);
        return;
    }
#endif
    (void)pairs, (void)paired;
    online_softmax(row, scores, keys, factor);
}

/* Scores, weights and weighted values of MAX_ROWS rows, from row on, over the tile. */
INLINE void attend_tile(const attention_call *call, row_tile *rows, int row, int dtype) {
    const key_tile *tile = &rows->tile;
    const int32_t *pos = rows->pos + row; /* ascending: rows of a segment have consecutive positions */
    const int32_t first_pos = pos[0], last_pos = pos[MAX_ROWS - 1], last_key = tile->pos[tile->count - 1];
    if (tile->pos[0] > last_pos || (call->window > 0 && (int64_t)last_key + call->window <= first_pos)) return;

    float scores[MAX_ROWS * KEYS], pairs[MAX_ROWS * KEYS / 2], rescale[MAX_ROWS];
    const int paired = keeps_pairs(&call->pool, dtype), dim = rows->padded_dim;
    const int step = paired ? VECTOR : WIDTH;
    int keys = (int)round_up(tile->count, step);
    while (tile->pos[keys - step] > last_pos) keys -= step; /* which none of the rows sees */
    const int count = keys < tile->count ? keys : tile->count;
    score_rows(rows->q + (paired ? row * dim / 2 : row * dim), dim, tile, keys, scores, paired);
    float factor = paired ? query_factor(call) : 1.0f; /* pairs of queries are kept as they came */
    if (paired && (call->softcap > 0 || factor <= 0)) { /* cannot be left to the softmax */
        for (int i = 0; i < MAX_ROWS * KEYS; i += WIDTH) store(scores + i, load(scores + i) * splat(factor));
        factor = 1.0f;
    }
    int masked = keys != tile->count || last_key > first_pos ||
                 (call->window > 0 && (int64_t)tile->pos[0] + call->window <= last_pos);
    hide_and_cap(call, scores, MAX_ROWS, KEYS, keys, tile->pos, masked, pos);
    for (int r = 0; r < MAX_ROWS; r++) {
        softmax_row(&rows->states[row + r], scores + r * KEYS, keys, factor, pairs + r * KEYS / 2, paired);
        rescale[r] = rows->states[row + r].rescale;
    }
    float *acc = rows->acc + row * dim;
    weigh_values(paired ? pairs : scores, tile, count, dim, acc, rescale, paired);
}

INLINE void prefill_as(const attention_call *call, prefill_task task, void *scratch, int dtype) {
    const pool_view *pool = &call->pool;
    const int head_dim = pool->head_dim, group = call->q_heads / pool->kv_heads;
    const int dim = (int)round_up(head_dim, WIDTH), used = task.count * group;
    const int64_t first_row = call->query_start[task.segment] + (int64_t)task.first;
    const int32_t first_pos = call->query_pos[task.segment] + task.first, last_pos = first_pos + task.count - 1;

    row_tile rows = {.rows = (int)round_up(used, MAX_ROWS), .padded_dim = dim};
    float *next = (float *)scratch;
    rows.q = next, next += (int64_t)rows.rows * dim;
    rows.acc = next, next += (int64_t)rows.rows * dim;
    rows.tile.keys = next, next += (int64_t)dim * KEY_STRIDE;
    rows.tile.values = next, next += KEYS * round_up(dim, PANEL);
    rows.states = (row_state *)next, next += rows.rows * (int64_t)(sizeof(row_state) / sizeof(float));
    rows.pos = (int32_t *)next;

    memset(rows.acc, 0, (size_t)rows.rows * dim * sizeof(float));
    for (int e = 0; e < rows.rows; e++) {
        /* Rows that fill up the last register tile repeat the last row and are not written. */
        int row = (e < used ? e : used - 1) / group, head = task.head * group + (e < used ? e : used - 1) % group;
        int64_t index = (first_row + row) * call->q_stride + (int64_t)head * head_dim;
        const void *q = element(call->q, index, dtype);
        if (keeps_pairs(pool, dtype)) memcpy((uint16_t *)rows.q + (int64_t)e * dim, q, (size_t)dim * 2);
        else load_query(rows.q + (int64_t)e * dim, q, head_dim, query_factor(call), dtype);
        rows.pos[e] = first_pos + row;
        row_reset(&rows.states[e]);
    }

    key_cursor cursor = key_cursor_at(
        call, call->block_start[task.segment], call->block_start[task.segment + 1], first_pos, last_pos
    );
    while (fill_tile(&rows.tile, &cursor, task.head, dtype))
        for (int row = 0; row < rows.rows; row += MAX_ROWS) attend_tile(call, &rows, row, dtype);

    for (int e = 0; e < used; e++) {
        int64_t index = (first_row + e / group) * call->q_heads + task.head * group + e % group;
        float scale, *acc = rows.acc + (int64_t)e * dim;
        call->lse[index] = row_finish(rows.states[e].maximum, rows.states[e].sum, &scale);
        for (int d = 0; d < dim; d += WIDTH) store(acc + d, load(acc + d) * splat(scale));
        if (keeps_pairs(pool, dtype)) join_row(acc, dim);
        store_as(call->out, index * head_dim, acc, head_dim, call->out_dtype);
    }
}

static void prefill(const attention_call *call, prefill_task task, void *scratch) {
    switch (call->pool.dtype) {
        case FLOAT32: prefill_as(call, task, scratch, FLOAT32); break;
        case BFLOAT16: prefill_as(call, task, scratch, BFLOAT16); break;
        default: prefill_as(call, task, scratch, FLOAT16); break;
    }
}
