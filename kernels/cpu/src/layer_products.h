/* Matrix products with packed weights: of floats, and of bfloat16 where the instruction set has such products or vectors
 * are of 8 floats: then pairs are widened, those of rows once for a call. (With 16 floats and no such products, torch's
 * serve.) Included once per instruction set, behind product_rows.h.
 *
 * A tile of TILE_ROWS rows and one panel's columns is summed up in registers. Panels are walked outermost, in pieces that
 * stay in the second-level cache beside the rows: all tiles use a piece before the next one, and each prefetches its share
 * of the next one meanwhile, so that memory is read all the time. Sums go through memory between two pieces; the order of
 * additions, and so the result, is that of the words, whatever the pieces and tiles.
 */
typedef uint32_t vu_mem __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define VECTORS (WIDTH == 16 ? 4 : 2) /* of a panel's columns */
#define COLUMNS (VECTORS * WIDTH)
#define TILE_ROWS 6 /* at most; times VECTORS sums, in 32 registers or 16 */
#define WORD_LINES (COLUMNS * 4 / 64) /* cache lines of a panel that hold a word of each column */
#define MOST_TILES 48 /* of a block of rows */
#define BLOCK_BYTES (512 << 10)
#define PIECE_WORDS 512     /* of a panel: 128 KiB, or 32 with vectors of 8 floats */
#define PREFETCH_BYTES 4096 /* ahead, where there is one tile */

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* 32-bit words of a row for one of a panel: 2 where a pair of bfloat16 is widened. */
INLINE int row_words(int dtype) {
#ifdef NATIVE_BFLOAT16
    (void)dtype;
    return 1;
#else
    return dtype == BFLOAT16 ? 2 : 1;
#endif
}

/* Of a tile; both halves of widened pairs take registers. */
INLINE int most_rows(int dtype) { return row_words(dtype) == 1 ? TILE_ROWS : 4; }

/* sum += x * w for a word of a panel, a float or a pair of bfloat16, and what a row has for it. */
INLINE vf add_product(vf sum, const uint32_t *x, vu w, int dtype) {
#ifdef NATIVE_BFLOAT16
    if (dtype == BFLOAT16)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int32_t)x[0]), (__m512bh)w);
#endif
    if (row_words(dtype) == 1) return sum + splat(as_float(x[0])) * (vf)w;
    sum += splat(as_float(x[0])) * (vf)(w << 16);
    return sum + splat(as_float(x[1])) * (vf)(w & 0xffff0000);
}

/* What a tile prefetches: a few cache lines with every word, a constant number. */
typedef struct {
    const char *from, *end;
} memory_range;

/* sums [rows, COLUMNS] of x [rows, count * row_words], rows stride apart, and a piece [count, COLUMNS]; added to what
 * sums hold if more. */
INLINE void sum_tile(
    float *sums, const uint32_t *x, int64_t stride, const uint32_t *piece, int64_t count, int rows, int more,
    memory_range ahead, int lines, int dtype
) {
    vf sum[TILE_ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++) sum[r][j] = more ? load(sums + r * COLUMNS + j * WIDTH) : (vf){0};
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; i++, piece += COLUMNS) {
        vu w[VECTORS];
        if (ahead.from < ahead.end) {
            prefetch_lines(ahead.from, lines * 64);
            ahead.from += lines * 64;
        }
        for (int j = 0; j < VECTORS; j++) w[j] = *(const vu_mem *)(piece + j * WIDTH);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < VECTORS; j++)
                sum[r][j] = add_product(sum[r][j], x + r * stride + i * row_words(dtype), w[j], dtype);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++) store(sums + r * COLUMNS + j * WIDTH, sum[r][j]);
}

INLINE void sum_tile_of(
    float *sums, const uint32_t *x, int64_t stride, const uint32_t *piece, int64_t count, int rows, int more,
    memory_range ahead, int lines, int dtype
) {
    switch (rows) { /* so that a tile's sums stay in registers */
        case 1: sum_tile(sums, x, stride, piece, count, 1, more, ahead, lines, dtype); break;
        case 2: sum_tile(sums, x, stride, piece, count, 2, more, ahead, lines, dtype); break;
        case 3: sum_tile(sums, x, stride, piece, count, 3, more, ahead, lines, dtype); break;
        case 4: sum_tile(sums, x, stride, piece, count, 4, more, ahead, lines, dtype); break;
        case 5: sum_tile(sums, x, stride, piece, count, 5, more, ahead, lines, dtype); break;
        default: sum_tile(sums, x, stride, piece, count, 6, more, ahead, lines, dtype); break;
    }
}

