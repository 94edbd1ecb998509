/* Decoding over bfloat16 keys and values, read as pairs (pairs.h): whole vectors of memory, and few instructions each.
 *
 * Queries stay bfloat16; the factor is applied to the scores.
 */
#define AHEAD_BYTES 16384 /* prefetched that far ahead: several times latency times bandwidth */

/* A block's layer is 2 * kv_heads parts in a row: keys and values of the first head, of the second, ... What to
 * prefetch while a part of this run is used, as much of it as of that: a part further on, in this run or the next. Where
 * the next run has more keys, the rest is prefetched at once. */
INLINE const void *memory_ahead(const pool_view *pool, const key_run *run, const key_run *next, int part) {
    const int64_t size = (int64_t)pool->block_tokens * pool->head_dim;
    const int parts = 2 * pool->kv_heads;
    int64_t distance = AHEAD_BYTES / 2 / size;
    part += distance < 1 ? 1 : distance > parts ? parts : (int)distance;
    const key_run *in = part < parts ? run : next;
    int64_t index = in->block * pool->block_stride + pool->layer_offset + (int64_t)in->offset * pool->head_dim;
    const char *ahead = element(pool->data, index + (part < parts ? part : part - parts) * size, BFLOAT16);
    const int used = run->count * pool->head_dim * 2, wanted = in->count * pool->head_dim * 2;
    if (wanted > used) prefetch_lines(ahead + used, wanted - used);
    return ahead;
}

/* One query with some keys, in the order of memory. */
INLINE void dot_keys(
    vf *acc, int keys, int whole, const uint16_t *q, const uint16_t *k, int key_count, int dim, const char *ahead
) {
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) {
        const uint16_t *key = k + (whole || j < key_count ? j : key_count - 1) * dim;
        if (ahead) prefetch_pages(ahead + j * dim * 2, dim * 2);
#pragma GCC unroll 4
        for (int d = 0; d < dim; d += VECTOR) acc[j] = dot_pairs(acc[j], load_pairs(q + d), load_pairs(key + d));
    }
}

/* Scores of some queries with some keys, rows of dim each; keys * rows is WIDTH. Those beyond row_count and key_count
 * repeat the last. keys, rows and whole (there are no keys beyond) are constants. The memory from ahead on is
 * prefetched, as much as the keys take. */
INLINE void score_tile(
    int keys, int rows, int whole, const uint16_t *q, int row_count, const uint16_t *k, int key_count, int dim,
    float factor, float *scores, const char *ahead
) {
    vf acc[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) acc[i] = (vf){0};
    if (OUTRUNS_MEMORY && rows == 1) dot_keys(acc, keys, whole, q, k, key_count, dim, ahead);
    else for (int d = 0; d < dim; d += VECTOR) {
        vi x[WIDTH];
        if (ahead) prefetch_lines(ahead + d * keys * 2, keys * VECTOR_BYTES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) x[r] = load_pairs(q + (r < row_count ? r : row_count - 1) * dim + d);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) {
            vi y = load_pairs(k + (whole || j < key_count ? j : key_count - 1) * dim + d);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) acc[r * keys + j] = dot_pairs(acc[r * keys + j], x[r], y);
        }
    }
    float flat[WIDTH];
    store(flat, sum_each(acc) * splat(factor));
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        if (r < row_count) memcpy(scores + r * KEYS, flat + r * keys, (size_t)keys * 4);
}

/* The same for up to WIDTH keys, a multiple of keys at a time. */
INLINE void score_keys(
    int keys, int rows, const uint16_t *q, int row_count, const uint16_t *k, int count, int dim, float factor,
    float *scores, const char *ahead
) {
    int j = 0;
    for (; j + keys <= count && j < WIDTH; j += keys)
        score_tile(
            keys, rows, 1, q, row_count, k + j * dim, keys, dim, factor, scores + j, ahead ? ahead + j * dim * 2 : NULL
        );
    if (j < count && j < WIDTH)
        score_tile(keys, rows, 0, q, row_count, k + j * dim, count - j, dim, factor, scores + j, NULL);
}

