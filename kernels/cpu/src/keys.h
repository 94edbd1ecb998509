/* The keys of a segment that some of its rows see, as runs that each lie in one block. */

/* Some consecutive keys of one block, all of them written. */
typedef struct {
    int32_t block, offset; /* block in the pool, first key in the block */
    int32_t count, pos;    /* number of keys, position of the first */
} key_run;

typedef struct {
    const attention_call *call;
    int32_t entry, end;     /* next and last entry of the block list */
    int32_t offset;         /* keys of the next entry that were given out already */
    int32_t oldest, newest; /* positions outside oldest < pos <= newest are skipped */
} key_cursor;

/* Keys of list entries entry .. end that any query at a position first_pos .. last_pos sees. Blocks before the window
 * are passed over by halving, as the entries' positions ascend: a window's cost does not grow with the context. */
INLINE key_cursor key_cursor_at(
    const attention_call *call, int32_t entry, int32_t end, int32_t first_pos, int32_t last_pos
) {
    int32_t oldest = call->window > 0 && first_pos >= call->window ? first_pos - call->window : -1;
    for (int32_t high = end; oldest >= 0 && entry < high;) {
        int32_t middle = entry + (high - entry) / 2;
        if ((int64_t)call->block_pos[middle] + call->pool.block_tokens - 1 > oldest) high = middle;
        else entry = middle + 1;
    }
    return (key_cursor){.call = call, .entry = entry, .end = end, .oldest = oldest, .newest = last_pos};
}

/* The next run, of at most limit keys; false after the last. */
INLINE int next_run(key_cursor *cursor, int32_t limit, key_run *run) {
    const attention_call *call = cursor->call;
    for (; cursor->entry < cursor->end; cursor->entry++, cursor->offset = 0) {
        /* In 64 bits: positions come from the caller. */
        int64_t pos = call->block_pos[cursor->entry];
        int64_t low = cursor->oldest + 1 - pos, high = cursor->newest + 1 - pos;
        if (low < cursor->offset) low = cursor->offset;
        if (high > call->pool.block_tokens) high = call->pool.block_tokens;
        if (low >= high) continue;
        int64_t count = high - low < limit ? high - low : limit;
        *run = (key_run){call->block_ids[cursor->entry], (int32_t)low, (int32_t)count, (int32_t)(pos + low)};
        cursor->offset = (int32_t)(low + count);
        return 1;
    }
    return 0;
}

/* Where the run's keys of a KV head lie, and from there its values. */
INLINE const void *run_keys(const pool_view *pool, const key_run *run, int32_t head, int dtype) {
    int64_t index = run->block * pool->block_stride + pool->layer_offset +
                    ((int64_t)head * 2 * pool->block_tokens + run->offset) * pool->head_dim;
    return element(pool->data, index, dtype);
}

INLINE const void *run_values(const pool_view *pool, const void *keys, int dtype) {
    return element(keys, (int64_t)pool->block_tokens * pool->head_dim, dtype);
}

/* WIDTH elements from index i of a row of n, zeros beyond its end. */
INLINE vf load_padded(const void *row, int i, int n, int dtype) {
    if (i + WIDTH <= n) return load_as(row, i, dtype);
    float x[WIDTH] = {0};
    for (int j = 0; i + j < n; j++) x[j] = load_scalar_as(row, i + j, dtype);
    return load(x);
}

/* One query row, widened, scaled and padded to a multiple of WIDTH. */
INLINE void load_query(float *to, const void *row, int head_dim, float factor, int dtype) {
    for (int d = 0; d < head_dim; d += WIDTH) store(to + d, load_padded(row, d, head_dim, dtype) * splat(factor));
}

/* Factor of the scores before the soft-cap, and in units of log 2 where there is none. */
INLINE float query_factor(const attention_call *call) {
    return call->softcap > 0 ? call->scale / call->softcap : call->scale * LOG2_E;
}

/* Soft-cap and masks of one row group's scores [rows][stride]. key_pos holds keys (a multiple of WIDTH) positions,
 * INT32_MAX for padding. */
INLINE void hide_and_cap(
    const attention_call *call, float *scores, int rows, int stride, int keys, const int32_t *key_pos, int masked,
    const int32_t *query_pos
) {
    for (int r = 0; r < rows; r++, scores += stride) {
        if (call->softcap > 0) cap_scores(scores, keys, call->softcap * LOG2_E);
        if (masked) mask_scores(scores, key_pos, keys, query_pos[r], call->window);
    }
}
