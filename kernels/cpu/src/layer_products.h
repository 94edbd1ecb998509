/* Matrix products with packed weights, for vectors of 16 floats (in 16 registers a tile would be too small to pay);
 * products of bfloat16 where the instruction set has them. Included once per instruction set, behind layer_op_rows.h.
 *
 * A tile of TILE_ROWS rows and one panel's columns is summed up in registers. Panels are walked outermost: the first tile
 * reads a panel from memory, prefetching what follows, the others from the cache. Rows are walked in blocks that stay in
 * the second-level cache beside the panel.
 */
typedef uint32_t vu_mem __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define VECTORS 4 /* of a panel's columns */
#define COLUMNS (VECTORS * WIDTH)
#define TILE_ROWS 6 /* times VECTORS sums, in 32 registers */
#define BLOCK_BYTES (512 << 10)
#define PREFETCH_BYTES 4096

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* sum += x * w for 32-bit words: one float, or a pair of bfloat16. */
INLINE vf add_product(vf sum, uint32_t x, vu w, int dtype) {
#ifdef NATIVE_BFLOAT16
    if (dtype == BFLOAT16)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int32_t)x), (__m512bh)w);
#endif
    (void)dtype;
    return sum + splat(as_float(x)) * (vf)w;
}

/* sums [rows, COLUMNS] of x [rows, words] and a panel [words, COLUMNS]. */
INLINE void sum_tile(
    float *sums, const uint32_t *x, const uint32_t *panel, int64_t words, int rows, int prefetch, int dtype
) {
    vf sum[TILE_ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++) sum[r][j] = (vf){0};
#pragma GCC unroll 4
    for (int64_t i = 0; i < words; i++, panel += COLUMNS) {
        vu w[VECTORS];
        if (prefetch) prefetch_lines((const char *)panel + PREFETCH_BYTES, COLUMNS * 4);
        for (int j = 0; j < VECTORS; j++) w[j] = *(const vu_mem *)(panel + j * WIDTH);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < VECTORS; j++) sum[r][j] = add_product(sum[r][j], x[r * words + i], w[j], dtype);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++) store(sums + r * COLUMNS + j * WIDTH, sum[r][j]);
}

INLINE void sum_tile_of(
    float *sums, const uint32_t *x, const uint32_t *panel, int64_t words, int rows, int prefetch, int dtype
) {
    switch (rows) { /* so that a tile's sums stay in registers */
        case 1: sum_tile(sums, x, panel, words, 1, prefetch, dtype); break;
        case 2: sum_tile(sums, x, panel, words, 2, prefetch, dtype); break;
        case 3: sum_tile(sums, x, panel, words, 3, prefetch, dtype); break;
        case 4: sum_tile(sums, x, panel, words, 4, prefetch, dtype); break;
        case 5: sum_tile(sums, x, panel, words, 5, prefetch, dtype); break;
        default: sum_tile(sums, x, panel, words, 6, prefetch, dtype); break;
    }
}

/* Only the first tile of a panel prefetches: the others find it in the cache. */
INLINE void sum_rows(
    float *sums, const uint32_t *x, const uint32_t *panel, int64_t words, int rows, int first, int dtype
) {
    if (first) sum_tile_of(sums, x, panel, words, rows, 1, dtype);
    else sum_tile_of(sums, x, panel, words, rows, 0, dtype);
}

/* One vector of columns of one row: sum and, in a gated product, the sum of what is gated. */
INLINE vf finish_product(const product_call *call, vf sum, vf gated, int64_t at, int64_t column, int dtype) {
    const int64_t up_column = column + call->columns;
    if (call->bias) sum += load_as(call->bias, column, dtype);
    if (call->activation >= 0) {
        if (call->bias) gated += load_as(call->bias, up_column, dtype);
        sum = activate(sum, call->activation) * gated;
    }
    sum *= splat(call->scale);
    return call->residual ? sum + load_as(call->residual, at, dtype) : sum;
}

INLINE float finish_scalar(const product_call *call, float sum, float gated, int64_t at, int64_t column, int dtype) {
    if (call->bias) sum += load_scalar_as(call->bias, column, dtype);
    if (call->activation >= 0) {
        if (call->bias) gated += load_scalar_as(call->bias, column + call->columns, dtype);
        sum = activate(splat(sum), call->activation)[0] * gated;
    }
    sum *= call->scale;
    return call->residual ? sum + load_scalar_as(call->residual, at, dtype) : sum;
}

INLINE void write_tile(
    const product_call *call, const float *sums, const float *gated, int64_t row, int rows, int64_t panel, int dtype
) {
    const int64_t first = panel * COLUMNS;
    const int count = call->columns - first < COLUMNS ? (int)(call->columns - first) : COLUMNS;
    for (int r = 0; r < rows; r++) {
        const int64_t at = (row + r) * call->columns + first;
        int c = 0;
        for (; c + WIDTH <= count; c += WIDTH) {
            const int i = r * COLUMNS + c;
            store_vector(
                call->out, at + c, finish_product(call, load(sums + i), load(gated + i), at + c, first + c, dtype), dtype
            );
        }
        for (; c < count; c++) {
            const int i = r * COLUMNS + c;
            store_scalar(call->out, at + c, finish_scalar(call, sums[i], gated[i], at + c, first + c, dtype), dtype);
        }
    }
}

INLINE void product_as(const product_call *call, int64_t first, int64_t end, int dtype) {
    const int64_t words = dtype == FLOAT32 ? call->in : call->in / 2, panel_words = words * COLUMNS;
    const int64_t gate_panels = call->activation >= 0 ? call->columns / COLUMNS : 0;
    const uint32_t *x = call->x, *weight = call->weight;
    float sums[2][TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
    int64_t block = BLOCK_BYTES / (4 * words) / TILE_ROWS * TILE_ROWS;
    if (block < TILE_ROWS) block = TILE_ROWS;
    for (int64_t start = 0; start < call->rows; start += block) {
        const int64_t rows = call->rows - start < block ? call->rows - start : block;
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t panel = first; panel < end; panel++)
            for (int64_t tile = 0; tile < tiles; tile++) { /* of even size */
                const int64_t row = start + rows * tile / tiles, next = start + rows * (tile + 1) / tiles;
                const int count = (int)(next - row);
                for (int part = 0; part < (gate_panels ? 2 : 1); part++) {
                    const uint32_t *w = weight + (panel + part * gate_panels) * panel_words;
                    sum_rows(sums[part], x + row * words, w, words, count, !tile, dtype);
                }
                write_tile(call, sums[0], sums[gate_panels ? 1 : 0], row, count, panel, dtype);
            }
    }
}

static void product_panels(const product_call *call, int64_t first, int64_t end) {
#ifdef NATIVE_BFLOAT16
    if (call->dtype == BFLOAT16) product_as(call, first, end, BFLOAT16);
#endif
    if (call->dtype == FLOAT32) product_as(call, first, end, FLOAT32);
}
