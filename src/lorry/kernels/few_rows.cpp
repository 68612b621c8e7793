// A few rows by a matrix that lies in memory as it is multiplied, and by low-rank terms, in bfloat16 and float.
#include "low_rank.h"

// y [rows, outputs] = x W^T + bias (or null); x [rows, width].
#define PRODUCT(T)                                                                                             \
    (const T* x, const T* w, const T* bias, T* y, long rows, long width, long outputs) {                       \
        multiply_dense(w, Inputs<T>(x, rows, width, width), Outputs<T>{y, bias, outputs, false, 1.0f});        \
    }
LORRY void few_rows_bf16 PRODUCT(bf16)
LORRY void few_rows_float PRODUCT(float)

// Terms as models/decoder/low_rank.py describes them, of x [rows, width], added to the outputs of linears: of each an address and a width
// in `ys`.
template <typename T>
static void add_terms(const int64_t* description, const T* x, const int64_t* ys, long linears, long rows, long width) {
    std::vector<TermOutputs<T>> outputs;
    for (long i = 0; i < linears; i++) outputs.push_back({(T*)ys[2 * i], (long)ys[2 * i + 1]});
    Words words = {description};
    LowRankTerms<T>(words).add(Inputs<T>(x, rows, width, width), outputs);
}
#define TERMS(T)                                                                                                            \
    (const int64_t* description, const T* x, const int64_t* ys, long linears, long rows, long width) {                      \
        add_terms(description, x, ys, linears, rows, width);                                                                \
    }
LORRY void low_rank_bf16 TERMS(bf16)
LORRY void low_rank_float TERMS(float)

// sum [1] of words [count]: as fast as memory is read, which is what benchmarks hold a product against.
LORRY void sum_words(const uint64_t* words, uint64_t* sum, long count) {
    uint64_t total = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : total)
    for (long i = 0; i < count; i++) total += words[i];
    *sum = total;
}
