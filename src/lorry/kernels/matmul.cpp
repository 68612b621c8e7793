// The product of two float matrices, for processors that torch's library holds to less than they can do.
//
// Both are copied, a block at a time, into panels that a tile of the result reads in order: whichever way they lie, they are read once
// and never rearranged whole. Every number is summed alone, in an order that only the depth decides: a row's result depends neither on
// its neighbours nor on threads.
#include "operands.h"
#include "vectors.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>

namespace {

// A tile is TILE_ROWS x TILE_VECTORS vectors: as many sums as registers hold beside a row of the right operand and a number of the left.
constexpr int TILE_ROWS = LANES == 4 ? 4 : LANES / 2;
constexpr int TILE_VECTORS = 3;
constexpr long PANEL = TILE_VECTORS * LANES;  // columns of the right operand side by side
// What both blocks of a product take together fills the second cache of processors of today, a megabyte; whether a panel fits into the first
// one made no difference.
constexpr long BLOCK_DEPTH = 256, BLOCK_ROWS = 256, BLOCK_COLUMNS = 12 * PANEL;
constexpr long LEFT = BLOCK_ROWS * BLOCK_DEPTH, RIGHT = BLOCK_COLUMNS * BLOCK_DEPTH;
constexpr long ALONE = 1 << 21;  // multiplications; with fewer one thread is faster than waking another
static_assert(BLOCK_ROWS % LANES == 0);

// to [depth, WIDTH]: count <= WIDTH of the operand's rows, side by side; zeros beside them.
template <long WIDTH>
void copy_panel(const Operand<float>& from, long count, long depth, float* to) {
    if (from.stride == 1) {
        for (long k = 0; k < depth; k++) {
            const float* row = from.at + k * from.step;
            if (count == WIDTH) {
                std::memcpy(to + k * WIDTH, row, sizeof(float) * WIDTH);
            } else {
                std::memcpy(to + k * WIDTH, row, sizeof(float) * count);
                std::fill(to + k * WIDTH + count, to + (k + 1) * WIDTH, 0.0f);
            }
        }
        return;
    }
    for (long i = 0; i < WIDTH; i += LANES) {
        const long rows = std::clamp(count - i, 0L, (long)LANES);
        for (long k = 0; k < depth; k += LANES) {
            const long columns = std::min(depth - k, (long)LANES);
            Floats block[LANES];
            for (long r = 0; r < LANES; r++) {
                const float* row = from.at + (i + r) * from.stride + k;
                block[r] = r >= rows ? Floats{} : columns == LANES ? load(row) : load_some(row, columns);
            }
            transpose(block);
            for (long c = 0; c < columns; c++) store(to + (k + c) * WIDTH + i, block[c]);
        }
    }
}

// The sums of ROWS rows of a panel of the left operand and VECTORS vectors of one of the right, `rows` and `columns` of which are written.
// Not inlined: the sums would have to share the registers with what surrounds them.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void multiply_tile(const float* left, const float* right, long width, long depth, long rows, long columns, const Result<float>& to) {
    Floats sums[ROWS][VECTORS] = {};
    for (long i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(to.at + i * to.stride + v * LANES, 1);
    for (long k = 0; k < depth; k++) {
        Floats in[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) in[v] = load(right + k * width + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Floats factor = spread(left[k * LANES + i]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = fused(factor, in[v], sums[i][v]);
        }
    }
    const Floats scale = spread(to.scale);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
        if (i >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const long first = v * LANES, count = std::min(columns - first, (long)LANES);
            if (count <= 0) continue;
            float* c = to.at + i * to.stride + first;
            const float* base = to.add ? c : to.bias ? to.bias + first : nullptr;
            if (count == LANES) {
                store(c, base ? fused(sums[i][v], scale, load(base)) : sums[i][v] * scale);
            } else {
                const Floats sum = base ? fused(sums[i][v], scale, load_some(base, count)) : sums[i][v] * scale;
                store_some(c, sum, count);
            }
        }
    }
}

// `rows` of a panel of the left operand by `columns` of one of the right.
template <int VECTORS>
inline void multiply_panel(const float* left, const float* right, long width, long depth, long rows, long columns, const Result<float>& to) {
    // of few columns all rows at once: a sum has to wait for itself
    constexpr int ROWS = VECTORS == 1 ? LANES : TILE_ROWS;
    for (long i = 0; i < rows; i += ROWS)
        multiply_tile<ROWS, VECTORS>(left + i, right, width, depth, std::min(rows - i, (long)ROWS), columns,
                                     {to.at + i * to.stride, to.stride, to.bias, to.add, to.scale});
}

void multiply(Operand<float> a, Operand<float> b, long rows, long columns, long depth, Result<float> to) {
    static thread_local Space space;  // a block of either operand
    float *left = (float*)space.get(sizeof(float) * (LEFT + RIGHT)), *right = left + LEFT;
    for (long j = 0; j < columns; j += BLOCK_COLUMNS) {
        const long wide = std::min(BLOCK_COLUMNS, columns - j);
        for (long k = 0; k < depth; k += BLOCK_DEPTH) {
            const long deep = std::min(BLOCK_DEPTH, depth - k);
            for (long p = 0; p < wide; p += PANEL) copy_panel<PANEL>(b.from(j + p, k), std::min(PANEL, wide - p), deep, right + p * deep);
            for (long i = 0; i < rows; i += BLOCK_ROWS) {
                const long high = std::min(BLOCK_ROWS, rows - i);
                for (long g = 0; g < high; g += LANES)
                    copy_panel<LANES>(a.from(i + g, k), std::min(high - g, (long)LANES), deep, left + g * deep);
                for (long p = 0; p < wide; p += PANEL) {
                    const long here = std::min(PANEL, wide - p), vectors = (here + LANES - 1) / LANES;
                    for (long g = 0; g < high; g += LANES) {
                        const Result<float> own{to.at + (i + g) * to.stride + j + p, to.stride, to.bias ? to.bias + j + p : nullptr, to.add || k, to.scale};
                        const long some = std::min(high - g, (long)LANES);
                        const float *l = left + g * deep, *r = right + p * deep;
                        if (vectors == 3) multiply_panel<3>(l, r, PANEL, deep, some, here, own);
                        else if (vectors == 2) multiply_panel<2>(l, r, PANEL, deep, some, here, own);
                        else multiply_panel<1>(l, r, PANEL, deep, some, here, own);
                    }
                }
            }
        }
    }
}

}  // namespace

