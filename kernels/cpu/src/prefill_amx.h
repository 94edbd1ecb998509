/* Micro-attention for many query rows over bfloat16 keys and values with AMX, otherwise as in prefill.h.
 *
 * Weights are split into two bfloat16, together 17 bits: their products with values are exact, and sums are float32.
 */
typedef struct {
    int rows, dim;
    uint16_t *q;     /* [rows][dim] */
    float *acc;      /* [rows][dim], separated */
    float *scores;   /* [BLOCK_ROWS][TILED_KEYS], then weights */
    float *sums;     /* [rows][WIDTH] */
    float *maxima;   /* [rows] */
    int32_t *pos;    /* [rows] */
    tiled_keys tile;
} tiled_rows;

/* Where everything lies in the scratch memory; answers its end. */
INLINE char *tiled_layout(tiled_rows *s, int rows, int dim, void *scratch) {
    const int64_t numbers = (int64_t)rows * dim;
    float *next = (float *)scratch;
    s->rows = rows, s->dim = dim;
    s->q = (uint16_t *)next, next += numbers / 2;
    s->acc = next, next += numbers;
    s->scores = next, next += BLOCK_ROWS * TILED_KEYS;
    s->tile.keys = (int32_t *)next, next += TILED_KEYS * dim / 2;
    s->tile.values = (int32_t *)next, next += TILED_KEYS * dim / 2;
    s->sums = next, next += rows * WIDTH;
    s->maxima = next, next += rows;
    s->pos = (int32_t *)next, next += rows;
    return (char *)next;
}

static size_t prefill_amx_scratch(const attention_call *call) {
    if (!has_pairs(&call->pool)) return prefill_scratch(call);
    tiled_rows s;
    int rows = (int)round_up(effective_rows(call), BLOCK_ROWS);
    return (size_t)(tiled_layout(&s, rows, call->pool.head_dim, NULL) - (char *)NULL);
}

