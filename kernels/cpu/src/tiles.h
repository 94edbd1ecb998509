/* Tiles of bfloat16 and their products, with AMX.
 *
 * A product of tiles adds 16 rows of 32 bfloat16 times 32 rows of 16 to 16 x 16 float32, and wants the second in pairs:
 * two numbers of a column in a word.
 */
#define TILE 16       /* rows of a tile, and words of a row */
#define TILE_DEPTH 32 /* bfloat16 numbers of a row */
#define TILE_BYTES 64 /* of a row */
#define BLOCK_ROWS 32 /* rows that are computed at once: two tiles, for which the other side is loaded once */

/* To be called before tiles are loaded, or configured, from what has just been written: the compiler does not know that
 * this reads memory. */
INLINE void finish_stores(void) { __asm__ volatile("" ::: "memory"); }

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Tiles are zero afterwards; it takes as long as several products. */
INLINE void load_tile_config(const tile_config *config) {
    finish_stores();
    _tile_loadconfig(config);
}

/* Tiles 0 .. 3 are a square of BLOCK_ROWS rows and columns, sums of products; 4 and 5 are rows, 6 and 7 columns, of so
 * many words (TILE, or what is left in the end). */
INLINE void configure_tiles(int words) {
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? words * 4 : TILE_BYTES);
        config.rows[tile] = (uint8_t)(tile >= 6 ? words : TILE);
    }
    load_tile_config(&config);
}

INLINE void zero_square(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Adds products of 4 and 5 with 6 and 7. */
INLINE void multiply_tiles(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void load_square(const float *from, int row_floats) {
    const int64_t row = row_floats * (int64_t)sizeof(float);
    _tile_loadd(0, from, row);
    _tile_loadd(1, from + TILE, row);
    _tile_loadd(2, from + TILE * row_floats, row);
    _tile_loadd(3, from + TILE * row_floats + TILE, row);
}

INLINE void store_square(float *to, int row_floats) {
    const int64_t row = row_floats * (int64_t)sizeof(float);
    _tile_stored(0, to, row);
    _tile_stored(1, to + TILE, row);
    _tile_stored(2, to + TILE * row_floats, row);
    _tile_stored(3, to + TILE * row_floats + TILE, row);
}
