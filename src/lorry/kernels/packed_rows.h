// Products of a few rows with matrices of few bits: codes become values in registers and are multiplied there.
//
// The values are those that a row is opened to (packed.h), bit for bit; layouts and widths that registers do not fit are opened a panel
// at a time into the nearest cache.
#pragma once
#include "few_rows.h"
#include "packed.h"

constexpr long MOST_IN_REGISTERS = 8;  // rows; with more a panel that is opened once for all costs less

#if defined(__AVX512F__)
// Rounded to bfloat16 as `narrow` does; of finite values.
static inline __m512 rounded16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000)));
}

// The 64 values of two tables of 16, by codes of which a byte has two: those of even and of odd places, side by side as `pair` puts inputs.
template <typename T>
struct Nibbles {
    static constexpr long HALF = 16;  // even places that lie together, then odd ones
    __m512 first, second;

    Nibbles(__m512 a, __m512 b) : first(round(a)), second(round(b)) {}
    static inline __m512 round(__m512 x) { return sizeof(T) == 2 ? rounded16(x) : x; }

    template <int ROWS>
    inline void add(const uint8_t* codes, const float* x, long stride, Floats (&even)[ROWS], Floats (&odd)[ROWS]) const {
        for (int h = 0; h < 2; h++) {
            const __m512 table = h ? second : first;
            const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * h)));
            // a permutation reads the low four bits of each lane
            const Floats a = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), b = (Floats)_mm512_permutexvar_ps(byte, table);
            for (int r = 0; r < ROWS; r++) {
                even[r] += a * load(x + r * stride + 32 * h);
                odd[r] += b * load(x + r * stride + 32 * h + 16);
            }
        }
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <>
struct Nibbles<bf16> {
    static constexpr long HALF = 32;
    __m512i values;  // lanes of 16 bits: the first table's, then the second's

    Nibbles(__m512 a, __m512 b) : values((__m512i)_mm512_cvtne2ps_pbh(b, a)) {}

    template <int ROWS>
    inline void add(const uint8_t* codes, const bf16* x, long stride, Floats (&even)[ROWS], Floats (&odd)[ROWS]) const {
        const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
        const __m512i table = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const __m512i high = _mm512_or_si512(_mm512_srli_epi16(byte, 4), table);
        const __m512i low = _mm512_ternarylogic_epi32(byte, _mm512_set1_epi16(15), table, 0xea);  // (byte & 15) | table
        const __m512bh a = (__m512bh)_mm512_permutexvar_epi16(high, values), b = (__m512bh)_mm512_permutexvar_epi16(low, values);
        for (int r = 0; r < ROWS; r++) {
            Pairing<bf16>::add(even[r], a, Pairing<bf16>::read(x + r * stride));
            Pairing<bf16>::add(odd[r], b, Pairing<bf16>::read(x + r * stride + 32));
        }
    }
};
#endif

// A step of values as `Pairing` multiplies them, of a function that gives 16 of them in floats.
template <typename T, typename Sixteen>
static inline typename Pairing<T>::Value step_of(const Sixteen& values, long at) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) return _mm512_cvtne2ps_pbh(values(at + 16), values(at));
    else return (Floats)values(at);
#else
    return (Floats)(sizeof(T) == 2 ? rounded16(values(at)) : values(at));
#endif
}

// Inputs with the even and the odd places of every 2 * HALF side by side.
template <typename T>
static std::vector<typename Pairing<T>::Input> pair(const InputRows<T>& x, long rows, long width) {
    constexpr long HALF = Nibbles<T>::HALF;
    std::vector<typename Pairing<T>::Input> out(rows * width);
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < width; k += 2 * HALF)
            for (long i = 0; i < HALF; i++) {
                out[r * width + k + i] = x.at[r * x.stride + k + 2 * i];
                out[r * width + k + HALF + i] = x.at[r * x.stride + k + 2 * i + 1];
            }
    return out;
}

// Whether codes of which a byte has two are taken 64 at a time.
static inline bool has_nibbles(const Flat&) { return true; }
static inline bool has_nibbles(const Rows&) { return false; }
static inline bool has_nibbles(const Grid& source) { return source.kind == 0; }

