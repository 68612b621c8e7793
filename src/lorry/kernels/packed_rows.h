// Products of a few rows with matrices of few bits: codes become values in registers and are multiplied there.
//
// The values are those that a row is opened to (packed.h), bit for bit; layouts and widths that registers do not fit are opened a panel
// at a time into the nearest cache.
#pragma once
#include "few_rows.h"
#include "packed.h"

#if defined(__AVX512F__)
constexpr long AHEAD = 4096;  // bytes of codes that are on their way while those before them are multiplied
constexpr long MOST_IN_REGISTERS = 8;  // rows; with more a panel that is opened once for all costs less

// Rounded to bfloat16 as `narrow` does; of finite values.
static inline __m512 rounded16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000)));
}

template <typename T>
static inline __m512 rounded_to(__m512 x) { return sizeof(T) == sizeof(bf16) ? rounded16(x) : x; }

// 32 values of a table by codes of which a byte has two, times inputs of even and of odd places.
template <int ROWS>
static inline void multiply_nibbles(__m512 table, const uint8_t* codes, FloatRows x, Floats (&even)[ROWS], Floats (&odd)[ROWS]) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    // a permutation reads the low four bits of each lane
    const Floats high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), low = (Floats)_mm512_permutexvar_ps(byte, table);
    for (int r = 0; r < ROWS; r++) {
        even[r] += high * load(x.at + r * x.stride);
        odd[r] += low * load(x.at + r * x.stride + 16);
    }
}

// Scales of blocks from the `first` on.
static inline void block_scales(const Flat& source, long first, long count, float* to) {
    long i = 0;
    for (; source.scale_levels && i + 16 <= count; i += 16) {
        const long block = first + i;
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)source.scales + block)));
        // of two blocks of scales at most: those up to the last lane of the first, then the second's
        const float* by = source.scale_scales + block / SCALE_BLOCK;
        const long left = SCALE_BLOCK - block % SCALE_BLOCK;
        const __m512 own = _mm512_mask_blend_ps((__mmask16)(left < 16 ? 0xffff << left : 0), _mm512_set1_ps(by[0]), _mm512_set1_ps(by[left < 16]));
        __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(code, source.scale_levels, 4), own);
        __asm__("" : "+v"(product));  // rounded on its own, as `product_plus` does
        _mm512_storeu_ps(to + i, _mm512_add_ps(product, _mm512_set1_ps(*source.offset)));
    }
    for (; i < count; i++) to[i] = source.scale(first + i);
}

// Halves as floats.
static inline void widen_halves(const uint16_t* from, long count, float* to) {
    long i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
    for (; i < count; i++) to[i] = half(from[i]);
}

// Each kind of source, read by outputs. Made for a panel: `count` outputs from `first` on, whose scales are worked out together.
template <typename T>
struct FlatPanel {
    const Flat& source;
    const long first, width;
    std::vector<float>& scales;

    static bool fits(const Flat&, long width) { return width % BLOCK == 0; }
    static FloatRows inputs(const Flat&, const Inputs<T>& x) { return x.paired(); }

    FlatPanel(const Flat& source, long first, long count, long width, std::vector<float>& space)
        : source(source), first(first), width(width), scales(space) {
        scales.resize(count * width / BLOCK);
        block_scales(source, first * width / BLOCK, scales.size(), scales.data());
    }

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const long blocks = width / BLOCK;
        const float* own = scales.data() + output * blocks;
        const uint8_t* codes = source.codes + (first + output) * width / 2;
        const __m512 levels = _mm512_loadu_ps(source.levels);
        Floats odd[ROWS] = {};
        for (long b = 0; b < blocks; b++) {
            __builtin_prefetch(codes + 32 * b + AHEAD, 0, 2);
            const __m512 table = rounded_to<T>(_mm512_mul_ps(levels, _mm512_set1_ps(own[b])));
            multiply_nibbles<ROWS>(table, codes + 32 * b, {x.at + 64 * b, x.stride}, sum, odd);
            multiply_nibbles<ROWS>(table, codes + 32 * b + 16, {x.at + 64 * b + 32, x.stride}, sum, odd);
        }
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }
};

template <typename T>
struct RowsPanel {
    const Rows& source;
    const long first, width;

    static bool fits(const Rows&, long width) { return width % 16 == 0; }
    static FloatRows inputs(const Rows&, const Inputs<T>& x) { return x.plain(); }

    RowsPanel(const Rows& source, long first, long, long width, std::vector<float>&) : source(source), first(first), width(width) {}

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const int8_t* codes = source.codes + (first + output) * width;
        const __m512 by = _mm512_set1_ps(source.largest[first + output]), share = _mm512_set1_ps(1.0f / 127);
        for (long k = 0; k < width; k += 16) {
            if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
            const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + k))));
            const Floats value = (Floats)rounded_to<T>(_mm512_mul_ps(_mm512_mul_ps(code, by), share));
            for (int r = 0; r < ROWS; r++) sum[r] += value * load(x.at + r * x.stride + k);
        }
    }
};

template <typename T>
struct GridPanel {
    const Grid& source;
    const long first, width, across;
    const float *scales, *minimums;

    static bool fits(const Grid& source, long width) {
        return source.kind < 3 && !source.groups && source.columns % 32 == 0 && width % 32 == 0;
    }
    static FloatRows inputs(const Grid& source, const Inputs<T>& x) { return source.kind ? x.plain() : x.paired(); }

