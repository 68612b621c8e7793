// A few rows by a matrix that lies in memory as it is multiplied, in bfloat16 and float.
#include "few_rows.h"

template <typename T>
static void product(const T* x, const T* w, const T* bias, T* y, long rows, long width, long outputs, long stride, long first, long add, float scale) {
    multiply_dense(w, Inputs<T>(x + first, rows, width, stride), {y, bias, outputs, add != 0, scale});
}

// y [rows, outputs] = scale * x W^T + bias (or null), where x is `width` columns from the `first` on of rows that are `stride` apart; with
// `add` instead y += scale * x W^T.
#define PRODUCT(T)                                                                                                                         \
    (const T* x, const T* w, const T* bias, T* y, long rows, long width, long outputs, long stride, long first, long add, float scale) {       \
        product(x, w, bias, y, rows, width, outputs, stride, first, add, scale);                                                             \
    }
LORRY void few_rows_bf16 PRODUCT(bf16)
LORRY void few_rows_float PRODUCT(float)

// sum [1] of words [count]: as fast as memory is read, which is what benchmarks hold a product against.
LORRY void sum_words(const uint64_t* words, uint64_t* sum, long count) {
    uint64_t total = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : total)
    for (long i = 0; i < count; i++) total += words[i];
    *sum = total;
}
