// A few rows by a matrix that lies in memory as it is multiplied, in bfloat16 and float.
#include "few_rows.h"

template <typename T>
static void product(const T* x, const T* w, const T* bias, T* y, long rows, long width, long outputs, long stride, long first, long add, float scale) {
    std::vector<typename Pairing<T>::Input> space;
    multiply_dense(w, width, inputs_of(x + first, rows, width, stride, space), rows, Outputs<T>{y, bias, outputs, add != 0, scale});
}

// y [rows, outputs] = scale * x W^T + bias (or null), where x is `width` columns from the `first` on of rows that are `stride` apart; with
// `add` instead y += scale * x W^T.
#define PRODUCT(T)                                                                                                                         \
    (const T* x, const T* w, const T* bias, T* y, long rows, long width, long outputs, long stride, long first, long add, float scale) {       \
        product(x, w, bias, y, rows, width, outputs, stride, first, add, scale);                                                             \
    }
LORRY void few_rows_bf16 PRODUCT(bf16)
LORRY void few_rows_float PRODUCT(float)