static inline bool fits_registers(const Flat&, long width) { return width % 64 == 0; }
static inline bool fits_registers(const Rows&, long width) { return width % 32 == 0; }
static inline bool fits_registers(const Grid& source, long width) {
    return source.kind < 3 && !source.groups && width % 64 == 0 && source.columns % 32 == 0;
}

// Scales of blocks from the `first` on.
static inline void block_scales(const Flat& source, long first, long count, float* to) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    long i = 0;
    for (; source.scale_levels && i + 16 <= count; i += 16) {
        const long block = first + i;
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)source.scales + block)));
        const __m512i place = _mm512_srli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(block % SCALE_BLOCK)), 8);
        __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(code, source.scale_levels, 4),
                                       _mm512_i32gather_ps(place, source.scale_scales + block / SCALE_BLOCK, 4));
        __asm__("" : "+v"(product));  // rounded on its own, as `product_plus` does
        _mm512_storeu_ps(to + i, _mm512_add_ps(product, _mm512_set1_ps(*source.offset)));
    }
    for (; i < count; i++) to[i] = source.scale(first + i);
}

// Scales of the blocks of `count` outputs from `at` on, where working them out one by one would take long.
static inline void panel_scales(const Flat& source, long at, long count, long width, std::vector<float>& to) {
    to.resize(count * width / BLOCK);
    block_scales(source, at * width / BLOCK, count * width / BLOCK, to.data());
}
template <typename Source>
static inline void panel_scales(const Source&, long, long, long, std::vector<float>&) {}

// Sums of one output with ROWS rows, in lanes; scales: of the panel that begins at output `first`.
template <typename T, int ROWS>
static inline void multiply_output(const Flat& source, long first, long r, long width, const float* panel, const InputRows<T>& x,
                                   Floats (&sum)[ROWS]) {
    const long blocks = width / BLOCK;
    const float* scales = panel + (r - first) * blocks;
    const __m512 levels = _mm512_loadu_ps(source.levels);
    const uint8_t* codes = source.codes + r * width / 2;
    Floats odd[ROWS] = {};
    for (long b = 0; b < blocks; b++) {
        const __m512 values = _mm512_mul_ps(levels, _mm512_set1_ps(scales[b]));
        Nibbles<T>(values, values).template add<ROWS>(codes + 32 * b, x.at + 64 * b, x.stride, sum, odd);
    }
    for (int i = 0; i < ROWS; i++) sum[i] += odd[i];
}

template <typename T, int ROWS>
static inline void multiply_output(const Rows& source, long, long r, long width, const float*, const InputRows<T>& x, Floats (&sum)[ROWS]) {
    typedef Pairing<T> P;
    const int8_t* codes = source.codes + r * width;
    const __m512 by = _mm512_set1_ps(source.largest[r]), share = _mm512_set1_ps(1.0f / 127);
    const auto values = [&](long at) {
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + at))));
        return _mm512_mul_ps(_mm512_mul_ps(code, by), share);
    };
    for (long k = 0; k < width; k += P::STEP) {
        const typename P::Value weights = step_of<T>(values, k);
        for (int i = 0; i < ROWS; i++) P::add(sum[i], weights, P::read(x.at + i * x.stride + k));
    }
}

// What 16 codes of a place of the grid stand for.
static inline __m512 grid_values(const Grid& source, __m512 codes, long place) {
    const __m512 by = _mm512_set1_ps(source.scale(place));
    __m512 values;
    if (source.zeros)
        values = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(source.zeros[place])), by);
    else if (source.minimums)
        values = _mm512_add_ps(_mm512_mul_ps(codes, by), _mm512_set1_ps(half(source.minimums[place])));
    else
        values = _mm512_mul_ps(codes, by);
    return source.rounded ? rounded16(values) : values;
}

