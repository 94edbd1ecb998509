/* Scores to weights, online. Scores, maxima and sums are kept in units of log 2: weight = 2 ** (score - maximum).
 *
 * A key tile has at most KEYS keys; scores are stored [rows][KEYS].
 */
#define KEYS 64
#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

/* x = n + f with n = round(x), f in [-0.5, 0.5]; answers n as an integer. */
INLINE vi split_exponent(vf x, vf *f) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer, held in the low bits */
    vf shifted = x + magic;
    *f = x - (shifted - magic);
    return (vi)shifted - (vi)magic;
}

/* 2**f - 1 for |f| <= 0.5, relative error below 2e-8 before rounding: f times a Chebyshev fit of (2**f - 1) / f. */
INLINE vf exp2_minus_1(vf f) {
    vf p = splat(0.000154614478f);
    p = p * f + splat(0.00133908668f);
    p = p * f + splat(0.00961805694f);
    p = p * f + splat(0.0555035695f);
    p = p * f + splat(0.240226507f);
    p = p * f + splat(0.693147182f);
    return p * f;
}

/* 2**x for x <= 0; of -inf exactly 0. Below 2**-126 it is 0, or with AVX512 subnormal. */
INLINE vf exp2_not_positive(vf x) {
#if defined(__AVX512F__)
    vf f = (vf)_mm512_reduce_ps((__m512)x, 0x08); /* from the nearest integer; of -inf it is 0 */
    return (vf)_mm512_scalef_ps((__m512)(exp2_minus_1(f) + splat(1.0f)), (__m512)(x - f));
#else
    vi in_range = x >= splat(-126.0f);
    vf f;
    vi n = split_exponent(maximum(x, splat(-126.0f)), &f);
    vf power = (vf)((vi)(exp2_minus_1(f) + splat(1.0f)) + (n << 23));
    return (vf)((vi)power & in_range);
#endif
}

#if NATIVE_PAIRS
/* 2**(x * factor - n) for an integer n that is no less than the product; of x = -inf exactly 0. n shifts the exponent and
 * changes nothing else. */
INLINE vf exp2_from(vf x, vf factor, vf n) {
#if defined(__x86_64__)
    vf y = (vf)_mm512_fmadd_ps((__m512)x, (__m512)factor, (__m512)(vf){0}); /* a product that no subtraction takes in */
    vf f = (vf)_mm512_reduce_ps((__m512)y, 0x08);
    return (vf)_mm512_scalef_ps((__m512)(exp2_minus_1(f) + splat(1.0f)), (__m512)(y - f - n));
#else
    vf y = x * factor, nearest = (vf)vrndnq_f32((float32x4_t)y), exponent = nearest - n;
    vi shift = (vi)vcvtq_s32_f32((float32x4_t)maximum(exponent, splat(-127.0f))) << 23;
    vf power = (vf)((vi)(exp2_minus_1(y - nearest) + splat(1.0f)) + shift);
    return (vf)((vi)power & (exponent >= splat(-126.0f)));
#endif
}
#endif

/* tanh(x) = e / (e + 2) with e = exp(2 x) - 1 computed without cancellation: right near 0 too. */
INLINE vf hyperbolic_tangent(vf x) {
    vi negative = x < (vf){0};
    vf magnitude = select_lanes(negative, -x, x);
    magnitude = -maximum(-magnitude, splat(-10.0f)); /* tanh(10) rounds to 1 */
    vf f;
    vi n = split_exponent(magnitude * splat(2 * LOG2_E), &f);
    vf two_n = (vf)((n + splat_int(127)) << 23);
    vf e = two_n * exp2_minus_1(f) + (two_n - splat(1.0f));
    vf t = e / (e + splat(2.0f));
    return select_lanes(negative, -t, t);
}

/* cap * tanh(score) for scores that were scaled by 1 / softcap. */
INLINE void cap_scores(float *scores, int keys, float cap) {
    for (int j = 0; j < keys; j += WIDTH) store(scores + j, splat(cap) * hyperbolic_tangent(load(scores + j)));
}

