/* Compares the native kernels with attention written down in float64: a program, so that an emulator can run it.
 *
 * Prints the instruction set, the number of comparisons and the largest errors; fails if one is too large.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

#define BLOCKS 4
#define TOKENS 64
#define KV_HEADS 2
#define TOLERANCE 1e-5 /* of sums of float32 over 200 keys, with scores and values of magnitude about 3 */
#define ROUNDED_TOLERANCE 4e-3 /* where weights are rounded to bfloat16: at most 2**-9 of each */

static uint32_t random_state = 1;
static double random_number(void) { /* uniform, with the variance of a normal distribution */
    random_state = random_state * 1664525u + 1013904223u;
    return ((random_state >> 8) / 16777216.0 - 0.5) * 3.46;
}

static double element(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    if (dtype == FLOAT16) return (double)((const _Float16 *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void fill(void *p, int64_t n, int dtype) {
    for (int64_t i = 0; i < n; i++) {
        float x = (float)random_number();
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (dtype == FLOAT32) ((float *)p)[i] = x;
        else if (dtype == FLOAT16) ((_Float16 *)p)[i] = (_Float16)x;
        else ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
    }
}

/* The largest error of one call over a sequence of BLOCKS blocks, the last of them not full; infinite if it fails. */
static double check(kernel_context *kernels, int dtype, int dim, int group, int rows, int window) {
    const int keys = BLOCKS * TOKENS - 23, heads = KV_HEADS * group, size = dtype == FLOAT32 ? 4 : 2;
    const int64_t block = (int64_t)KV_HEADS * 2 * TOKENS * dim;
    const int32_t ids[BLOCKS] = {2, 0, 3, 1}, starts[BLOCKS] = {0, TOKENS, 2 * TOKENS, 3 * TOKENS};
    const int32_t query_start[2] = {0, rows}, query_pos = keys - rows, block_start[2] = {0, BLOCKS};
    void *pool = malloc((size_t)(BLOCKS * block * size)), *q = malloc((size_t)(rows * heads * dim * size));
    float *out = malloc((size_t)(rows * heads * dim) * 4), *lse = malloc((size_t)(rows * heads) * 4);
    fill(pool, BLOCKS * block, dtype);
    fill(q, (int64_t)rows * heads * dim, dtype);
    attention_call call = {
        .pool = {pool, BLOCKS, block, 0, KV_HEADS, TOKENS, dim, dtype},
        .q = q, .q_stride = heads * dim, .out = out, .lse = lse,
        .query_start = query_start, .query_pos = &query_pos, .block_start = block_start,
        .block_ids = ids, .block_pos = starts,
        .rows = rows, .num_listed_blocks = BLOCKS, .segments = 1, .q_heads = heads, .window = window,
        .out_dtype = FLOAT32, .scale = 1.0f / sqrtf((float)dim), .softcap = 0,
    };
    double worst = kernels_micro_attention(kernels, &call) == STATUS_OK ? 0 : INFINITY;
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) {
            double total = 0, sums[256] = {0};
            for (int key = 0; key <= query_pos + row; key++) {
                if (window > 0 && key <= query_pos + row - window) continue;
                int64_t k = ids[key / TOKENS] * block + ((int64_t)(head / group) * 2 * TOKENS + key % TOKENS) * dim;
                double score = 0;
                for (int d = 0; d < dim; d++)
                    score += element(q, (int64_t)(row * heads + head) * dim + d, dtype) * element(pool, k + d, dtype);
                double weight = exp(score * call.scale);
                total += weight;
                for (int d = 0; d < dim; d++) sums[d] += weight * element(pool, k + TOKENS * dim + d, dtype);
            }
            for (int d = 0; d < dim; d++)
                worst = fmax(worst, fabs(sums[d] / total - out[(row * heads + head) * dim + d]));
            worst = fmax(worst, fabs(log(total) - lse[row * heads + head]));
        }
    free(pool), free(q), free(out), free(lse);
    return worst;
}

/* As prefill.h has it: many rows, pairs in bfloat16, and instructions that multiply them. */
static int rounds_weights(const char *isa, int dtype, int dim, int group, int rows) {
    return !strcmp(isa, "neon-bf16") && dtype == BFLOAT16 && dim % 8 == 0 && rows * group > 32;
}

int main(void) {
    static const int dims[] = {64, 128, 20}, groups[] = {1, 4, 5}, rows[] = {1, 2, 40};
    static const char *const names[] = {"float32", "bfloat16", "float16"};
    kernel_context *kernels = kernels_open(2);
    int failed = 0, cases = 0;
    if (!kernels) return 2;
    for (int dtype = 0; dtype < 3; dtype++) {
        double worst[2] = {0, 0};
        for (int i = 0; i < 27; i++, cases++) {
            const int dim = dims[i / 9], group = groups[i / 3 % 3], count = rows[i % 3];
            double *kind = &worst[rounds_weights(kernels_isa(kernels), dtype, dim, group, count)];
            *kind = fmax(*kind, check(kernels, dtype, dim, group, count, i % 2 ? 70 : 0));
        }
        const char *isa = kernels_isa(kernels);
        printf("%s %s largest error %.2g, %.2g with rounded weights\n", isa, names[dtype], worst[0], worst[1]);
        failed += !(worst[0] < TOLERANCE && worst[1] < ROUNDED_TOLERANCE);
    }
    printf("%d cases, %d dtypes failed\n", cases, failed);
    kernels_close(kernels);
    return failed > 0;
}
