/* Scores of some queries while decoding, with AMX: tiles of keys as they lie in memory, times the queries in columns. It
 * takes a few queries for that to be the shorter way. */
#if NATIVE_TILES
#define LEAST_TILED_ROWS 3

INLINE int has_tiled_queries(const attention_call *call, const decode_rows *s) {
    return has_pairs(&call->pool) && s->rows >= LEAST_TILED_ROWS && s->rows <= TILE;
}

/* Queries [rows][dim] into columns of words [dim / 2][rows]. */
INLINE void queries_to_columns(uint32_t *to, const uint16_t *q, int rows, int dim) {
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < dim / 2; w++) memcpy(to + w * rows + r, q + r * dim + 2 * w, 4);
}

/* Tiles 0 and 1 are sums of TILE keys and rows queries each; 4 and 5 keys, 6 queries. */
INLINE void configure_query_tiles(int rows) {
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 7; tile++) {
        config.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? TILE_BYTES : rows * 4);
        config.rows[tile] = TILE;
    }
    load_tile_config(&config);
}

INLINE void begin_tiles(const attention_call *call, const decode_rows *s) {
    if (!has_tiled_queries(call, s)) return;
    const int dim = call->pool.head_dim, numbers = s->rows * dim;
    for (int i = 0; i < call->pool.kv_heads; i++)
        queries_to_columns(s->q_columns + i * numbers / 2, (const uint16_t *)s->q + i * numbers, s->rows, dim);
    configure_query_tiles(s->rows);
}

/* So that the system need not keep the tiles when it switches threads. */
INLINE void end_tiles(const attention_call *call, const decode_rows *s) {
    if (has_tiled_queries(call, s)) _tile_release();
}

/* Of TILE keys the sums of up to 4, 8 or 16 queries, as many floats of a key in a row, become rows of scores. */
INLINE void scores_of_sums(const float *sums, int rows, float factor, float *scores) {
    vf x[TILE];
    if (rows <= 4) {
        for (int i = 0; i < 4; i++) x[i] = load(sums + i * WIDTH) * splat(factor);
        EXCHANGE(4, 8, 2)
        EXCHANGE(4, 4, 1)
        EXCHANGE(4, 2, 2)
        EXCHANGE(4, 1, 1)
        for (int r = 0; r < rows; r++) store(scores + r * KEYS, x[r]);
    } else if (rows <= 8) {
        for (int i = 0; i < 8; i++) x[i] = load(sums + i * WIDTH) * splat(factor);
        EXCHANGE(8, 8, 4)
        EXCHANGE(8, 4, 2)
        EXCHANGE(8, 2, 1)
        EXCHANGE(8, 1, 4)
        for (int r = 0; r < rows; r++) store(scores + r * KEYS, x[r % 2 * 4 + r / 2]);
    } else {
        for (int i = 0; i < TILE; i++) x[i] = load(sums + i * WIDTH) * splat(factor);
        transpose(x);
        for (int r = 0; r < rows; r++) store(scores + r * KEYS, x[r]);
    }
}

/* Scores [rows][KEYS] with count keys, a multiple of TILE and at most KEYS, of queries in columns. The memory from ahead
 * on is prefetched, as much as the keys take. dim is a constant, or not. */
INLINE void score_tiles_of(
    const uint32_t *q, int rows, const uint16_t *k, int count, int dim, float factor, float *scores, const char *ahead
) {
    float sums[KEYS * TILE] __attribute__((aligned(64)));
    const int floats = rows <= 4 ? 4 : rows <= 8 ? 8 : TILE; /* of a key */
    for (int first = 0; first < count; first += 2 * TILE, k += 2 * TILE * dim) {
        const int both = count - first > TILE;
        float *to = sums + first * floats;
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < dim; d += TILE_DEPTH) {
            if (ahead) prefetch_lines(ahead, 2 * TILE * TILE_BYTES), ahead += 2 * TILE * TILE_BYTES;
            _tile_loadd(6, q + d / 2 * rows, rows * 4);
            _tile_loadd(4, k + d, dim * 2);
            _tile_dpbf16ps(0, 4, 6);
            if (both) {
                _tile_loadd(5, k + TILE * dim + d, dim * 2);
                _tile_dpbf16ps(1, 5, 6);
            }
        }
        _tile_stored(0, to, floats * 4);
        if (both) _tile_stored(1, to + TILE * floats, floats * 4);
    }
    for (int first = 0; first < count; first += TILE)
        scores_of_sums(sums + first * floats, rows, factor, scores + first);
}

static NOINLINE void score_tiles(
    const uint32_t *q, int rows, const uint16_t *k, int count, int dim, float factor, float *scores, const char *ahead
) {
    if (dim == 64) score_tiles_of(q, rows, k, count, 64, factor, scores, ahead);
    else if (dim == 128) score_tiles_of(q, rows, k, count, 128, factor, scores, ahead);
    else score_tiles_of(q, rows, k, count, dim, factor, scores, ahead);
}

/* Between begin_tiles and end_tiles: scores of a head's queries with the first of count keys; answers how many. */
INLINE int score_some_tiles(
    const attention_call *call, const decode_rows *s, int32_t head, const uint16_t *k, int count, const char *ahead
) {
    const int keys = has_tiled_queries(call, s) ? count / TILE * TILE : 0, dim = call->pool.head_dim;
    const uint32_t *columns = s->q_columns + (int64_t)head * s->rows * dim / 2;
    if (keys) score_tiles(columns, s->rows, k, keys, dim, query_factor(call), s->scores, ahead);
    return keys;
}
#else
INLINE void begin_tiles(const attention_call *call, const decode_rows *s) { (void)call, (void)s; }

INLINE void end_tiles(const attention_call *call, const decode_rows *s) { (void)call, (void)s; }

INLINE int score_some_tiles(
    const attention_call *call, const decode_rows *s, int32_t head, const uint16_t *k, int count, const char *ahead
) {
    (void)call, (void)s, (void)head, (void)k, (void)count, (void)ahead;
    return 0;
}
#endif
