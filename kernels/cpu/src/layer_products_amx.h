/* Matrix products of bfloat16 with AMX; included behind product_rows.h and tiles.h.
 *
 * A block of up to BLOCK_ROWS rows and a panel's columns is summed up in four tiles, TILE words of the rows and of the
 * panel at a time. So many products are made in the time that a byte of weights takes to arrive that memory is the limit
 * up to a hundred rows: panels are walked outermost, and stay in the second-level cache beside the rows; all blocks use a
 * panel before the next one, and each prefetches its share of what is read then. The order of additions, and so the
 * result, is that of the words, for any number of rows.
 */
#define AMX_COLUMNS (2 * TILE)
#define ROWS_BYTES (1 << 20) /* of the input, that all panels are multiplied with in turn */
#define LEAST_BLOCKS 4       /* of them: else weights would be read anew for each block of very long rows */
#define AMX_AHEAD_BYTES (16 << 10) /* prefetched that far ahead, where there is one block */

/* The input in the order of use: for each block and each TILE words, those of all its rows (as many as a tile has, or as
 * two have). In the order of rows each line of a tile would lie in another page. */
INLINE int64_t arranged_words(int64_t words) { return (words + TILE - 1) / TILE * TILE; }

INLINE int block_rows(int64_t rows, int64_t block) {
    return (int)(rows - block * BLOCK_ROWS < BLOCK_ROWS ? rows - block * BLOCK_ROWS : BLOCK_ROWS);
}

INLINE int tile_rows(int rows) { return rows > TILE ? BLOCK_ROWS : TILE; }

static size_t amx_rows_bytes(const product_call *call) {
    return (size_t)((call->rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS * arranged_words(call->in / 2) * 4);
}

static void arrange_amx_rows(const product_call *call, void *to) {
    const int64_t words = call->in / 2;
    uint32_t *next = to;
    for (int64_t block = 0; block * BLOCK_ROWS < call->rows; block++) {
        const uint32_t *from = (const uint32_t *)call->x + block * BLOCK_ROWS * words;
        const int rows = block_rows(call->rows, block), lines = tile_rows(rows);
        for (int64_t first = 0; first < words; first += TILE)
            for (int r = 0; r < lines; r++, next += TILE) {
                const int64_t count = words - first < TILE ? words - first : TILE;
                if (r < rows && count == TILE) memcpy(next, from + r * words + first, TILE * 4);
                else {
                    memset(next, 0, TILE * 4);
                    if (r < rows) memcpy(next, from + r * words + first, (size_t)count * 4);
                }
            }
    }
}

/* What a block prefetches: some cache lines with every TILE words. */
typedef struct {
    const char *from, *end;
    int lines;
} lines_ahead;

/* sums [rows, AMX_COLUMNS] of arranged rows and a panel. rows, a constant, is that of one tile or of two; count is a
 * multiple of TILE, or less than it, and then more is added to sums. */
INLINE void sum_words(
    float *sums, const uint32_t *x, int rows, const uint32_t *panel, int64_t count, int more, lines_ahead ahead
) {
    const int both = rows > TILE;
    if (more) load_square(sums, AMX_COLUMNS);
    else zero_square();
    for (int64_t i = 0; i < count; i += TILE, x += rows * TILE, panel += TILE * AMX_COLUMNS) {
        _tile_loadd(4, x, TILE * 4);
        _tile_loadd(6, panel, AMX_COLUMNS * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE, AMX_COLUMNS * 4);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + TILE * TILE, TILE * 4);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int line = 0; line < ahead.lines && ahead.from < ahead.end; line++, ahead.from += 64)
            __builtin_prefetch(ahead.from, 0, 2);
    }
    store_square(sums, AMX_COLUMNS);
}

INLINE void sum_block_of(
    float *sums, const uint32_t *x, int rows, const uint32_t *panel, int64_t words, lines_ahead ahead
) {
    const int64_t whole = words / TILE * TILE;
    sum_words(sums, x, rows, panel, whole, 0, ahead);
    if (whole == words) return;
    configure_tiles((int)(words - whole));
    sum_words(sums, x + rows * whole, rows, panel + whole * AMX_COLUMNS, words - whole, 1, (lines_ahead){0});
    configure_tiles(TILE);
}

/* Some rows of the input, arranged. */
typedef struct {
    const uint32_t *x;
    int64_t words;
    int rows, blocks;
} amx_rows;

/* sums of one block and a panel [words, AMX_COLUMNS]; next is the panel that is read when all blocks have used it. */
INLINE void sum_block(float *sums, const amx_rows *in, int block, const uint32_t *panel, const uint32_t *next) {
    const int64_t words = in->words, lines = words * AMX_COLUMNS * 4 / 64;
    const uint32_t *x = in->x + block * BLOCK_ROWS * arranged_words(words);
    const char *then = (const char *)next;
    lines_ahead ahead = {
        then + lines * block / in->blocks * 64, then + lines * (block + 1) / in->blocks * 64,
        (TILE * AMX_COLUMNS * 4 / 64 + in->blocks - 1) / in->blocks
    };
    if (in->blocks == 1) ahead.from = (const char *)panel + AMX_AHEAD_BYTES, ahead.end = (const char *)INTPTR_MAX;
    if (block_rows(in->rows, block) > TILE) sum_block_of(sums, x, BLOCK_ROWS, panel, words, ahead);
    else sum_block_of(sums, x, TILE, panel, words, ahead);
}

/* x is arranged. */
static void product_amx(const product_call *call, int64_t first, int64_t end) {
    const int64_t words = call->in / 2, panel_words = words * AMX_COLUMNS, row_bytes = 4 * arranged_words(words);
    const int64_t gate_panels = call->activation >= 0 ? call->columns / AMX_COLUMNS : 0;
    const uint32_t *weight = call->weight;
    float sums[2][BLOCK_ROWS * AMX_COLUMNS] __attribute__((aligned(64)));
    int64_t most = ROWS_BYTES / row_bytes / BLOCK_ROWS;
    most = (most < LEAST_BLOCKS ? LEAST_BLOCKS : most) * BLOCK_ROWS;
    configure_tiles(TILE);
    for (int64_t start = 0; start < call->rows; start += most) {
        const int rows = (int)(call->rows - start < most ? call->rows - start : most);
        const amx_rows in = {
            (const uint32_t *)call->x + start * arranged_words(words), words, rows, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS
        };
        for (int64_t panel = first; panel < end; panel++) {
            const uint32_t *plain = weight + panel * panel_words, *gated = plain + gate_panels * panel_words;
            for (int block = 0; block < in.blocks; block++) {
                sum_block(sums[0], &in, block, plain, plain + panel_words);
                if (gate_panels) sum_block(sums[1], &in, block, gated, gated + panel_words);
                write_tile(
                    call, sums[0], sums[gate_panels ? 1 : 0], start + block * BLOCK_ROWS, block_rows(rows, block),
                    panel * AMX_COLUMNS, AMX_COLUMNS, BFLOAT16
                );
            }
        }
    }
    _tile_release();
}
