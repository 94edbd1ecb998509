/* Micro-attention for many query rows over bfloat16 keys and values with AMX, otherwise as in prefill.h.
 *
 * Weights are split into three bfloat16, which together are exact, as are their products with values; sums are float32.
 * The third is left out where no weight of a tile is a large part of its row: it would change less than 2**-20 of it.
 */
#define LARGE_PARTS 8.0f /* an eighth of the sum so far is large */

typedef struct {
    int rows, dim;
    uint16_t *q;   /* [rows][dim] */
    float *acc;    /* [rows][dim], separated */
    float *maxima; /* [rows], as in row_state */
    float *sums;   /* [rows][WIDTH] */
    int32_t *pos;  /* [rows] */
    weight_block *weights;
    tiled_keys tile;
} tiled_rows;

/* Where everything lies in the scratch memory; answers its end. */
INLINE char *tiled_layout(tiled_rows *s, int rows, int dim, void *scratch) {
    const int64_t numbers = (int64_t)rows * dim;
    float *next = (float *)scratch;
    s->rows = rows, s->dim = dim;
    s->q = (uint16_t *)next, next += numbers / 2;
    s->acc = next, next += numbers;
    s->weights = (weight_block *)next, next += sizeof(weight_block) / sizeof(float);
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

/* Numbers, the high halves of which are the numbers rounded to bfloat16. */
INLINE vi round_high_halves(vf x) { return (vi)x + splat_int(0x8000); }

/* A row's scores, times factor, become weights relative to reference; answers their sum, spread over the lanes. exact
 * (with low parts) is a constant. */
INLINE vf split_weights(float *scores, float *low, int exact, int keys, vf factor, vf reference) {
    vf sum = {0};
    for (int j = 0; j < keys; j += VECTOR) {
        vf a = exp2_not_positive(load(scores + j) * factor - reference);
        vf b = exp2_not_positive(load(scores + j + WIDTH) * factor - reference);
        vi high_a = round_high_halves(a), high_b = round_high_halves(b);
        vf rest_a = a - seconds(high_a), rest_b = b - seconds(high_b);
        vi middle_a = round_high_halves(rest_a), middle_b = round_high_halves(rest_b);
        store(scores + j, pair_high_halves(high_a, high_b));
        store(scores + j + WIDTH, pair_high_halves(middle_a, middle_b));
        if (exact)
            store(low + j / 2, pair_high_halves((vi)(rest_a - seconds(middle_a)), (vi)(rest_b - seconds(middle_b))));
        sum += a + b;
    }
    return sum;
}

/* Maxima of TILE rows with the tile's scores, times a factor greater than 0, and what they held rescaled to them.
 * Answers whether any weight will be a large part of its row. */
INLINE int raise_maxima(const tiled_rows *s, int row, int keys, float factor) {
    float(*scores)[TILED_KEYS] = s->weights->scores + row % BLOCK_ROWS;
    vf largest[TILE], sums[TILE];
    for (int r = 0; r < TILE; r++) {
        largest[r] = load(scores[r]);
        for (int j = WIDTH; j < keys; j += WIDTH) largest[r] = maximum(largest[r], load(scores[r] + j));
    }
    const vf tile_maximum = max_each(largest) * splat(factor);
    const vf before = load(s->maxima + row), after = maximum(before, tile_maximum);
    store(s->maxima + row, after);
    /* A row that has seen nothing yet has scores of -inf only; relative to 0 their weights are 0. */
    const vf reference = select_lanes(after == splat(-INFINITY), (vf){0}, after);
    const vf rescale = exp2_not_positive(before - reference);
    for (int r = 0; r < TILE; r++) {
        float *acc = s->acc + (int64_t)(row + r) * s->dim, *sum = s->sums + (row + r) * WIDTH;
        sums[r] = load(sum);
        if (rescale[r] == 1.0f) continue;
        for (int d = 0; d < s->dim; d += WIDTH) store(acc + d, load(acc + d) * splat(rescale[r]));
        store(sum, sums[r] *= splat(rescale[r]));
    }
    const vf most = exp2_not_positive(tile_maximum - reference) * splat(LARGE_PARTS);
    return _mm512_cmp_ps_mask((__m512)most, (__m512)sum_each(sums), _CMP_GT_OQ) != 0;
}

/* Replaces scores of BLOCK_ROWS rows by weights. exact is a constant. */
INLINE void weights_of_scores(const tiled_rows *s, int row, int exact, int keys, float factor) {
    for (int r = 0; r < BLOCK_ROWS; r++) {
        float maximum = s->maxima[row + r], *sum = s->sums + (row + r) * WIDTH;
        vf reference = splat(maximum == -INFINITY ? 0.0f : maximum);
        vf added = split_weights(s->weights->scores[r], s->weights->low[r], exact, keys, splat(factor), reference);
        store(sum, load(sum) + added);
    }
}

/* Scores, weights and weighted values of BLOCK_ROWS rows, from row on, over the tile. */
INLINE void attend_tiled(const attention_call *call, const tiled_rows *s, int row) {
    const tiled_keys *tile = &s->tile;
    const int32_t *pos = s->pos + row; /* ascending: rows of a segment have consecutive positions */
    const int32_t first_pos = pos[0], last_pos = pos[BLOCK_ROWS - 1], last_key = tile->pos[tile->count - 1];
    if (tile->pos[0] > last_pos || (call->window > 0 && (int64_t)last_key + call->window <= first_pos)) return;
    int keys = tile->padded_count, dim = s->dim;
    while (tile->pos[keys - TILE_DEPTH] > last_pos) keys -= TILE_DEPTH; /* which none of the rows sees */

    score_block(s->q + (int64_t)row * dim, dim, tile->keys, keys, s->weights->scores[0]);
    float factor = query_factor(call);
    int masked = keys != tile->count || last_key > first_pos ||
                 (call->window > 0 && (int64_t)tile->pos[0] + call->window <= last_pos);
    if (call->softcap > 0 || factor <= 0) { /* cannot be left to the softmax */
        for (int i = 0; i < BLOCK_ROWS * TILED_KEYS; i += WIDTH)
            store(s->weights->scores[0] + i, load(s->weights->scores[0] + i) * splat(factor));
        factor = 1.0f;
    }
    hide_and_cap(call, s->weights->scores[0], BLOCK_ROWS, TILED_KEYS, keys, tile->pos, masked, pos);
    int exact = 0;
    for (int r = 0; r < BLOCK_ROWS; r += TILE) exact |= raise_maxima(s, row + r, keys, factor);
    if (exact) weights_of_scores(s, row, 1, keys, factor);
    else weights_of_scores(s, row, 0, keys, factor);
    weigh_block(s->weights, exact, tile->values, keys, dim, s->acc + (int64_t)row * dim);
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
    configure_tiles(TILE);
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
