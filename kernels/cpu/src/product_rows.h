/* What is done with the sums of a matrix product before they are written; included once per instruction set, behind
 * layer_op_rows.h. */

/* One vector of columns of one row: sum and, in a gated product, the sum of what is gated. */
INLINE vf finish_product(const product_call *call, vf sum, vf gated, int64_t at, int64_t column, int dtype) {
    const int64_t up_column = column + call->columns;
    if (call->bias) sum += load_as(call->bias, column, dtype);
    if (call->activation >= 0) {
        if (call->bias) gated += load_as(call->bias, up_column, dtype);
        sum = activate(sum, call->activation) * gated;
    }
    sum *= splat(call->scale);
    return call->residual ? sum + load_as(call->residual, at, dtype) : sum;
}

INLINE float finish_scalar(const product_call *call, float sum, float gated, int64_t at, int64_t column, int dtype) {
    if (call->bias) sum += load_scalar_as(call->bias, column, dtype);
    if (call->activation >= 0) {
        if (call->bias) gated += load_scalar_as(call->bias, column + call->columns, dtype);
        sum = activate(splat(sum), call->activation)[0] * gated;
    }
    sum *= call->scale;
    return call->residual ? sum + load_scalar_as(call->residual, at, dtype) : sum;
}

/* columns of one row of a product's output, from its column first on, and of sums and gated as above. */
INLINE void write_row(
    const product_call *call, const float *sums, const float *gated, int64_t row, int64_t first, int columns, int dtype
) {
    const int count = call->columns - first < columns ? (int)(call->columns - first) : columns;
    const int64_t at = row * call->columns + first;
    int c = 0;
#ifdef NATIVE_BFLOAT16
    for (; dtype == BFLOAT16 && c + 2 * WIDTH <= count; c += 2 * WIDTH) { /* a cache line at once */
        const int d = c + WIDTH;
        vf low = finish_product(call, load(sums + c), load(gated + c), at + c, first + c, dtype);
        vf high = finish_product(call, load(sums + d), load(gated + d), at + d, first + d, dtype);
        *(vi_mem *)((uint16_t *)call->out + at + c) = (vi)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
#endif
    for (; c + WIDTH <= count; c += WIDTH)
        store_vector(
            call->out, at + c, finish_product(call, load(sums + c), load(gated + c), at + c, first + c, dtype), dtype
        );
    for (; c < count; c++)
        store_scalar(call->out, at + c, finish_scalar(call, sums[c], gated[c], at + c, first + c, dtype), dtype);
}

/* Rows of a product's output from sums [rows, columns], from its column first on; gated [rows, columns] as above. */
INLINE void write_tile(
    const product_call *call, const float *sums, const float *gated, int64_t row, int rows, int64_t first, int columns,
    int dtype
) {
    for (int r = 0; r < rows; r++)
        write_row(call, sums + r * columns, gated + r * columns, row + r, first, columns, dtype);
}
