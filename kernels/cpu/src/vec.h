/* Vectors of WIDTH floats, by the compiler's vector extensions; included once per instruction set.
 *
 * Before including, define WIDTH (16, 8 or 4). The few operations that the extensions lack (maximum, half precision)
 * use intrinsics where the instruction set has them.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
/* The same in memory: any alignment, any declared type. */
typedef float vf_mem __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t vi_mem __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t int_mem __attribute__((may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }
INLINE vf load(const float *p) { return *(const vf_mem *)p; }
INLINE vi load_int(const int32_t *p) { return *(const vi_mem *)p; }
INLINE void store(float *p, vf x) { *(vf_mem *)p = x; }
/* Lanes of a where the mask is all ones, of b where it is zero. */
INLINE vf select_lanes(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf maximum(vf a, vf b) {
#if defined(__x86_64__) && WIDTH == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && WIDTH == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

/* Half precision to float: exact, with subnormals, infinities and NaN. */
INLINE vf widen_half(vh h) {
#if defined(__x86_64__) && WIDTH == 16
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__x86_64__) && WIDTH == 8
    return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16((float16x4_t)h);
#else
    vu bits = __builtin_convertvector(h, vu);
    vu magnitude = (bits & 0x7fff) << 13;
    vf scaled = (vf)magnitude * 0x1p112f; /* moves the exponent's bias; also right for subnormals */
    vu special = (vu)(magnitude >= (0x7c00u << 13)) & (0xffu << 23);
    return (vf)((vu)scaled | special | ((bits & 0x8000) << 16));
#endif
}

#define PAIRS 3 /* beside the pool's dtypes: packed pairs of bfloat16, 32 bits each (pairs.h) */
INLINE int element_size(int dtype) { return dtype == FLOAT32 || dtype == PAIRS ? 4 : 2; }
INLINE const char *element(const void *p, int64_t i, int dtype) { return (const char *)p + i * element_size(dtype); }

/* Into the second-level cache: more misses may be in flight there than in the first, and the hardware, which sees the
 * reads that follow, prefetches along. Spread thinly between arithmetic all the same. Never faults. */
INLINE void prefetch_lines(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Only the first lines of each page: what is read from beginning to end, and faster than memory, the hardware prefetches
 * by itself once it has seen them, with more misses in flight than instructions may have. */
INLINE void prefetch_pages(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64)
        if (((uintptr_t)(from + i) & 4095) < 256) __builtin_prefetch(from + i, 0, 2);
}

/* WIDTH elements from index i of an array of a dtype; the dtype is a compile-time constant wherever this is called. */
INLINE vf load_as(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32 || dtype == PAIRS) return load((const float *)p + i);
    vh h = *(const vh_mem *)((const uint16_t *)p + i);
    if (dtype == BFLOAT16) return (vf)(__builtin_convertvector(h, vu) << 16);
    return widen_half(h);
}

INLINE float load_scalar_as(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    vh h = {((const uint16_t *)p)[i]};
    return load_as(&h, 0, dtype)[0];
}

INLINE uint16_t round_to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To nearest even, with subnormals; beyond the range to infinity. */
INLINE uint16_t round_to_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* subnormal or zero: adding 0.5 lets the adder round at 2**-24 */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits - (112u << 23)) >> 13));
}

/* n floats to index i of an array of a dtype. */
INLINE void store_as(void *p, int64_t i, const float *x, int n, int dtype) {
    if (dtype == FLOAT32) memcpy((float *)p + i, x, (size_t)n * 4);
    else if (dtype == BFLOAT16)
        for (int j = 0; j < n; j++) ((uint16_t *)p)[i + j] = round_to_bfloat16(x[j]);
    else
        for (int j = 0; j < n; j++) ((uint16_t *)p)[i + j] = round_to_half(x[j]);
}

/* low(s, a, b):  lane j is b[j - s] where bit s of j is set, else a[j].
 * high(s, a, b): lane j is b[j] where bit s of j is set, else a[j + s].
 * Applied for s = 1, 2, 4, ... to the pairs (i, i + s) they transpose a square of vectors. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#if WIDTH == 16
#define LOW_8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOW_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define HIGH_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW_2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOW_1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define HIGH_1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif WIDTH == 8
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LOW_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define LOW_2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LOW_1(a, b) SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define HIGH_1(a, b) SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#else
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#define LOW_2(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH_2(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#define LOW_1(a, b) SHUFFLE(a, b, 0, 4, 2, 6)
#define HIGH_1(a, b) SHUFFLE(a, b, 1, 5, 3, 7)
#endif

/* Of n vectors exchanges the bit of a vector's number that is worth d for the bit of a lane's number that is worth s. */
#define EXCHANGE(n, s, d)                                                                                              \
    _Pragma("GCC unroll 16") for (int i = 0; i < n; i++) if (!(i & d)) {                                               \
        vf low = LOW_##s(x[i], x[i + d]), high = HIGH_##s(x[i], x[i + d]);                                             \
        x[i] = low;                                                                                                    \
        x[i + d] = high;                                                                                               \
    }
#define SUM_STAGE(s)                                                                                                   \
    _Pragma("GCC unroll 16") for (int i = 0; i < s; i++) x[i] = LOW_##s(x[i], x[i + s]) + HIGH_##s(x[i], x[i + s]);

/* Transposes WIDTH vectors in place. */
INLINE void transpose(vf x[WIDTH]) {
    EXCHANGE(WIDTH, 1, 1)
    EXCHANGE(WIDTH, 2, 2)
#if WIDTH >= 8
    EXCHANGE(WIDTH, 4, 4)
#endif
#if WIDTH >= 16
    EXCHANGE(WIDTH, 8, 8)
#endif
}

/* Lane j of the result is the sum over the lanes of x[j]. Overwrites x. Within 128 bits first: that is cheaper. */
INLINE vf sum_each(vf x[WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i += 2) x[i] = ZIP_LOW(x[i], x[i + 1]) + ZIP_HIGH(x[i], x[i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i += 4) x[i] = LOW_PAIRS(x[i], x[i + 2]) + HIGH_PAIRS(x[i], x[i + 2]);
#if WIDTH == 8
    x[0] = LOW_4(x[0], x[4]) + HIGH_4(x[0], x[4]);
#elif WIDTH == 16
    x[0] = LOW_8(x[0], x[4]) + HIGH_8(x[0], x[4]);
    x[8] = LOW_8(x[8], x[12]) + HIGH_8(x[8], x[12]);
    x[0] = EVEN_4(x[0], x[8]) + ODD_4(x[0], x[8]);
#endif
    return x[0];
}

/* Lane j of the result is the largest lane of x[j]. Overwrites x. */
INLINE vf max_each(vf x[WIDTH]) {
    transpose(x);
    vf most = x[0];
#pragma GCC unroll 16
    for (int i = 1; i < WIDTH; i++) most = maximum(most, x[i]);
    return most;
}

INLINE float sum_lanes(vf x) {
    float total = 0;
    for (int j = 0; j < WIDTH; j++) total += x[j];
    return total;
}

INLINE float max_lanes(vf x) {
#if WIDTH >= 16
    x = maximum(x, HIGH_8(x, x));
#endif
#if WIDTH >= 8
    x = maximum(x, HIGH_4(x, x));
#endif
    x = maximum(x, HIGH_2(x, x));
    x = maximum(x, HIGH_1(x, x));
    return x[0];
}
