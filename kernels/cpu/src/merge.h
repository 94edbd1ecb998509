/* Merging partial states, and writing new keys and values: one pass over memory each. */

INLINE void merge_as(const merge_call *call, int dtype) {
    const int dim = call->head_dim, whole = dim / WIDTH * WIDTH;
    for (int64_t n = 0; n < call->count; n++) {
        int64_t row = call->rows ? call->rows[n] : n;
        for (int32_t head = 0; head < call->heads; head++) {
            int64_t to = row * call->heads + head, from = n * call->heads + head;
            float old = call->lse[to], part = call->part_lse[from];
            if (part == -INFINITY) continue; /* an empty part changes nothing, whatever its out holds */
            float larger = old > part ? old : part;
            float old_weight = expf(old - larger), part_weight = expf(part - larger);
            float sum = old_weight + part_weight;
            call->lse[to] = larger + logf(sum);
            old_weight /= sum;
            part_weight /= sum;
            float *out = call->out + to * dim;
            for (int d = 0; d < whole; d += WIDTH)
                store(
                    out + d, splat(old_weight) * load(out + d) +
                                 splat(part_weight) * load_as(call->part_out, from * dim + d, dtype)
                );
            for (int d = whole; d < dim; d++)
                out[d] = old_weight * out[d] + part_weight * load_scalar_as(call->part_out, from * dim + d, dtype);
        }
    }
}

static void merge(const merge_call *call) {
    switch (call->part_dtype) {
        case FLOAT32: merge_as(call, FLOAT32); break;
        case BFLOAT16: merge_as(call, BFLOAT16); break;
        default: merge_as(call, FLOAT16); break;
    }
}

/* n elements of from, of a dtype, converted into to. */
INLINE void store_row(
    void *to, int64_t to_index, const void *from, int64_t from_index, int n, int to_dtype, int dtype
) {
    if (to_dtype == dtype) {
        const int size = element_size(dtype);
        memcpy((char *)to + to_index * size, element(from, from_index, dtype), (size_t)(n * size));
        return;
    }
    for (int d = 0; d < n; d += WIDTH) {
        float x[WIDTH];
        int part = n - d < WIDTH ? n - d : WIDTH;
        store(x, load_padded(element(from, from_index, dtype), d, n, dtype));
        store_as(to, to_index + d, x, part, to_dtype);
    }
}

INLINE void store_kv_as(const store_call *call, int dtype) {
    const pool_view *pool = &call->pool;
    const int dim = pool->head_dim;
    const int64_t head_stride = 2 * (int64_t)pool->block_tokens * dim;
    for (int64_t row = 0; row < call->rows; row++) {
        int64_t block = call->slots[row] / pool->block_tokens, offset = call->slots[row] % pool->block_tokens;
        int64_t to = block * pool->block_stride + pool->layer_offset + offset * dim;
        for (int32_t head = 0; head < pool->kv_heads; head++) {
            int64_t key = to + head * head_stride, value = key + (int64_t)pool->block_tokens * dim;
            store_row(pool->data, key, call->k, row * call->k_stride + (int64_t)head * dim, dim, pool->dtype, dtype);
            store_row(pool->data, value, call->v, row * call->v_stride + (int64_t)head * dim, dim, pool->dtype, dtype);
        }
    }
}

static void store_kv(const store_call *call) {
    switch (call->dtype) {
        case FLOAT32: store_kv_as(call, FLOAT32); break;
        case BFLOAT16: store_kv_as(call, BFLOAT16); break;
        default: store_kv_as(call, FLOAT16); break;
    }
}