template <typename T, int ROWS>
static inline void multiply_output(const Grid& source, long, long r, long width, const float*, const InputRows<T>& x, Floats (&sum)[ROWS]) {
    typedef Pairing<T> P;
    const long first = r / source.rows * source.across;
    if (source.kind == 0) {
        const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const uint8_t* codes = source.codes + r * width / 2;
        Floats odd[ROWS] = {};
        for (long k = 0; k < width; k += 64) {
            const long one = k / source.columns, two = (k + 32) / source.columns;
            const __m512 a = grid_values(source, all, first + one), b = two == one ? a : grid_values(source, all, first + two);
            Nibbles<T>(a, b).template add<ROWS>(codes + k / 2, x.at + k, x.stride, sum, odd);
        }
        for (int i = 0; i < ROWS; i++) sum[i] += odd[i];
        return;
    }
    const uint8_t* codes = source.codes + r * width;
    for (long from = 0, place = first; from < width; from += source.columns, place++) {
        const auto values = [&](long at) {
            const __m128i bytes = _mm_loadu_si128((const __m128i*)(codes + at));
            const __m512i words = source.kind == 2 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
            return grid_values(source, _mm512_cvtepi32_ps(words), place);
        };
        for (long k = from; k < std::min(from + source.columns, width); k += P::STEP) {
            const typename P::Value weights = step_of<T>(values, k);
            for (int i = 0; i < ROWS; i++) P::add(sum[i], weights, P::read(x.at + i * x.stride + k));
        }
    }
}

template <typename T, int ROWS, typename Source>
static void multiply_packed_rows(const Source& source, long width, const InputRows<T>& x, long row, const Outputs<T>& to) {
#pragma omp parallel if (to.outputs * width > PARALLEL)
    {
        std::vector<float> scales;
#pragma omp for schedule(static)
        for (long at = 0; at < to.outputs; at += PANEL) {
            const long count = std::min(PANEL, to.outputs - at);
            Floats lanes[ROWS][PANEL] = {};
            panel_scales(source, at, count, width, scales);
            for (long o = 0; o < count; o++) {
                Floats sum[ROWS] = {};
                multiply_output<T, ROWS>(source, at, at + o, width, scales.data(), x, sum);
                for (int r = 0; r < ROWS; r++) lanes[r][o] = sum[r];
            }
            for (int r = 0; r < ROWS; r++) {
                float sums[PANEL];
                add_lanes<PANEL>(lanes[r], sums);
                for (long o = 0; o < count; o++) to.write(row + r, at + o, sums[o]);
            }
        }
    }
}

template <typename T, typename Source>
static bool multiply_in_registers(const Source& source, long width, const InputRows<T>& x, long rows, const Outputs<T>& to) {
    if (rows > MOST_IN_REGISTERS || !fits_registers(source, width)) return false;
    std::vector<typename Pairing<T>::Input> paired;
    InputRows<T> inputs = x;
    if (has_nibbles(source)) {
        paired = pair(x, rows, width);
        inputs = {paired.data(), width};
    }
    for (long row = 0; row < rows; row += 4) {
        const InputRows<T> here = inputs.from(row);
        switch (std::min(rows - row, 4L)) {
            case 1: multiply_packed_rows<T, 1>(source, width, here, row, to); break;
            case 2: multiply_packed_rows<T, 2>(source, width, here, row, to); break;
            case 3: multiply_packed_rows<T, 3>(source, width, here, row, to); break;
            default: multiply_packed_rows<T, 4>(source, width, here, row, to);
        }
    }
    return true;
}
#else
template <typename T, typename Source>
static bool multiply_in_registers(const Source&, long, const Inputs<T>&, long, const Outputs<T>&) { return false; }
#endif

// A packed matrix [outputs, width] by `rows` rows.
template <typename T, typename Source>
static void multiply_packed(const Source& source, long width, const InputRows<T>& x, long rows, const Outputs<T>& to) {
    if (multiply_in_registers(source, width, x, rows, to)) return;
#pragma omp parallel if (to.outputs * width > PARALLEL)
    {
        std::vector<T> panel(PANEL * width);
#pragma omp for schedule(static)
        for (long at = 0; at < to.outputs; at += PANEL) {
            const long count = std::min(PANEL, to.outputs - at);
            for (long o = 0; o < count; o++) source.row(at + o, width, panel.data() + o * width);
            multiply_panel(panel.data(), count, width, x, rows, at, to, false);
        }
    }
}
