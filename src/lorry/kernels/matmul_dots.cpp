// The product of two bfloat16 matrices in dot products of pairs, with float32 sums that are rounded once, for processors that have
// these and no matrix tiles.
//
// oneDNN, which torch calls, does as much where both are long; of some hundred rows it spends a third of the time on what it does before
// it multiplies, and of an adapter's ranks most of it. The right operand is copied into panels of pairs that a tile of the result reads
// in order, each while the memory of the next is fetched; the left one is read as it lies where its rows are contiguous. Every number is
// summed alone, in an order that only the depth decides: a row's result depends neither on its neighbours nor on threads.
#include "operands.h"
#include "vectors.h"

#if DOTS
#include <omp.h>

#include <algorithm>
#include <cstdlib>

namespace {

// A tile is TILE_ROWS x TILE_VECTORS vectors of sums: with a row of the right operand as many as registers hold.
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
constexpr long PANEL = TILE_VECTORS * LANES;  // columns of the right operand side by side
constexpr long ALONE = 1 << 21;               // multiplications; with fewer one thread is faster than waking another
constexpr long LINE = 64;                     // bytes that are fetched at once
static_assert(LANES == 16);

typedef uint32_t Pair;  // two numbers of the depth

// to [depth in pairs, WIDTH]: count <= WIDTH of the operand's rows, side by side; zeros beside them and behind an odd depth.
template <long WIDTH>
void copy_panel(const Operand<bf16>& from, long count, long depth, Pair* to) {
    if (from.stride == 1) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        for (long k = 0; k < depth; k += 2, to += WIDTH) {
            const bf16 *first = from.at + k * from.step, *second = first + from.step;
            for (long i = 0; i < WIDTH; i += LANES) {
                const long some = std::clamp(count - i, 0L, (long)LANES);
                const __mmask16 here = (__mmask16)((1u << some) - 1), there = k + 1 < depth ? here : 0;
                const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(here, first + i));
                const __m512i b = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(there, second + i));
                _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
            }
        }
        return;
    }
    for (long i = 0; i < WIDTH; i += LANES) {
        const long rows = std::clamp(count - i, 0L, (long)LANES);
        for (long k = 0; k < depth; k += 2 * LANES) {
            const long numbers = std::min(depth - k, 2L * LANES), pairs = (numbers + 1) / 2;
            const __mmask32 here = (__mmask32)((1ull << numbers) - 1);
            Floats block[LANES];
            for (long r = 0; r < LANES; r++) {
                const bf16* row = from.at + (i + r) * from.stride + k;
                block[r] = r < rows ? (Floats)_mm512_maskz_loadu_epi16(here, row) : Floats{};
            }
            transpose(block);
            Pair* line = to + k / 2 * WIDTH + i;
            if (pairs == LANES) {
#pragma GCC unroll 16
                for (long c = 0; c < LANES; c++) _mm512_storeu_ps(line + c * WIDTH, (__m512)block[c]);
            } else {
                for (long c = 0; c < pairs; c++) _mm512_storeu_ps(line + c * WIDTH, (__m512)block[c]);
            }
        }
    }
}

// The left operand as tiles read it: pair k of row i lies at at[i * stride + k * step], in numbers.
struct Left {
    const bf16* at;
    long stride, step;
};

// Of `count` sums that float32 holds until the depth is through: `first`, they begin; `last`, they go where the result does.
struct Part {
    float* sums;
    bool first, last;
};

static inline __m512 load_masked(const bf16* from, __mmask16 here) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, from)), 16));
}

static inline __m512 load_masked(const float* from, __mmask16 here) { return _mm512_maskz_loadu_ps(here, from); }

static inline void store_masked(float* to, __mmask16 here, __m512 x) { _mm512_mask_storeu_ps(to, here, x); }

static inline void store_masked(bf16* to, __mmask16 here, __m512 x) {
    _mm256_mask_storeu_epi16(to, here, (__m256i)_mm512_cvtneps_pbh(x));
}

// Memory of the panel that is copied next, line by line: stretches `apart` bytes from one to the next, `lines` of each, from the `next` of
// `count` lines on.
struct Ahead {
    const char* at;
    long apart, lines, next, count;

    inline void fetch(long some) {
        for (const long end = std::min(next + some, count); next < end; next++) {
            __builtin_prefetch(at + line * LINE, 0, 2);
            if (++line == lines) at += apart, line = 0;
        }
    }
    long line = 0;
};

