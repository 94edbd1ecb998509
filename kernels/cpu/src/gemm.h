/* The one matrix product of the kernels: C [rows][n] = A [rows][depth] times B [depth][n], a tile of C in registers.
 *
 * Used for queries times transposed keys and for weights times values. n is a multiple of WIDTH.
 */
#define MAX_ROWS 6 /* rows of a register tile; MAX_ROWS * MAX_VECTORS accumulators leave room for B and a broadcast */
#if WIDTH == 16 || defined(__aarch64__)
#define MAX_VECTORS 4
#else
#define MAX_VECTORS 2
#endif

/* One register tile. With rescale, C becomes rescale[row] * C + A B. rows, vectors and dtype (of B) are constants. With
 * dtype PAIRS, A and B hold pairs of bfloat16, which count as one element each.
 * While B is read, memory at a distance of ahead bytes from it is prefetched; 0: none. */
INLINE void gemm_tile(
    int rows, int vectors, int depth, const float *a, int64_t lda, const void *b, int64_t ldb, int dtype, float *c,
    int64_t ldc, const float *rescale, int64_t ahead
) {
    vf acc[MAX_ROWS][MAX_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++)
            acc[i][j] = rescale ? load(c + i * ldc + j * WIDTH) * splat(rescale[i]) : (vf){0};
    for (int d = 0; d < depth; d++) {
        vf row[MAX_VECTORS];
        if (ahead) prefetch_lines(element(b, d * ldb, dtype) + ahead, vectors * WIDTH * element_size(dtype));
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) row[j] = load_as(b, d * ldb + j * WIDTH, dtype);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            if (dtype == PAIRS) {
                vi x = splat_int(((const int_mem *)a)[i * lda + d]);
#pragma GCC unroll 8
                for (int j = 0; j < vectors; j++) acc[i][j] = dot_pairs(acc[i][j], x, (vi)row[j]);
                continue;
            }
            vf x = splat(a[i * lda + d]);
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++) acc[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) store(c + i * ldc + j * WIDTH, acc[i][j]);
}

/* C, vectors * WIDTH columns wide, with vectors a constant. */
INLINE void gemm_columns(
    int rows, int vectors, int depth, const float *a, int64_t lda, const void *b, int64_t ldb, int dtype, float *c,
    int64_t ldc, const float *rescale, int64_t ahead
) {
    switch (rows) {
        case 1: gemm_tile(1, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
        case 2: gemm_tile(2, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
        case 3: gemm_tile(3, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
        case 4: gemm_tile(4, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
        case 5: gemm_tile(5, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
        default: gemm_tile(6, vectors, depth, a, lda, b, ldb, dtype, c, ldc, rescale, ahead); break;
    }
}

/* C of up to MAX_ROWS rows and n columns. B is row-major with leading dimension ldb if panel is 0; otherwise it is
 * packed in panels of MAX_VECTORS * WIDTH columns, each [panel rows][width] with ldb = MAX_VECTORS * WIDTH. */
INLINE void gemm(
    int rows, int n, int depth, const float *a, int64_t lda, const void *b, int64_t ldb, int panel, int dtype, float *c,
    int64_t ldc, const float *rescale, int64_t ahead
) {
    const int wide = MAX_VECTORS * WIDTH;
    for (int column = 0; column < n; column += wide) {
        int64_t offset = panel ? (int64_t)column * panel : column;
        const void *at = element(b, offset, dtype);
        int vectors = (n - column < wide ? n - column : wide) / WIDTH;
        if (vectors == MAX_VECTORS)
            gemm_columns(rows, MAX_VECTORS, depth, a, lda, at, ldb, dtype, c + column, ldc, rescale, ahead);
#if MAX_VECTORS == 4
        else if (vectors == 3) gemm_columns(rows, 3, depth, a, lda, at, ldb, dtype, c + column, ldc, rescale, ahead);
        else if (vectors == 2) gemm_columns(rows, 2, depth, a, lda, at, ldb, dtype, c + column, ldc, rescale, ahead);
#endif
        else gemm_columns(rows, 1, depth, a, lda, at, ldb, dtype, c + column, ldc, rescale, ahead);
    }
}
