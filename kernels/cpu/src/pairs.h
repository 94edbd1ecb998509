/* bfloat16 in pairs: a 32-bit lane holds two neighbours, the first in its low half.
 *
 * A vector of pairs is 2 * WIDTH numbers in the order of memory, loaded at once. Where only sums over all dimensions
 * are wanted, pairs are multiplied as they are; where each dimension is, firsts and seconds become a vector each.
 */

#define VECTOR (2 * WIDTH) /* numbers in a vector of pairs */

/* Rows of keys and values that are whole vectors of pairs. */
INLINE int has_pairs(const pool_view *pool) { return pool->dtype == BFLOAT16 && pool->head_dim % VECTOR == 0; }

/* Pairs in memory: any alignment that bfloat16 has, any declared type. */
typedef int32_t pairs_mem __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));

INLINE vi load_pairs(const uint16_t *p) { return *(const pairs_mem *)p; }
INLINE vf firsts(vi x) { return (vf)(x << 16); }
INLINE vf seconds(vi x) { return (vf)(x & splat_int(-65536)); }

/* Whether one query row takes less time for keys and values than memory does. */
#define OUTRUNS_MEMORY (NATIVE_PAIRS && WIDTH == 16)

/* Lane by lane: sum + a.first * b.first + a.second * b.second, in float32. */
INLINE vf dot_pairs(vf sum, vi a, vi b) {
#if NATIVE_PAIRS && defined(__x86_64__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif NATIVE_PAIRS
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    sum += firsts(a) * firsts(b);
    return sum + seconds(a) * seconds(b);
#endif
}

/* Numbers rounded to bfloat16, in the order of memory: a, then b. Subnormal ones become 0. */
#if NATIVE_PAIRS
INLINE vi round_to_pairs(vf a, vf b) {
#if defined(__x86_64__)
    return (vi)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    return (vi)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)a), (float32x4_t)b);
#endif
}
#endif

/* Numbers that firsts and seconds separated, WIDTH by WIDTH, in order again. */
INLINE void join_row(float *row, int count) {
    for (int i = 0; i < count; i += VECTOR) {
        float x[VECTOR];
        memcpy(x, row + i, sizeof x);
        for (int j = 0; j < VECTOR; j++) row[i + j] = x[j % 2 * WIDTH + j / 2];
    }
}
