/* Weights times bfloat16 values, which are read as pairs (pairs.h).
 *
 * Weights are float32 and so are the products: a result does not depend on how keys are split. Accumulated values are
 * kept separated: for every VECTOR dimensions WIDTH firsts, then WIDTH seconds.
 */
#define VECTOR_BYTES (4 * WIDTH) /* of memory */
#define MOST_ROWS 8              /* of a register tile of accumulated values */
#define MOST_VECTORS 4

/* acc = rescale * acc + weights [rows][KEYS] times values [count][dim], for vectors * VECTOR of the dimensions. rows
 * and vectors are constants. */
INLINE void weigh_tile(
    int rows, int vectors, const float *weights, const uint16_t *v, int count, int dim, float *acc,
    const float *rescale, const char *ahead
) {
    vf sum[MOST_ROWS][2 * MOST_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * vectors; i++) sum[r][i] = load(acc + r * dim + i * WIDTH) * splat(rescale[r]);
    for (int j = 0; j < count; j++) {
        vf x[2 * MOST_VECTORS];
        if (ahead && OUTRUNS_MEMORY && rows == 1)
            prefetch_pages(ahead + j * vectors * VECTOR_BYTES, vectors * VECTOR_BYTES);
        else if (ahead) prefetch_lines(ahead + j * vectors * VECTOR_BYTES, vectors * VECTOR_BYTES);
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) {
            vi y = load_pairs(v + j * dim + i * VECTOR);
            x[2 * i] = firsts(y);
            x[2 * i + 1] = seconds(y);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf weight = splat(weights[r * KEYS + j]);
#pragma GCC unroll 8
            for (int i = 0; i < 2 * vectors; i++) sum[r][i] += weight * x[i];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * vectors; i++) store(acc + r * dim + i * WIDTH, sum[r][i]);
}

/* For all dimensions; rows is a constant. As many vectors at a time as leave registers for the sums. */
INLINE void weigh_rows(
    int rows, const float *weights, const uint16_t *v, int count, int dim, float *acc, const float *rescale,
    const char *ahead
) {
#if WIDTH == 8
    const int most = rows <= 2 ? 2 : 1;
#else
    const int most = rows <= 2 ? 4 : rows <= 6 ? 2 : 1;
#endif
    for (int d = 0; d < dim;) {
        int left = (dim - d) / VECTOR, vectors;
        float *to = acc + d;
        const char *fetch = ahead ? ahead + (int64_t)d * count * 2 : NULL;
        if (most == 4 && left >= 4) weigh_tile(rows, vectors = 4, weights, v + d, count, dim, to, rescale, fetch);
        else if (most >= 2 && left >= 2) weigh_tile(rows, vectors = 2, weights, v + d, count, dim, to, rescale, fetch);
        else weigh_tile(rows, vectors = 1, weights, v + d, count, dim, to, rescale, fetch);
        d += vectors * VECTOR;
    }
}

/* For any number of rows up to MOST_ROWS. */
INLINE void weigh_run_of(
    int rows, const float *weights, const uint16_t *v, int count, int dim, float *acc, const float *rescale,
    const char *ahead
) {
    switch (rows) {
        case 1: weigh_rows(1, weights, v, count, dim, acc, rescale, ahead); break;
        case 2: weigh_rows(2, weights, v, count, dim, acc, rescale, ahead); break;
        case 3: weigh_rows(3, weights, v, count, dim, acc, rescale, ahead); break;
        case 4: weigh_rows(4, weights, v, count, dim, acc, rescale, ahead); break;
        case 5: weigh_rows(5, weights, v, count, dim, acc, rescale, ahead); break;
        case 6: weigh_rows(6, weights, v, count, dim, acc, rescale, ahead); break;
        case 7: weigh_rows(7, weights, v, count, dim, acc, rescale, ahead); break;
        default: weigh_rows(8, weights, v, count, dim, acc, rescale, ahead); break;
    }
}
