/* Matrix products of bfloat16 with AMX; included behind product_rows.h and tiles.h.
 *
 * A block of up to BLOCK_ROWS rows and a panel's columns is summed up in four tiles, TILE words of the rows and of the
 * panel at a time. So many products are made in the time that a byte of weights takes to arrive that memory is the limit
 * up to a hundred rows: panels are walked outermost, and stay in the second-level cache beside the rows; all blocks use a
 * panel before the next one, and each prefetches its share of what is read then. Of many long rows only a piece stays
 * there: then panels are walked in groups, a piece of all of them before the next piece, and sums go through memory. The
 * order of additions, and so the result, is that of the words, for any number of rows.
 *
 * A block's sums are written while the next block's are made, a row now and then: written at once, they would keep the
 * tiles waiting, since the processor looks only a few hundred instructions ahead.
 */
#define AMX_COLUMNS (2 * TILE)
#define ROWS_BYTES (1 << 20)       /* of the input, that a panel is multiplied with in turn */
#define AMX_AHEAD_BYTES (16 << 10) /* prefetched that far ahead, where there is one block */
#define GROUP_BLOCKS 8             /* of rows so long that fewer would stay: they are walked in pieces, */
#define GROUP_WORDS 768            /* of so many words at most, */
#define GROUP_SUMS 256             /* and so many blocks of sums: 1 MiB */

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

typedef float amx_sums[BLOCK_ROWS * AMX_COLUMNS];

/* What is left to write of a block: of sums and gated [rows, AMX_COLUMNS], some rows with every TILE words. */
typedef struct {
    const float *sums, *gated;
    int64_t row, column;
    int rows, at_once;
} late_rows;

INLINE void write_late(const product_call *call, late_rows *late, int rows) {
    for (; rows > 0 && late->rows > 0; rows--, late->rows--) {
        write_row(call, late->sums, late->gated, late->row, late->column, AMX_COLUMNS, BFLOAT16);
        late->sums += AMX_COLUMNS;
        late->gated += AMX_COLUMNS;
        late->row++;
    }
}

/* sums [rows, AMX_COLUMNS] of arranged rows and a panel. rows, a constant, is that of one tile or of two; count is a
 * multiple of TILE, or less than it, and then more is added to sums. */
INLINE void sum_words(
    const product_call *call, float *sums, const uint32_t *x, int rows, const uint32_t *panel, int64_t count, int more,
    lines_ahead ahead, late_rows *late
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
        write_late(call, late, late->at_once);
    }
    store_square(sums, AMX_COLUMNS);
}

/* The same of one or two tiles of rows and any number of words, of which the last TILE need not be whole. */
INLINE void sum_block(
    const product_call *call, float *sums, const uint32_t *x, int rows, const uint32_t *panel, int64_t count, int more,
    lines_ahead ahead, late_rows *late
) {
    const int64_t whole = count / TILE * TILE, rest = count - whole;
    if (rows > TILE) sum_words(call, sums, x, BLOCK_ROWS, panel, whole, more, ahead, late);
    else sum_words(call, sums, x, TILE, panel, whole, more, ahead, late);
    if (!rest) return;
    x += tile_rows(rows) * whole;
    panel += whole * AMX_COLUMNS;
    configure_tiles((int)rest);
    if (rows > TILE) sum_words(call, sums, x, BLOCK_ROWS, panel, rest, 1, (lines_ahead){0}, late);
    else sum_words(call, sums, x, TILE, panel, rest, 1, (lines_ahead){0}, late);
    configure_tiles(TILE);
}

/* The share of a block in prefetching words of a panel; with one block each panel is prefetched where it is used. */
INLINE lines_ahead share(const uint32_t *panel, const uint32_t *next, int64_t words, int block, int blocks) {
    const int64_t lines = words * AMX_COLUMNS * 4 / 64;
    const char *from = (const char *)next;
    if (blocks == 1)
        return (lines_ahead){(const char *)panel + AMX_AHEAD_BYTES, (const char *)INTPTR_MAX, TILE * AMX_COLUMNS * 4 / 64};
    return (lines_ahead){
        from + lines * block / blocks * 64, from + lines * (block + 1) / blocks * 64,
        (TILE * AMX_COLUMNS * 4 / 64 + blocks - 1) / blocks
    };
}

/* How many rows, panels and words are gone through before the next ones. */
typedef struct {
    int64_t rows, panels, words;
} amx_walk;