/* Both vectors' numbers, rounded to bfloat16. */
INLINE vf join_bfloat16(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

/* Numbers not below 0, rounded to bfloat16. */
INLINE vf high_parts(vf x) { return (vf)(((vi)x + splat_int(0x8000)) & splat_int(-65536)); }

/* A row's scores, times factor, become weights relative to reference; answers their sum, spread over the lanes. Of each
 * VECTOR weights the high parts and after them the low ones take the place of the scores. */
INLINE vf split_weights(float *scores, int keys, vf factor, vf reference) {
    vf sum = {0};
    for (int j = 0; j < keys; j += VECTOR) {
        vf a = exp2_not_positive(load(scores + j) * factor - reference);
        vf b = exp2_not_positive(load(scores + j + WIDTH) * factor - reference);
        vf high_a = high_parts(a), high_b = high_parts(b);
        store(scores + j, join_bfloat16(high_a, high_b));
        store(scores + j + WIDTH, join_bfloat16(a - high_a, b - high_b));
        sum += a + b;
    }
    return sum;
}

/* Replaces scores of TILE rows, times a factor greater than 0, by weights; what the rows hold is rescaled to them. */
INLINE void tiled_softmax(const tiled_rows *s, int row, float *scores, float factor) {
    const int keys = s->tile.padded_count, dim = s->dim;
    vf largest[TILE];
    for (int r = 0; r < TILE; r++) {
        largest[r] = load(scores + r * TILED_KEYS);
        for (int j = WIDTH; j < keys; j += WIDTH) largest[r] = maximum(largest[r], load(scores + r * TILED_KEYS + j));
    }
    vf before = load(s->maxima + row), after = maximum(before, max_each(largest) * splat(factor));
    store(s->maxima + row, after);
    /* A row that has seen nothing yet has scores of -inf only; relative to 0 their weights are 0. */
    vf reference = select_lanes(after == splat(-INFINITY), (vf){0}, after);
    vf rescale = exp2_not_positive(before - reference);
    for (int r = 0; r < TILE; r++) {
        float *sum = s->sums + (row + r) * WIDTH, *acc = s->acc + (int64_t)(row + r) * dim;
        if (rescale[r] != 1.0f) {
            for (int d = 0; d < dim; d += WIDTH) store(acc + d, load(acc + d) * splat(rescale[r]));
            store(sum, load(sum) * splat(rescale[r]));
        }
        store(sum, load(sum) + split_weights(scores + r * TILED_KEYS, keys, splat(factor), splat(reference[r])));
    }
}

/* Scores, weights and weighted values of BLOCK_ROWS rows, from row on, over the tile. */
INLINE void attend_tiled(const attention_call *call, const tiled_rows *s, int row) {
    const tiled_keys *tile = &s->tile;
    const int keys = tile->padded_count, dim = s->dim;
    const int32_t *pos = s->pos + row; /* ascending: rows of a segment have consecutive positions */
    const int32_t first_pos = pos[0], last_pos = pos[BLOCK_ROWS - 1], last_key = tile->pos[tile->count - 1];
    if (tile->pos[0] > last_pos || (call->window > 0 && (int64_t)last_key + call->window <= first_pos)) return;

    score_block(s->q + (int64_t)row * dim, dim, tile, s->scores);
    float factor = query_factor(call);
    int masked = keys != tile->count || last_key > first_pos ||
                 (call->window > 0 && (int64_t)tile->pos[0] + call->window <= last_pos);
    if (call->softcap > 0 || factor <= 0) { /* cannot be left to the softmax */
        for (int i = 0; i < BLOCK_ROWS * TILED_KEYS; i += WIDTH)
            store(s->scores + i, load(s->scores + i) * splat(factor));
        factor = 1.0f;
    }
    hide_and_cap(call, s->scores, BLOCK_ROWS, TILED_KEYS, keys, tile->pos, masked, pos);
    for (int r = 0; r < BLOCK_ROWS; r += TILE) tiled_softmax(s, row + r, s->scores + r * TILED_KEYS, factor);
    weigh_block(s->scores, tile, dim, s->acc + (int64_t)row * dim);
}

static void prefill_tiled(const attention_call *call, prefill_task task, void *scratch) {
    const pool_view *pool = &call->pool;
    const int dim = pool->head_dim, group = call->q_heads / pool->kv_heads, used = task.count * group;
    const int64_t first_row = call->query_start[task.segment] + (int64_t)task.first;
    const int32_t first_pos = call->query_pos[task.segment] + task.first, last_pos = first_pos + task.count - 1;

    tiled_rows s;
    tiled_layout(&s, (int)round_up(used, BLOCK_ROWS), dim, scratch);
    memset(s.acc, 0, (size_t)s.rows * (size_t)dim * sizeof(float));
    memset(s.sums, 0, (size_t)s.rows * WIDTH * sizeof(float));
    for (int e = 0; e < s.rows; e++) {
        /* Rows that fill up the last block repeat the last row and are not written. */
        int row = (e < used ? e : used - 1) / group, head = task.head * group + (e < used ? e : used - 1) % group;
        const uint16_t *q = (const uint16_t *)call->q + (first_row + row) * call->q_stride + (int64_t)head * dim;
        memcpy(s.q + (int64_t)e * dim, q, (size_t)dim * sizeof(uint16_t));
        s.pos[e] = first_pos + row;
        s.maxima[e] = -INFINITY;
    }

    key_cursor cursor = key_cursor_at(
        call, call->block_start[task.segment], call->block_start[task.segment + 1], first_pos, last_pos
    );
    configure_tiles();
    while (pack_tile(&s.tile, &cursor, task.head))
        for (int row = 0; row < s.rows; row += BLOCK_ROWS) attend_tiled(call, &s, row);
    _tile_release(); /* so that the system need not keep the tiles when it switches threads */

    for (int e = 0; e < used; e++) {
        int64_t index = (first_row + e / group) * call->q_heads + task.head * group + e % group;
        float scale, *acc = s.acc + (int64_t)e * dim;
        call->lse[index] = row_finish(s.maxima[e], s.sums + e * WIDTH, &scale);
        for (int d = 0; d < dim; d += WIDTH) store(acc + d, load(acc + d) * splat(scale));
        join_row(acc, dim);
        store_as(call->out, index * dim, acc, dim, call->out_dtype);
    }
}

static void prefill_amx(const attention_call *call, prefill_task task, void *scratch) {
    if (has_pairs(&call->pool)) prefill_tiled(call, task, scratch);
    else prefill(call, task, scratch);
}