/* Rows first .. end of a product's input, in tiles of even size. */
typedef struct {
    const uint32_t *x;
    int64_t words, stride, rows; /* words of a panel, and of a row */
    int tiles;
} row_block;

INLINE int64_t tile_start(const row_block *block, int tile) { return block->rows * tile / block->tiles; }

/* sums [tiles][TILE_ROWS, COLUMNS] of all rows of a block and a panel [words, COLUMNS]; next is what will be read then. */
INLINE void sum_panel(
    float (*sums)[TILE_ROWS * COLUMNS], const row_block *block, const uint32_t *panel, const uint32_t *next, int dtype
) {
    const int64_t words = block->words;
    const int tiles = block->tiles, lines = (WORD_LINES + tiles - 1) / tiles;
    const int64_t most = tiles == 1 ? words : PIECE_WORDS;
    for (int64_t first = 0; first < words; first += most) {
        const int64_t count = words - first < most ? words - first : most, bytes = count * COLUMNS * 4;
        const uint32_t *piece = panel + first * COLUMNS;
        const char *then = (const char *)(first + count < words ? piece + count * COLUMNS : next);
        for (int tile = 0; tile < tiles; tile++) {
            const int64_t row = tile_start(block, tile);
            const int rows = (int)(tile_start(block, tile + 1) - row);
            const uint32_t *x = block->x + row * block->stride + first * row_words(dtype);
            memory_range ahead = {then + bytes * tile / tiles / 64 * 64, then + bytes * (tile + 1) / tiles / 64 * 64};
            if (tiles == 1) ahead = (memory_range){(const char *)piece + PREFETCH_BYTES, (const char *)INTPTR_MAX};
            float *to = sums[tile];
            if (lines == 4) sum_tile_of(to, x, block->stride, piece, count, rows, first > 0, ahead, 4, dtype);
            else if (lines == 2) sum_tile_of(to, x, block->stride, piece, count, rows, first > 0, ahead, 2, dtype);
            else sum_tile_of(to, x, block->stride, piece, count, rows, first > 0, ahead, 1, dtype);
        }
    }
}

INLINE void product_as(const product_call *call, int64_t first, int64_t end, int dtype) {
    const int64_t words = dtype == FLOAT32 ? call->in : call->in / 2, panel_words = words * COLUMNS;
    const int64_t stride = words * row_words(dtype);
    const int64_t gate_panels = call->activation >= 0 ? call->columns / COLUMNS : 0;
    const uint32_t *weight = call->weight;
    float sums[2][MOST_TILES][TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
    int64_t most = BLOCK_BYTES / (4 * stride) / most_rows(dtype);
    most = (most < 1 ? 1 : most > MOST_TILES ? MOST_TILES : most) * most_rows(dtype);
    for (int64_t start = 0; start < call->rows; start += most) {
        const int64_t rows = call->rows - start < most ? call->rows - start : most;
        const row_block block = {
            (const uint32_t *)call->x + start * stride, words, stride, rows,
            (int)((rows + most_rows(dtype) - 1) / most_rows(dtype))
        };
        for (int64_t panel = first; panel < end; panel++) {
            const uint32_t *plain = weight + panel * panel_words, *gated = plain + gate_panels * panel_words;
            sum_panel(sums[0], &block, plain, gate_panels ? gated : plain + panel_words, dtype);
            if (gate_panels) sum_panel(sums[1], &block, gated, plain + panel_words, dtype);
            for (int tile = 0; tile < block.tiles; tile++) {
                const int64_t row = tile_start(&block, tile);
                const int count = (int)(tile_start(&block, tile + 1) - row);
                write_tile(
                    call, sums[0][tile], sums[gate_panels ? 1 : 0][tile], start + row, count, panel * COLUMNS, COLUMNS,
                    dtype
                );
            }
        }
    }
}

static void product_floats(const product_call *call, int64_t first, int64_t end) {
    product_as(call, first, end, FLOAT32);
}

#if WIDTH == 8 || (defined(NATIVE_BFLOAT16) && !defined(AMX))
static void product_pairs(const product_call *call, int64_t first, int64_t end) {
    product_as(call, first, end, BFLOAT16);
}
#endif

#if WIDTH == 8
static size_t widened_bytes(const product_call *call) { return (size_t)(call->rows * call->in) * 4; }

static void widen_rows(const product_call *call, void *to) {
    const int64_t count = call->rows * call->in;
    float *out = to;
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(out + i, load_as(call->x, i, BFLOAT16));
    for (; i < count; i++) out[i] = load_scalar_as(call->x, i, BFLOAT16);
}
#endif
