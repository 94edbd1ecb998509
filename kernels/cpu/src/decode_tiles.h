/* Scores of some queries while decoding, with AMX: tiles of keys as they lie in memory, times the queries in columns. It
 * takes a few queries for that to be the shorter way. */
#define LEAST_TILED_ROWS 3

INLINE int has_tiled_queries(const attention_call *call, int rows) {
    return has_pairs(&call->pool) && rows >= LEAST_TILED_ROWS && rows <= TILE;
}

/* Queries [rows][dim] into columns of words [dim / 2][rows]. */
INLINE void queries_to_columns(uint32_t *to, const uint16_t *q, int rows, int dim) {
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < dim / 2; w++) memcpy(to + w * rows + r, q + r * dim + 2 * w, 4);
}

/* Tiles 0 .. 3 are sums of TILE keys and rows queries each; 4 and 5 keys, 6 queries. */
INLINE void configure_query_tiles(int rows) {
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 7; tile++) {
        config.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? TILE_BYTES : rows * 4);
        config.rows[tile] = TILE;
    }
    load_tile_config(&config);
}

/* Of TILE keys the sums of up to 4, 8 or 16 queries, as many floats of a key in a row, become rows of scores. With n
 * vectors, a stage exchanges the bit of a vector's number that is worth d for the bit of a lane's that is worth s. */
#define EXCHANGE(n, s, d)                                                                                              \
    _Pragma("GCC unroll 16") for (int i = 0; i < n; i++) if (!(i & d)) {                                               \
        vf low = LOW_##s(x[i], x[i + d]), high = HIGH_##s(x[i], x[i + d]);                                             \
        x[i] = low;                                                                                                    \
        x[i + d] = high;                                                                                               \
    }

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
