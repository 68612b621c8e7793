// Matrices of few bits: opened to what they compute with, and multiplied with a few rows straight from what they are packed in.
#include "packed_rows.h"

template <typename T, typename Source>
static void open_matrix(const Source& source, T* out, long outputs, long inputs) {
#pragma omp parallel for schedule(static) if (outputs * inputs > PARALLEL)
    for (long r = 0; r < outputs; r++) source.row(r, inputs, out + r * inputs);
}

// y [tokens, outputs] = x W^T + bias (or null), summed in float and rounded once.
template <typename T, typename Source>
static void multiply(const Source& source, const T* x, const T* bias, T* y, long tokens, long outputs, long inputs) {
    multiply_packed<T>(source, Inputs<T>(x, tokens, inputs, inputs), {y, bias, outputs, false, 1.0f});
}

template <typename Source>
static void open_any(const Source& source, void* out, long outputs, long inputs, long narrow_out) {
    if (narrow_out)
        open_matrix(source, (bf16*)out, outputs, inputs);
    else
        open_matrix(source, (float*)out, outputs, inputs);
}

template <typename Source>
static void multiply_any(const Source& source, const void* x, const void* bias, void* y, long tokens, long outputs, long inputs, long narrow) {
    if (narrow)
        multiply(source, (const bf16*)x, (const bf16*)bias, (bf16*)y, tokens, outputs, inputs);
    else
        multiply(source, (const float*)x, (const float*)bias, (float*)y, tokens, outputs, inputs);
}

#define FLAT                                                                                                                       \
    const uint8_t *codes, const void *scales, const float *scale_levels, const float *scale_scales, const float *offset, const float *levels
#define ROWS const int8_t *codes, const float *largest
#define GRID                                                                                                                          \
    const uint8_t *codes, const void *scales, const uint8_t *zeros, const uint16_t *minimums, const int32_t *groups, long kind, long halves, \
        long rows, long columns, long across, long rounded
#define HALVES const bf16 *codes
#define FLAT_SOURCE Flat{codes, scales, scale_levels, scale_scales, offset, levels}
#define ROWS_SOURCE Rows{codes, largest}
#define GRID_SOURCE Grid{codes, scales, zeros, minimums, groups, kind, halves, rows, columns, across, rounded}
#define HALVES_SOURCE Halves{codes}
#define OUT void *out, long outputs, long inputs, long narrow_out
#define PRODUCT const void *x, const void *bias, void *y, long tokens, long outputs, long inputs, long narrow

// out [outputs, inputs], bfloat16 or float.
LORRY void packed_open_flat(FLAT, OUT) { open_any(FLAT_SOURCE, out, outputs, inputs, narrow_out); }
LORRY void packed_open_rows(ROWS, OUT) { open_any(ROWS_SOURCE, out, outputs, inputs, narrow_out); }
LORRY void packed_open_grid(GRID, OUT) { open_any(GRID_SOURCE, out, outputs, inputs, narrow_out); }
LORRY void packed_open_halves(HALVES, OUT) { open_any(HALVES_SOURCE, out, outputs, inputs, narrow_out); }
// y [tokens, outputs] of x [tokens, inputs].
LORRY void packed_product_flat(FLAT, PRODUCT) { multiply_any(FLAT_SOURCE, x, bias, y, tokens, outputs, inputs, narrow); }
LORRY void packed_product_rows(ROWS, PRODUCT) { multiply_any(ROWS_SOURCE, x, bias, y, tokens, outputs, inputs, narrow); }
LORRY void packed_product_grid(GRID, PRODUCT) { multiply_any(GRID_SOURCE, x, bias, y, tokens, outputs, inputs, narrow); }
LORRY void packed_product_halves(HALVES, PRODUCT) { multiply_any(HALVES_SOURCE, x, bias, y, tokens, outputs, inputs, narrow); }