/* Hides from a row at position query_pos the keys after it and those outside its window (0: none). */
INLINE void mask_scores(float *scores, const int32_t *key_pos, int keys, int32_t query_pos, int32_t window) {
    /* Compared in int32: positions are below 2**31, so query_pos - window cannot overflow. */
    int32_t oldest = window > 0 && query_pos >= window ? query_pos - window : -1;
    for (int j = 0; j < keys; j += WIDTH) {
        vi pos = load_int(key_pos + j);
        vi visible = (pos <= splat_int(query_pos)) & (pos > splat_int(oldest));
        store(scores + j, select_lanes(visible, load(scores + j), splat(-INFINITY)));
    }
}

/* The softmax state of one row, beside its accumulated values. */
typedef struct {
    float maximum;       /* largest score so far, -inf before the first visible key */
    float rescale;       /* what the accumulated values must be multiplied by before the tile just seen is added */
    float sum[WIDTH];    /* sum of weights relative to maximum, spread over the lanes */
} row_state;

INLINE void row_reset(row_state *row) {
    *row = (row_state){.maximum = -INFINITY, .rescale = 1.0f};
}

/* Replaces a row's scores, times a factor greater than 0, by weights relative to its new maximum. keys is a multiple of
 * WIDTH. */
INLINE void online_softmax(row_state *row, float *scores, int keys, float factor) {
    vf largest = load(scores);
    for (int j = WIDTH; j < keys; j += WIDTH) largest = maximum(largest, load(scores + j));
    float tile_maximum = max_lanes(largest) * factor;
    row->rescale = 1.0f;
    if (tile_maximum > row->maximum) {
        row->rescale = exp2_not_positive(splat(row->maximum - tile_maximum))[0];
        row->maximum = tile_maximum;
    }
    /* A row that has seen nothing yet has scores of -inf only; relative to 0 their weights are 0. */
    vf reference = splat(row->maximum == -INFINITY ? 0.0f : row->maximum);
    vf sum = load(row->sum) * splat(row->rescale);
    for (int j = 0; j < keys; j += WIDTH) {
        vf weight = exp2_not_positive(load(scores + j) * splat(factor) - reference);
        store(scores + j, weight);
        sum += weight;
    }
    store(row->sum, sum);
}

#if NATIVE_PAIRS
/* As online_softmax, but with weights [keys / 2] rounded to pairs of bfloat16, which the sum is of. The maximum is raised
 * to an integer: relative to whichever integer, the same bits of a weight are rounded off, so that it does not depend on
 * how keys are split into tiles and among memories. keys is a multiple of VECTOR. */
INLINE void online_softmax_pairs(row_state *row, const float *scores, int keys, float factor, float *weights) {
    vf largest = load(scores);
    for (int j = WIDTH; j < keys; j += WIDTH) largest = maximum(largest, load(scores + j));
    float tile_maximum = ceilf(max_lanes(largest) * factor);
    row->rescale = 1.0f;
    if (tile_maximum > row->maximum) {
        row->rescale = exp2_not_positive(splat(row->maximum - tile_maximum))[0];
        row->maximum = tile_maximum;
    }
    vf reference = splat(row->maximum == -INFINITY ? 0.0f : row->maximum), sum = load(row->sum) * splat(row->rescale);
    for (int j = 0; j < keys; j += VECTOR) {
        vf a = exp2_from(load(scores + j), splat(factor), reference);
        vf b = exp2_from(load(scores + j + WIDTH), splat(factor), reference);
        vi pairs = round_to_pairs(a, b);
        store(weights + j / 2, (vf)pairs);
        sum += firsts(pairs) + seconds(pairs);
    }
    store(row->sum, sum);
}
#endif

/* Log-sum-exp of a row, natural logarithm; *scale becomes what normalises its accumulated values. */
INLINE float row_finish(float maximum, const float *sums, float *scale) {
    float sum = sum_lanes(load(sums));
    *scale = sum > 0 ? 1.0f / sum : 0.0f;
    return sum > 0 ? maximum * LN_2 + logf(sum) : -INFINITY;
}