// c [rows, columns], whose rows are c_stride apart, = scale * a b + bias (or null); with `add` instead c += scale * a b. Element (i, k) of a
// lies at a[i * a_stride + k * a_step], (k, j) of b at b[j * b_stride + k * b_step]; of either one of the two is 1.
LORRY void matmul_float(const float* a, const float* b, const float* bias, float* c, long rows, long columns, long depth, long a_stride,
                        long a_step, long b_stride, long b_step, long c_stride, long add, float scale) {
    const Operand<float> left{a, a_stride, a_step}, right{b, b_stride, b_step};
    const Result<float> to{c, c_stride, bias, add != 0, scale};
    // the longer side is shared out: each thread copies the whole of the other operand, which is then the smaller
    const bool by_rows = rows > columns;
    const long unit = by_rows ? LANES : PANEL, units = ((by_rows ? rows : columns) + unit - 1) / unit;
#pragma omp parallel if (rows * columns * depth > ALONE)
    {
        const long threads = omp_get_num_threads(), own = omp_get_thread_num();
        const long first = units * own / threads * unit, last = std::min(units * (own + 1) / threads * unit, by_rows ? rows : columns);
        if (first < last) {
            if (by_rows)
                multiply(left.from(first, 0), right, last - first, columns, depth, {c + first * c_stride, c_stride, bias, to.add, scale});
            else
                multiply(left, right.from(first, 0), rows, last - first, depth, {c + first, c_stride, bias ? bias + first : nullptr, to.add, scale});
        }
    }
}