INLINE amx_walk walk_of(const product_call *call) {
    const int64_t words = call->in / 2, block_bytes = BLOCK_ROWS * 4 * arranged_words(words);
    const int64_t most = ROWS_BYTES / block_bytes, blocks = (call->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t pieces = (words + GROUP_WORDS - 1) / GROUP_WORDS;
    if (most >= GROUP_BLOCKS || blocks == 1 || blocks * block_bytes <= ROWS_BYTES / 2)
        return (amx_walk){(most >= GROUP_BLOCKS ? most : blocks) * BLOCK_ROWS, 1, words};
    return (amx_walk){
        GROUP_BLOCKS * BLOCK_ROWS, GROUP_SUMS / GROUP_BLOCKS / (call->activation >= 0 ? 2 : 1),
        arranged_words((words + pieces - 1) / pieces)
    };
}

/* The rows that are being gone through. */
typedef struct {
    const product_call *call;
    const uint32_t *x; /* arranged */
    int64_t first;
    int rows, blocks;
    amx_sums *sums;  /* of so many blocks in turn; twice as many, if the product is gated */
    int slots, slot;
    late_rows late;
} amx_pass;

/* Words word .. word + count of a panel with all blocks of rows. In the packed weights they lie at word at, and what is
 * read next at word next. */
INLINE void pass_panel(amx_pass *pass, int64_t panel, int64_t word, int64_t count, int64_t at, int64_t next) {
    const product_call *call = pass->call;
    const int64_t words = call->in / 2;
    const int gated = call->activation >= 0, steps = (int)(arranged_words(count) / TILE) * (1 + gated);
    const uint32_t *weight = call->weight, *up = weight + call->columns * words;
    for (int block = 0; block < pass->blocks; block++, pass->slot = (pass->slot + 1) % pass->slots) {
        const int size = block_rows(pass->rows, block);
        const uint32_t *x = pass->x + block * BLOCK_ROWS * arranged_words(words) + tile_rows(size) * word;
        float *sums = pass->sums[pass->slot * (1 + gated)], *up_sums = sums;
        lines_ahead ahead = share(weight + at, weight + next, count, block, pass->blocks);
        sum_block(call, sums, x, size, weight + at, count, word > 0, ahead, &pass->late);
        if (gated) {
            up_sums = pass->sums[pass->slot * 2 + 1];
            ahead = share(up + at, up + next, count, block, pass->blocks);
            sum_block(call, up_sums, x, size, up + at, count, word > 0, ahead, &pass->late);
        }
        write_late(call, &pass->late, pass->late.rows);
        if (word + count == words)
            pass->late = (late_rows){
                sums, up_sums, pass->first + block * BLOCK_ROWS, panel * AMX_COLUMNS, size, (size + steps - 1) / steps
            };
    }
}

/* Panels first .. end; sums is room for two blocks, or, if panels are walked in groups, for all those of a group; for
 * twice as many, if the product is gated. x is arranged. */
static void walk_panels(const product_call *call, int64_t first, int64_t end, const amx_walk walk, amx_sums *sums) {
    const int64_t words = call->in / 2, panel_words = words * AMX_COLUMNS;
    amx_pass pass = {.call = call, .x = call->x, .sums = sums, .slots = 2};
    configure_tiles(TILE);
    for (; pass.first < call->rows; pass.first += walk.rows, pass.x += walk.rows * arranged_words(words)) {
        pass.rows = (int)(call->rows - pass.first < walk.rows ? call->rows - pass.first : walk.rows);
        pass.blocks = (pass.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        for (int64_t group = first, last; group < end; group = last) {
            last = end - group < walk.panels ? end : group + walk.panels;
            if (walk.panels > 1) pass.slot = 0, pass.slots = (int)(last - group) * pass.blocks;
            for (int64_t word = 0, count; word < words; word += count) {
                count = words - word < walk.words ? words - word : walk.words;
                const int64_t then = word + count < words ? group * panel_words + (word + count) * AMX_COLUMNS
                                                          : last * panel_words;
                for (int64_t panel = group; panel < last; panel++) {
                    const int64_t at = panel * panel_words + word * AMX_COLUMNS;
                    pass_panel(&pass, panel, word, count, at, panel + 1 < last ? at + panel_words : then);
                }
            }
        }
    }
    write_late(call, &pass.late, pass.late.rows);
    _tile_release();
}

static NOINLINE void walk_groups(
    const product_call *call, int64_t first, int64_t end, const amx_walk walk
) {
    amx_sums sums[GROUP_SUMS] __attribute__((aligned(64)));
    walk_panels(call, first, end, walk, sums);
}

/* x is arranged. */
static void product_amx(const product_call *call, int64_t first, int64_t end) {
    amx_sums sums[4] __attribute__((aligned(64)));
    const amx_walk walk = walk_of(call);
    if (walk.panels == 1) walk_panels(call, first, end, walk, sums);
    else walk_groups(call, first, end, walk);
}