// The sums of TILE_ROWS rows and VECTORS vectors of a panel, `rows` and `columns` of which are written. Not inlined: the sums would have
// to share the registers with what surrounds them.
template <int VECTORS, typename T>
__attribute__((noinline)) void multiply_tile(const Left& left, const Pair* right, long pairs, long rows, long columns, const Result<T>& to, Part part,
                                              Ahead& ahead, long fetched) {
    const bf16* row[TILE_ROWS];
    // those that are not there are summed as the first
    for (int i = 0; i < TILE_ROWS; i++) row[i] = left.at + (i < rows ? i : 0) * left.stride;
    __m512 sums[TILE_ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[i][v] = part.first ? _mm512_setzero_ps() : _mm512_loadu_ps(part.sums + i * PANEL + v * LANES);
    for (long i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(to.at + i * to.stride + v * LANES, 1);
    for (long k = 0, at = 0; k < pairs; k++, at += left.step) {
        if (k % 8 == 0) ahead.fetch(fetched);
        __m512bh in[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) in[v] = (__m512bh)_mm512_loadu_si512(right + k * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, row[i] + at, sizeof pair);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], factor, in[v]);
        }
    }
    if (!part.last) {
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(part.sums + i * PANEL + v * LANES, sums[i][v]);
        return;
    }
    const __m512 scale = _mm512_set1_ps(to.scale);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        if (i >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const long first = v * LANES, count = std::min(columns - first, (long)LANES);
            if (count <= 0) continue;
            const __mmask16 here = (__mmask16)((1u << count) - 1);
            T* c = to.at + i * to.stride + first;
            const T* base = to.add ? c : to.bias ? to.bias + first : nullptr;
            store_masked(c, here, base ? _mm512_fmadd_ps(sums[i][v], scale, load_masked(base, here)) : _mm512_mul_ps(sums[i][v], scale));
        }
    }
}

constexpr long BLOCK_DEPTH = 2048;  // numbers of the depth in a panel: with a tile's rows it stays in the second cache
constexpr long BLOCK_ROWS = 1024;   // of the left operand where it is copied, and of sums that wait

template <typename T>
void multiply(const Operand<bf16>& a, const Operand<bf16>& b, long rows, long columns, long depth, const Result<T>& to) {
    static thread_local Space right_space, left_space, sum_space;
    const long deepest = std::min(depth + 1, BLOCK_DEPTH) / 2 * 2, steps = (depth + BLOCK_DEPTH - 1) / BLOCK_DEPTH;
    Pair* right = (Pair*)right_space.get(sizeof(Pair) * PANEL * deepest / 2);
    // an odd depth would end in a pair that is half of the next row
    const bool copies = a.step != 1 || depth % 2;
    for (long top = 0; top < rows; top += BLOCK_ROWS) {
        const long high = std::min(BLOCK_ROWS, rows - top), groups = (high + TILE_ROWS - 1) / TILE_ROWS;
        const Operand<bf16> mine = a.from(top);
        // [rows / LANES][pairs][LANES]
        const long pairs = (depth + 1) / 2;
        Pair* copied = copies ? (Pair*)left_space.get(sizeof(Pair) * whole_vectors(high) * pairs) : nullptr;
        if (copies)
            for (long i = 0; i < high; i += LANES) copy_panel<LANES>(mine.from(i), std::min(high - i, (long)LANES), depth, copied + i * pairs);
        float* sums = steps > 1 ? (float*)sum_space.get(sizeof(float) * groups * TILE_ROWS * PANEL) : nullptr;
        for (long j = 0; j < columns; j += PANEL) {
            const long here = std::min(PANEL, columns - j), vectors = (here + LANES - 1) / LANES;
            for (long s = 0; s < steps; s++) {
                const long k = s * BLOCK_DEPTH, deep = std::min(BLOCK_DEPTH, depth - k);
                const Operand<bf16> panel = {b.at + j * b.stride + k * b.step, b.stride, b.step};
                copy_panel<PANEL>(panel, here, deep, right);
                // what comes next
                const bool down = s + 1 < steps;
                const long next_j = down ? j : j + PANEL, next_k = down ? k + BLOCK_DEPTH : 0;
                const long next_count = std::clamp(columns - next_j, 0L, PANEL), next_depth = next_count ? std::min(BLOCK_DEPTH, depth - next_k) : 0;
                const bool across = b.stride == 1;
                const long lines = ((across ? next_count : next_depth) * (long)sizeof(bf16) + LINE - 1) / LINE;
                Ahead ahead = {(const char*)(b.at + next_j * b.stride + next_k * b.step), (across ? b.step : b.stride) * (long)sizeof(bf16), lines, 0,
                               lines * (across ? next_depth : next_count)};
                const long fetched = (ahead.count + groups * (deep / 16) - 1) / std::max(groups * (deep / 16), 1L);
                for (long g = 0; g < groups; g++) {
                    const long i = g * TILE_ROWS, some = std::min(high - i, (long)TILE_ROWS);
                    const Left left = copies ? Left{(const bf16*)(copied + i / LANES * LANES * pairs + i % LANES + k / 2 * LANES), 2, 2 * LANES}
                                             : Left{mine.at + i * a.stride + k, a.stride, 2};
                    const Part part = {sums + (sums ? i * PANEL : 0), s == 0, s + 1 == steps};
                    const Result<T> own = to.from(top + i, j);
                    const long deep_pairs = (deep + 1) / 2;
                    if (vectors == 3) multiply_tile<3>(left, right, deep_pairs, some, here, own, part, ahead, fetched);
                    else if (vectors == 2) multiply_tile<2>(left, right, deep_pairs, some, here, own, part, ahead, fetched);
                    else multiply_tile<1>(left, right, deep_pairs, some, here, own, part, ahead, fetched);
                }
            }
        }
    }
}

