/* Decoding over keys and values that are widened as they are loaded, or were before: all that are not read as pairs. */
#define TILE_KEYS 4 /* scored together for several rows */

/* Dot products of some queries with some keys; keys * rows is WIDTH. Keys beyond count repeat the last. Memory at a
 * distance of ahead bytes from the keys is prefetched; 0: none. */
INLINE void dot_tile(
    int keys, int rows, const float *q, int q_rows, const void *k, int64_t ldk, int count, int dim, int dtype,
    float *scores, int64_t ahead
) {
    const char *key[WIDTH];
    const float *query[WIDTH];
    vf acc[WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) key[j] = element(k, (j < count ? j : count - 1) * ldk, dtype);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) query[r] = q + (r < q_rows ? r : q_rows - 1) * dim;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) acc[i] = (vf){0};
    for (int d = 0; d < dim; d += WIDTH) {
        vf x[WIDTH];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) x[r] = load(query[r] + d);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) {
            if (ahead && d * element_size(dtype) % 64 == 0) prefetch_lines(element(key[j], d, dtype) + ahead, 1);
            vf y = load_as(key[j], d, dtype);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) acc[r * keys + j] += x[r] * y;
        }
    }
    vf sums = sum_each(acc);
    float flat[WIDTH];
    store(flat, sums);
    for (int r = 0; r < rows && r < q_rows; r++) memcpy(scores + r * KEYS, flat + r * keys, (size_t)keys * 4);
}

/* One KV head over one run: its keys k and values v, rows ld apart. ahead as in gemm_tile, from both of them. */
INLINE void decode_head(
    const attention_call *call, const decode_rows *s, int32_t head, const void *k, const void *v, int64_t ld, int count,
    const int32_t *key_pos, int masked, int64_t ahead, int dtype
) {
    const int rows = s->rows, dim = s->padded_dim, keys = (int)round_up(count, WIDTH);
    const float *q = s->q + (int64_t)head * rows * dim;
    row_state *states = s->states + (int64_t)head * rows;

    for (int j = 0; rows == 1 && j < count; j += WIDTH)
        dot_tile(WIDTH, 1, q, 1, element(k, j * ld, dtype), ld, count - j, dim, dtype, s->scores + j, ahead);
    for (int j = 0; rows > 1 && j < count; j += TILE_KEYS)
        for (int r = 0; r < rows; r += WIDTH / TILE_KEYS)
            dot_tile(
                TILE_KEYS, WIDTH / TILE_KEYS, q + r * dim, rows - r, element(k, j * ld, dtype), ld, count - j, dim,
                dtype, s->scores + r * KEYS + j, r == 0 ? ahead : 0
            );
    hide_and_cap(call, s->scores, rows, KEYS, keys, key_pos, masked, s->pos);
    for (int r = 0; r < rows; r++) online_softmax(&states[r], s->scores + r * KEYS, keys, 1.0f);
    const int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, most = (rows + tiles - 1) / tiles;
    for (int r = 0; r < rows; r += most) {
        int n = rows - r < most ? rows - r : most;
        float rescale[MAX_ROWS], *acc = s->acc + ((int64_t)head * rows + r) * dim;
        for (int i = 0; i < n; i++) rescale[i] = states[r + i].rescale;
        gemm(n, dim, count, s->scores + r * KEYS, KEYS, v, ld, 0, dtype, acc, dim, rescale, r == 0 ? ahead : 0);
    }
}
