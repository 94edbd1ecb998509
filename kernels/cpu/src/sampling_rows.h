/* Choosing tokens from rows of logits; included once per instruction set, behind vec.h and softmax.h. */
#define LOGIT_BLOCK 512

INLINE float largest(const void *x, int64_t at, int64_t n, int dtype) {
    vf most = splat(-INFINITY), other = most;
    int64_t d = 0;
    for (; d + 2 * WIDTH <= n; d += 2 * WIDTH) {
        most = maximum(most, load_as(x, at + d, dtype));
        other = maximum(other, load_as(x, at + d + WIDTH, dtype));
    }
    float value = max_lanes(maximum(most, other));
    for (; d < n; d++) {
        float y = load_scalar_as(x, at + d, dtype);
        value = y > value ? y : value;
    }
    return value;
}

INLINE int64_t block_end(int64_t first, int64_t n) { return first + LOGIT_BLOCK < n ? first + LOGIT_BLOCK : n; }

/* The first of the largest. */
INLINE int64_t argmax_token(const void *x, int64_t at, int64_t n, int dtype) {
    float most = -INFINITY;
    int64_t block = 0;
    for (int64_t d = 0; d < n; d += LOGIT_BLOCK) {
        float value = largest(x, at + d, block_end(d, n) - d, dtype);
        if (value > most) {
            most = value;
            block = d;
        }
    }
    for (int64_t d = block; d < block_end(block, n); d++)
        if (load_scalar_as(x, at + d, dtype) == most) return d;
    return 0;
}

/* 2 ** (scale * (x - most)) of up to WIDTH elements; those beyond n count nothing. */
INLINE vf weights_at(const void *x, int64_t at, int64_t d, int64_t n, float most, float scale, int dtype) {
    if (d + WIDTH <= n) return exp2_not_positive((load_as(x, at + d, dtype) - splat(most)) * splat(scale));
    vf y = splat(-INFINITY);
    for (int j = 0; d + j < n; j++) y[j] = (load_scalar_as(x, at + d + j, dtype) - most) * scale;
    return exp2_not_positive(y);
}

INLINE double block_weight(const void *x, int64_t at, int64_t first, int64_t n, float most, float scale, int dtype) {
    vf sum = {0};
    for (int64_t d = first; d < block_end(first, n); d += WIDTH) sum += weights_at(x, at, d, n, most, scale, dtype);
    return sum_lanes(sum);
}

/* The first token at which the cumulative weight exceeds the drawn part of all. */
INLINE int64_t draw_token(const void *x, int64_t at, int64_t n, float scale, double uniform, int dtype) {
    const float most = largest(x, at, n, dtype);
    double total = 0, below = 0;
    for (int64_t d = 0; d < n; d += LOGIT_BLOCK) total += block_weight(x, at, d, n, most, scale, dtype);
    const double target = uniform * total;
    int64_t block = 0;
    for (;; block += LOGIT_BLOCK) {
        double weight = block_weight(x, at, block, n, most, scale, dtype);
        if (below + weight > target || block + LOGIT_BLOCK >= n) break;
        below += weight;
    }
    int64_t last = block; /* with any weight: taken where rounding lets the sum miss the target */
    for (int64_t d = block; d < block_end(block, n); d += WIDTH) {
        vf weight = weights_at(x, at, d, n, most, scale, dtype);
        for (int j = 0; j < WIDTH; j++) {
            below += weight[j];
            if (below > target) return d + j;
            if (weight[j] > 0) last = d + j;
        }
    }
    return last;
}

static void choose_rows(const choice_call *call, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const int64_t at = row * call->dim, dim = call->dim;
        int64_t token;
        if (call->scale) {
            const float scale = call->scale[row];
            const double uniform = call->uniform[row];
            token = call->dtype == FLOAT32 ? draw_token(call->logits, at, dim, scale, uniform, FLOAT32)
                                           : draw_token(call->logits, at, dim, scale, uniform, BFLOAT16);
        } else {
            token = call->dtype == FLOAT32 ? argmax_token(call->logits, at, dim, FLOAT32)
                                           : argmax_token(call->logits, at, dim, BFLOAT16);
        }
        call->tokens[row] = token;
    }
}