// c (as `to` says) of a [rows, depth] and b, whose rows are here the result's columns.
template <typename T>
void multiply_shared(const Operand<bf16>& left, const Operand<bf16>& right, long rows, long columns, long depth, const Result<T>& to) {
    // the longer side is shared out
    const bool by_rows = rows > columns;
    const long unit = by_rows ? LANES : PANEL, units = ((by_rows ? rows : columns) + unit - 1) / unit;
#pragma omp parallel if (rows * columns * depth > ALONE)
    {
        const long threads = omp_get_num_threads(), own = omp_get_thread_num();
        const long first = units * own / threads * unit, last = std::min(units * (own + 1) / threads * unit, by_rows ? rows : columns);
        if (first < last) {
            if (by_rows) multiply(left.from(first), right, last - first, columns, depth, to.from(first, 0));
            else multiply(left, right.from(first), rows, last - first, depth, to.from(0, first));
        }
    }
}

// What an adapter has at one linear of those with the same input: B [outputs, rank], which has `rank` of the stacked A's ranks from the
// `first` on, the linear's outputs or their gradient y [rows, outputs], and the gradient of B, or null.
struct AdapterPart {
    bf16* y;
    const bf16* lora_B;
    float* grad_B;
    int64_t outputs, first, rank;
    double scale;
};

}  // namespace

// c [rows, columns], whose rows are c_stride apart, = scale * a b + bias (or null); with `add` instead c += scale * a b. Element (i, k) of a
// lies at a[i * a_stride + k * a_step], (k, j) of b at b[j * b_stride + k * b_step]; of either one of the two is 1.
LORRY void matmul_bf16(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long depth, long a_stride, long a_step,
                       long b_stride, long b_step, long c_stride, long add, float scale) {
    multiply_shared(Operand<bf16>{a, a_stride, a_step}, Operand<bf16>{b, b_stride, b_step}, rows, columns, depth,
                    Result<bf16>{c, c_stride, bias, add != 0, scale});
}

// The products of an adapter at linears that read the same input, each a call for all of them: of x [rows, width], A [ranks, width].
//
// low [rows, ranks] = x A^T; y += scale * low B^T for each part.
LORRY void adapter_forward_bf16(const bf16* x, const bf16* lora_A, bf16* low, const AdapterPart* parts, long count, long rows, long width, long ranks) {
    multiply_shared(Operand<bf16>{x, width, 1}, Operand<bf16>{lora_A, width, 1}, rows, ranks, width, Result<bf16>{low, ranks, nullptr, false, 1.0f});
    for (long p = 0; p < count; p++) {
        const AdapterPart& part = parts[p];
        multiply_shared(Operand<bf16>{low + part.first, ranks, 1}, Operand<bf16>{part.lora_B, part.rank, 1}, rows, part.outputs, part.rank,
                        Result<bf16>{part.y, part.outputs, nullptr, true, (float)part.scale});
    }
}

// From the gradients y: up [rows, ranks] = scale * y B for each part, and dx [rows, width] (or null) += up A.
LORRY void adapter_input_gradient_bf16(const bf16* lora_A, bf16* up, bf16* dx, const AdapterPart* parts, long count, long rows, long width, long ranks) {
    for (long p = 0; p < count; p++) {
        const AdapterPart& part = parts[p];
        multiply_shared(Operand<bf16>{part.y, part.outputs, 1}, Operand<bf16>{part.lora_B, 1, part.rank}, rows, part.rank, part.outputs,
                        Result<bf16>{up + part.first, ranks, nullptr, false, (float)part.scale});
    }
    if (dx) multiply_shared(Operand<bf16>{up, ranks, 1}, Operand<bf16>{lora_A, 1, width}, rows, width, ranks, Result<bf16>{dx, width, nullptr, true, 1.0f});
}

// grad_A [ranks, width] (or null) = up^T x, and grad_B = scale * y^T low for each part that wants one, in float32.
LORRY void adapter_gradients_bf16(const bf16* x, const bf16* low, const bf16* up, float* grad_A, const AdapterPart* parts, long count, long rows,
                                  long width, long ranks) {
    if (grad_A) multiply_shared(Operand<bf16>{up, 1, ranks}, Operand<bf16>{x, 1, width}, ranks, width, rows, Result<float>{grad_A, width, nullptr, false, 1.0f});
    for (long p = 0; p < count; p++) {
        const AdapterPart& part = parts[p];
        if (part.grad_B)
            multiply_shared(Operand<bf16>{part.y, 1, part.outputs}, Operand<bf16>{low + part.first, 1, ranks}, part.outputs, part.rank, rows,
                            Result<float>{part.grad_B, part.rank, nullptr, false, (float)part.scale});
    }
}
#endif