/* Scores [rows][KEYS] of all rows with count keys. */
INLINE void score_run_of(
    const uint16_t *q, int rows, const uint16_t *k, int count, int dim, float factor, float *scores, const char *ahead
) {
    for (int j = 0; j < count; j += WIDTH, ahead += WIDTH * dim * 2)
        for (int r = 0, n; r < rows; r += n) {
            const uint16_t *some_q = q + r * dim, *some_k = k + j * dim;
            float *to = scores + r * KEYS + j;
            const char *fetch = r == 0 ? ahead : NULL;
            if (WIDTH >= 16 && rows - r > 2)
                score_keys(WIDTH / 4, n = 4, some_q, rows - r, some_k, count - j, dim, factor, to, fetch);
            else if (WIDTH >= 8 && rows - r > 1)
                score_keys(WIDTH / 2, n = 2, some_q, rows - r, some_k, count - j, dim, factor, to, fetch);
            else score_keys(WIDTH, n = 1, some_q, 1, some_k, count - j, dim, factor, to, fetch);
        }
}

/* Functions of their own because they need all registers. Where arithmetic is short enough for the computation of
 * addresses to matter, the usual dimensions are constants. */
static NOINLINE void score_run(
    const uint16_t *q, int rows, const uint16_t *k, int count, int dim, float factor, float *scores, const char *ahead
) {
    if (NATIVE_PAIRS && dim == 64) score_run_of(q, rows, k, count, 64, factor, scores, ahead);
    else if (NATIVE_PAIRS && dim == 128) score_run_of(q, rows, k, count, 128, factor, scores, ahead);
    else score_run_of(q, rows, k, count, dim, factor, scores, ahead);
}

static NOINLINE void weigh_run(
    int rows, const float *weights, const uint16_t *v, int count, int dim, float *acc, const float *rescale,
    const char *ahead
) {
    if (NATIVE_PAIRS && dim == 64) weigh_run_of(rows, weights, v, count, 64, acc, rescale, ahead);
    else if (NATIVE_PAIRS && dim == 128) weigh_run_of(rows, weights, v, count, 128, acc, rescale, ahead);
    else weigh_run_of(rows, weights, v, count, dim, acc, rescale, ahead);
}

/* One KV head over one run. The memory from after_k and after_v on is prefetched while keys and values are used. */
INLINE void decode_head_pairs(
    const attention_call *call, const decode_rows *s, int32_t head, const uint16_t *k, const uint16_t *v,
    const char *after_k, const char *after_v, int count, const int32_t *key_pos, int masked
) {
    const int rows = s->rows, dim = s->padded_dim, keys = (int)round_up(count, WIDTH);
    const uint16_t *q = (const uint16_t *)s->q + (int64_t)head * rows * dim;
    row_state *states = s->states + (int64_t)head * rows;
    const int done = score_some_tiles(call, s, head, k, count, after_k);
    if (done < count)
        score_run(
            q, rows, k + done * dim, count - done, dim, query_factor(call), s->scores + done, after_k + 2 * done * dim
        );
    hide_and_cap(call, s->scores, rows, KEYS, keys, key_pos, masked, s->pos);
    for (int r = 0; r < rows; r++) online_softmax(&states[r], s->scores + r * KEYS, keys, 1.0f);
    const int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS, most = (rows + tiles - 1) / tiles;
    for (int r = 0; r < rows; r += most) {
        int n = rows - r < most ? rows - r : most;
        float rescale[MOST_ROWS], *acc = s->acc + ((int64_t)head * rows + r) * dim;
        for (int i = 0; i < n; i++) rescale[i] = states[r + i].rescale;
        weigh_run(n, s->scores + r * KEYS, v, count, dim, acc, rescale, r == 0 ? after_v : NULL);
    }
}
