/* Reading memory and nothing else, as fast as one core can: what attention over the same bytes is measured against. */

/* bytes: a multiple of 8 * 4 * WIDTH is read, what is left over is not. Answers a sum of all that was read. */
static uint32_t read_bytes(const char *from, int64_t bytes) {
    vu sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) sums[i] = (vu){0};
    for (int64_t at = 0; at + 32 * WIDTH <= bytes; at += 32 * WIDTH)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums[i] += (vu)load_int((const int32_t *)(from + at) + i * WIDTH);
    uint32_t sum = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < WIDTH; j++) sum += sums[i][j];
    return sum;
}
