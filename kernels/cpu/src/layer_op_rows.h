/* Norms, rotary embedding and gates on some rows; included once per instruction set, behind vec.h and softmax.h. */

/* WIDTH floats to index i of an array of a dtype. */
INLINE void store_vector(void *p, int64_t i, vf x, int dtype) {
    if (dtype == FLOAT32) {
        store((float *)p + i, x);
        return;
    }
#ifdef NATIVE_BFLOAT16
    *(vh_mem *)((uint16_t *)p + i) = (vh)_mm512_cvtneps_pbh((__m512)x); /* subnormals become 0, as in products */
#else
    vu bits = (vu)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vu nan = (vu)(x != x);
    *(vh_mem *)((uint16_t *)p + i) = __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), vh);
#endif
}

INLINE void store_scalar(void *p, int64_t i, float x, int dtype) { store_as(p, i, &x, 1, dtype); }

INLINE float inverse_root_mean(float squares, int n, float eps) { return 1 / sqrtf(squares / (float)n + eps); }

INLINE float sum_of_squares(const void *x, int64_t at, int n, int dtype) {
    vf sum = {0}, other = {0};
    float total = 0;
    int d = 0;
    for (; d + 2 * WIDTH <= n; d += 2 * WIDTH) {
        vf a = load_as(x, at + d, dtype), b = load_as(x, at + d + WIDTH, dtype);
        sum += a * a;
        other += b * b;
    }
    for (; d < n; d++) {
        float a = load_scalar_as(x, at + d, dtype);
        total += a * a;
    }
    return total + sum_lanes(sum + other);
}

/* to = from * scale * (weight + offset) + residual, n elements: of weight from its own index; residual may be NULL. */
INLINE void scale_row(
    void *to, const void *from, const void *residual, int64_t at, const void *weight, int64_t weight_at, int n,
    float scale, float offset, int dtype
) {
    int d = 0;
    for (; d + WIDTH <= n; d += WIDTH) {
        vf w = load_as(weight, weight_at + d, dtype) + splat(offset);
        vf y = load_as(from, at + d, dtype) * splat(scale) * w;
        store_vector(to, at + d, residual ? y + load_as(residual, at + d, dtype) : y, dtype);
    }
    for (; d < n; d++) {
        float w = load_scalar_as(weight, weight_at + d, dtype) + offset;
        float y = load_scalar_as(from, at + d, dtype) * scale * w;
        store_scalar(to, at + d, residual ? y + load_scalar_as(residual, at + d, dtype) : y, dtype);
    }
}

INLINE void add_row(void *sum, const void *x, const void *delta, int64_t at, int n, int dtype) {
    int d = 0;
    for (; d + WIDTH <= n; d += WIDTH)
        store_vector(sum, at + d, load_as(x, at + d, dtype) + load_as(delta, at + d, dtype), dtype);
    for (; d < n; d++)
        store_scalar(sum, at + d, load_scalar_as(x, at + d, dtype) + load_scalar_as(delta, at + d, dtype), dtype);
}

INLINE void norm_as(const norm_call *call, int64_t first, int64_t end, int dtype) {
    const int dim = call->dim;
    for (int64_t row = first; row < end; row++) {
        const int64_t at = row * dim;
        const void *x = call->x;
        if (call->delta) {
            add_row(call->sum, x, call->delta, at, dim, dtype);
            x = call->sum;
        }
        float scale = call->scale * inverse_root_mean(sum_of_squares(x, at, dim, dtype), dim, call->eps);
        scale_row(call->out, x, call->residual, at, call->weight, 0, dim, scale, call->offset, dtype);
    }
}

/* Element i of the first half and element i of the second turn by one angle. */
INLINE void rotate_halves(void *x, int64_t at, const void *cos, const void *sin, int64_t angle, int n, int dtype) {
    const int half = n / 2;
    int d = 0;
    for (; d + WIDTH <= half; d += WIDTH) {
        vf a = load_as(x, at + d, dtype), b = load_as(x, at + half + d, dtype);
        vf a_cos = load_as(cos, angle + d, dtype), a_sin = load_as(sin, angle + d, dtype);
        vf b_cos = load_as(cos, angle + half + d, dtype), b_sin = load_as(sin, angle + half + d, dtype);
        store_vector(x, at + d, a * a_cos - b * a_sin, dtype);
        store_vector(x, at + half + d, b * b_cos + a * b_sin, dtype);
    }
    for (; d < half; d++) {
        float a = load_scalar_as(x, at + d, dtype), b = load_scalar_as(x, at + half + d, dtype);
        float a_cos = load_scalar_as(cos, angle + d, dtype), a_sin = load_scalar_as(sin, angle + d, dtype);
        float b_cos = load_scalar_as(cos, angle + half + d, dtype), b_sin = load_scalar_as(sin, angle + half + d, dtype);
        store_scalar(x, at + d, a * a_cos - b * a_sin, dtype);
        store_scalar(x, at + half + d, b * b_cos + a * b_sin, dtype);
    }
}

