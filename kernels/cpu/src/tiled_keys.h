/* Keys and values of bfloat16 packed for AMX (tiles.h), and its products of them with many rows.
 *
 * Keys and values are packed in pairs, tile after tile. Two dimensions of a key that
 * are neighbours make a pair; of values, those of two keys that lie TILE apart: two vectors of weights are then pairs,
 * lane by lane.
 */
#define TILED_KEYS 192 /* packed at once. With a power of two, the parts of values would fall on each other in L1 */

/* Keys are [keys / TILE][dim / 2][TILE] words, values [dim / TILE][keys / 2][TILE]: of every VECTOR dimensions first
 * the firsts, then the seconds, as in pairs.h. */
typedef struct {
    int32_t *keys, *values;
    int32_t pos[TILED_KEYS]; /* ascending, then INT32_MAX for padding */
    int count, padded_count; /* the latter is a multiple of TILE_DEPTH */
} tiled_keys;

/* Scores [BLOCK_ROWS][TILED_KEYS] of queries [BLOCK_ROWS][dim] with count keys, a multiple of TILE_DEPTH. */
static NOINLINE void score_block(const uint16_t *q, int dim, const int32_t *keys, int count, float *scores) {
    finish_stores();
    for (int j = 0; j < count; j += 2 * TILE, keys += TILE * dim) {
        const int32_t *next_keys = keys + TILE * dim / 2;
        zero_square();
        for (int d = 0; d < dim; d += TILE_DEPTH) {
            _tile_loadd(4, q + d, dim * 2);
            _tile_loadd(5, q + TILE * dim + d, dim * 2);
            _tile_loadd(6, keys + d / 2 * TILE, TILE_BYTES);
            _tile_loadd(7, next_keys + d / 2 * TILE, TILE_BYTES);
            multiply_tiles();
        }
        store_square(scores + j, TILED_KEYS);
    }
}

/* Scores of BLOCK_ROWS rows, and in their place weights, sums of three bfloat16: of each TILE_DEPTH weights of a row
 * the high parts, then the middle ones. */
typedef struct {
    float scores[BLOCK_ROWS][TILED_KEYS], low[BLOCK_ROWS][TILED_KEYS / 2];
} weight_block;

/* acc [BLOCK_ROWS][dim] += weights, exact or without their low parts, times values. */
static NOINLINE void weigh_block(
    const weight_block *weights, int exact, const int32_t *values, int count, int dim, float *acc
) {
    const int64_t row = sizeof weights->scores[0], low_row = sizeof weights->low[0];
    finish_stores();
    for (int d = 0; d < dim; d += 2 * TILE) {
        const int32_t *firsts = values + d * (TILED_KEYS / 2), *seconds = firsts + TILE * (TILED_KEYS / 2);
        float *to = acc + d;
        load_square(to, dim);
        for (int j = 0; j < count; j += TILE_DEPTH) {
            _tile_loadd(4, &weights->scores[0][j], row);
            _tile_loadd(5, &weights->scores[TILE][j], row);
            _tile_loadd(6, firsts + j / 2 * TILE, TILE_BYTES);
            _tile_loadd(7, seconds + j / 2 * TILE, TILE_BYTES);
            multiply_tiles();
            _tile_loadd(4, &weights->scores[0][j + TILE], row);
            _tile_loadd(5, &weights->scores[TILE][j + TILE], row);
            multiply_tiles();
            if (!exact) continue;
            _tile_loadd(4, &weights->low[0][j / 2], low_row);
            _tile_loadd(5, &weights->low[TILE][j / 2], low_row);
            multiply_tiles();
        }
        store_square(to, dim);
    }
}

/* Keys into columns, a square of TILE keys and VECTOR dimensions at a time. */
INLINE void pack_keys(int32_t *to, const uint16_t *const *rows, int count, int dim) {
    for (int j = 0; j < count; j += TILE)
        for (int d = 0; d < dim; d += VECTOR, to += TILE * TILE) {
            vf x[TILE];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) x[i] = (vf)load_pairs(rows[j + i] + d);
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) store((float *)to + i * TILE, x[i]);
        }
}

/* Words of two bfloat16: the high halves of a, then of b. */
INLINE vf pair_high_halves(vi a, vi b) {
    return (vf)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)((vu)a >> 16), (__m512i)b);
}

/* Values into pairs of two keys. */
INLINE void pack_values(int32_t *to, const uint16_t *const *rows, int count, int dim) {
    for (int i = 0; i < count / 2; i++, to += TILE)
        for (int d = 0; d < dim; d += VECTOR) {
            const int j = i / TILE * TILE_DEPTH + i % TILE;
            vi a = load_pairs(rows[j] + d), b = load_pairs(rows[j + TILE] + d);
            float *firsts = (float *)to + d * (TILED_KEYS / 2), *seconds = firsts + TILE * (TILED_KEYS / 2);
            store(firsts, pair_high_halves(a << 16, b << 16));
            store(seconds, pair_high_halves(a, b));
        }
}

/* Packs the next keys under the cursor, from as many blocks as it takes. Padding repeats the last key. */
INLINE int pack_tile(tiled_keys *tile, key_cursor *cursor, int32_t head) {
    const pool_view *pool = &cursor->call->pool;
    const uint16_t *keys[TILED_KEYS], *values[TILED_KEYS];
    key_run run;
    int count = 0;
    while (count < TILED_KEYS && next_run(cursor, TILED_KEYS - count, &run)) {
        keys[count] = run_keys(pool, &run, head, BFLOAT16);
        values[count] = run_values(pool, keys[count], BFLOAT16);
        tile->pos[count] = run.pos;
        for (int end = count++ + run.count; count < end; count++) {
            keys[count] = keys[count - 1] + pool->head_dim;
            values[count] = values[count - 1] + pool->head_dim;
            tile->pos[count] = tile->pos[count - 1] + 1;
        }
    }
    tile->count = count;
    tile->padded_count = (int)round_up(count, TILE_DEPTH);
    for (; count < tile->padded_count; count++) {
        keys[count] = keys[count - 1];
        values[count] = values[count - 1];
        tile->pos[count] = INT32_MAX;
    }
    pack_keys(tile->keys, keys, count, pool->head_dim);
    pack_values(tile->values, values, count, pool->head_dim);
    return count;
}