    GridPanel(const Grid& source, long first, long count, long width, std::vector<float>& space)
        : source(source), first(first), width(width), across(source.across) {
        const long from = first / source.rows, places = ((first + count - 1) / source.rows - from + 1) * across;
        space.resize(2 * places);
        scales = (const float*)source.scales + from * across;
        if (source.halves) {
            widen_halves((const uint16_t*)source.scales + from * across, places, space.data());
            scales = space.data();
        }
        minimums = space.data() + places;
        if (source.minimums) widen_halves(source.minimums + from * across, places, space.data() + places);
    }

    // What codes of a place stand for.
    inline __m512 values(__m512 codes, long place, long zeros_at) const {
        const __m512 by = _mm512_set1_ps(scales[place]);
        __m512 out;
        if (source.zeros)
            out = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(source.zeros[zeros_at + place])), by);
        else if (source.minimums)
            out = _mm512_add_ps(_mm512_mul_ps(codes, by), _mm512_set1_ps(minimums[place]));
        else
            out = _mm512_mul_ps(codes, by);
        return source.rounded ? rounded16(out) : rounded_to<T>(out);
    }

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const long from = first / source.rows, row = (first + output) / source.rows - from, zeros_at = from * across;
        const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const uint8_t* codes = source.codes + (first + output) * (source.kind ? width : width / 2);
        Floats odd[ROWS] = {};
        for (long at = 0, place = row * across; at < width; at += source.columns, place++) {
            const long end = std::min(at + source.columns, width);
            if (source.kind == 0) {
                const __m512 table = values(all, place, zeros_at);
                for (long k = at; k < end; k += 32) {
                    __builtin_prefetch(codes + k / 2 + AHEAD, 0, 2);
                    multiply_nibbles<ROWS>(table, codes + k / 2, {x.at + k, x.stride}, sum, odd);
                }
            } else
                for (long k = at; k < end; k += 16) {
                    if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
                    const __m128i bytes = _mm_loadu_si128((const __m128i*)(codes + k));
                    const __m512i words = source.kind == 2 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
                    const Floats value = (Floats)values(_mm512_cvtepi32_ps(words), place, zeros_at);
                    for (int r = 0; r < ROWS; r++) sum[r] += value * load(x.at + r * x.stride + k);
                }
        }
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }
};

template <typename T>
struct HalvesPanel {
    const Halves& source;
    const long first, width;

    static bool fits(const Halves&, long width) { return width % (2 * LANES) == 0; }
    static FloatRows inputs(const Halves&, const Inputs<T>& x) { return x.paired(); }

    HalvesPanel(const Halves& source, long first, long, long width, std::vector<float>&) : source(source), first(first), width(width) {}

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const bf16* codes = source.codes + (first + output) * width;
        Floats odd[ROWS] = {};
        for (long k = 0; k < width; k += 2 * LANES) {
            __builtin_prefetch((const char*)(codes + k) + AHEAD, 0, 2);
            Floats value[2];
            open(codes + k, value);
            for (int r = 0; r < ROWS; r++) {
                sum[r] += value[0] * load(x.at + r * x.stride + k);
                odd[r] += value[1] * load(x.at + r * x.stride + k + LANES);
            }
        }
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }
};

template <typename T> FlatPanel<T> panel_of(const Flat&);
template <typename T> RowsPanel<T> panel_of(const Rows&);
template <typename T> GridPanel<T> panel_of(const Grid&);
template <typename T> HalvesPanel<T> panel_of(const Halves&);

template <typename T, int ROWS, typename Source>
static void multiply_packed_rows(const Source& source, long width, FloatRows x, long row, const Outputs<T>& to) {
#pragma omp parallel if (to.outputs * width > PARALLEL)
    {
        std::vector<float> space;
#pragma omp for schedule(static)
        for (long at = 0; at < to.outputs; at += PANEL) {
            const long count = std::min(PANEL, to.outputs - at);
            const decltype(panel_of<T>(source)) panel(source, at, count, width, space);
            Floats lanes[ROWS][PANEL] = {};
            for (long o = 0; o < count; o++) {
                Floats sum[ROWS] = {};
                panel.template multiply<ROWS>(o, x, sum);
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
static bool multiply_in_registers(const Source& source, const Inputs<T>& x, const Outputs<T>& to) {
    typedef decltype(panel_of<T>(source)) Panel;
    if (x.rows > MOST_IN_REGISTERS || !Panel::fits(source, x.width)) return false;
    const FloatRows inputs = Panel::inputs(source, x);
    for (long row = 0; row < x.rows; row += 4) {
        const FloatRows here = inputs.from(row);
        switch (std::min(x.rows - row, 4L)) {
            case 1: multiply_packed_rows<T, 1>(source, x.width, here, row, to); break;
            case 2: multiply_packed_rows<T, 2>(source, x.width, here, row, to); break;
            case 3: multiply_packed_rows<T, 3>(source, x.width, here, row, to); break;
            default: multiply_packed_rows<T, 4>(source, x.width, here, row, to);
        }
    }
    return true;
}
#else
template <typename T, typename Source>
static bool multiply_in_registers(const Source&, const Inputs<T>&, const Outputs<T>&) { return false; }
#endif

// A packed matrix [outputs, width] by all rows of x.
template <typename T, typename Source>
static void multiply_packed(const Source& source, const Inputs<T>& x, const Outputs<T>& to) {
    if (multiply_in_registers(source, x, to)) return;
    const FloatRows rows = x.as_opened();
    const long width = x.width;
#pragma omp parallel if (to.outputs * width > PARALLEL)
    {
        std::vector<T> panel(PANEL * width);
#pragma omp for schedule(static)
        for (long at = 0; at < to.outputs; at += PANEL) {
            const long count = std::min(PANEL, to.outputs - at);
            for (long o = 0; o < count; o++) source.row(at + o, width, panel.data() + o * width);
            multiply_panel<T, false>(panel.data(), count, width, rows, x.rows, at, to);
        }
    }
}