/* Elements 2i and 2i + 1 turn by one angle, which stands at 2i (ROTATE_PAIRS) or at i (ROTATE_PAIRS_SHORT) of the tables. */
INLINE void rotate_pairs(
    void *x, int64_t at, const void *cos, const void *sin, int64_t angle, int n, int step, int dtype
) {
    for (int i = 0; i < n / 2; i++) {
        float a = load_scalar_as(x, at + 2 * i, dtype), b = load_scalar_as(x, at + 2 * i + 1, dtype);
        float c = load_scalar_as(cos, angle + i * step, dtype), s = load_scalar_as(sin, angle + i * step, dtype);
        store_scalar(x, at + 2 * i, a * c - b * s, dtype);
        store_scalar(x, at + 2 * i + 1, b * c + a * s, dtype);
    }
}

INLINE void heads_as(const heads_call *call, int64_t first, int64_t end, int dtype) {
    const int dim = call->head_dim;
    for (int64_t row = first; row < end; row++)
        for (int32_t head = 0; head < call->heads; head++) {
            const int64_t at = row * call->stride + (int64_t)head * dim, angle = row * call->rotary_dim;
            if (call->weight) {
                float scale = inverse_root_mean(sum_of_squares(call->x, at, dim, dtype), dim, call->eps);
                scale_row(
                    call->x, call->x, NULL, at, call->weight, (int64_t)head * dim, dim, scale, call->offset, dtype
                );
            }
            if (!call->cos) continue;
            if (call->rotation == ROTATE_HALVES)
                rotate_halves(call->x, at, call->cos, call->sin, angle, call->rotary_dim, dtype);
            else
                rotate_pairs(
                    call->x, at, call->cos, call->sin, angle, call->rotary_dim, call->rotation == ROTATE_PAIRS ? 2 : 1, dtype
                );
        }
}

/* 1 / (1 + exp(-x)), without overflow. */
INLINE vf sigmoid(vf x) {
    vi negative = x < (vf){0};
    vf e = exp2_not_positive(select_lanes(negative, x, -x) * splat(LOG2_E));
    return select_lanes(negative, e, splat(1.0f)) / (splat(1.0f) + e);
}

/* gelu with tanh is x * sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x**3). */
INLINE vf activate(vf x, int activation) {
    if (activation == SILU) return x * sigmoid(x);
    return x * sigmoid(splat(1.5957691216057308f) * (x + splat(0.044715f) * x * x * x));
}

INLINE void gate_as(const gate_call *call, int64_t first, int64_t end, int activation, int dtype) {
    const int dim = call->dim;
    for (int64_t row = first; row < end; row++) {
        const int64_t from = row * call->stride, to = row * dim;
        int d = 0;
        for (; d + WIDTH <= dim; d += WIDTH) {
            vf x = activate(load_as(call->gate, from + d, dtype), activation);
            store_vector(call->out, to + d, x * load_as(call->up, from + d, dtype), dtype);
        }
        for (; d < dim; d++) {
            vf x = activate(splat(load_scalar_as(call->gate, from + d, dtype)), activation);
            store_scalar(call->out, to + d, x[0] * load_scalar_as(call->up, from + d, dtype), dtype);
        }
    }
}

static void norm_rows(const norm_call *call, int64_t first, int64_t end) {
    if (call->dtype == FLOAT32) norm_as(call, first, end, FLOAT32);
    else norm_as(call, first, end, BFLOAT16);
}

static void heads_rows(const heads_call *call, int64_t first, int64_t end) {
    if (call->dtype == FLOAT32) heads_as(call, first, end, FLOAT32);
    else heads_as(call, first, end, BFLOAT16);
}

static void gate_rows(const gate_call *call, int64_t first, int64_t end) {
    if (call->activation == SILU && call->dtype == FLOAT32) gate_as(call, first, end, SILU, FLOAT32);
    else if (call->activation == SILU) gate_as(call, first, end, SILU, BFLOAT16);
    else if (call->dtype == FLOAT32) gate_as(call, first, end, GELU_TANH, FLOAT32);
    else gate_as(call, first, end, GELU_TANH, BFLOAT16);
}
