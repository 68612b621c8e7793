// Products of a few rows with matrices of few bits: codes become values in registers and are multiplied there.
//
// The values are those that a row is opened to (packed.h), bit for bit; layouts and widths that registers do not fit are opened a panel
// at a time into the nearest cache.
#pragma once
#include "few_rows.h"
#include "packed.h"

#include <type_traits>

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

// Two vectors of values, rounded to bfloat16. Where the processor rounds both into one they come back by places: in `a` the first of
// each two neighbours, in `b` the second. Numbers below 2^-126 it takes for 0, which those of half-precision scales never are.
#if defined(__AVX512BF16__)
constexpr bool BY_PLACES = true;
static inline void round_both(__m512& a, __m512& b) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
#else
constexpr bool BY_PLACES = false;
static inline void round_both(__m512& a, __m512& b) {
    a = rounded16(a);
    b = rounded16(b);
}
#endif

// One scale for all lanes, and two neighbouring ones in turn.
constexpr auto ALIKE = [](const float* one) { return _mm512_set1_ps(*one); };
constexpr auto IN_TURN = [](const float* two) {
    double both;
    std::memcpy(&both, two, sizeof both);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
};

// The 16 numbers that codes choose from, and those of two tables in turn: the first eight twice each, and the others.
struct Numbers {
    const __m512 all, lower, upper;

    explicit Numbers(__m512 all)
        : all(all), lower(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), all)),
          upper(_mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), all)) {}
};

struct Tables {
    __m512 first, second;
};

// What a number counts at each place: (number - zeros) * by + least; zeros and least may be null.
struct Places {
    const float *by, *zeros, *least;

    template <typename Spread>
    inline __m512 value(__m512 number, long place, const Spread& spread) const {
        if (zeros) number = _mm512_sub_ps(number, spread(zeros + place));
        const __m512 scale = spread(by + place);
        return least ? _mm512_fmadd_ps(number, scale, spread(least + place)) : _mm512_mul_ps(number, scale);
    }

    template <bool ROUNDS>
    inline __m512 table(const Numbers& numbers, long place) const {
        const __m512 values = value(numbers.all, place, ALIKE);
        return ROUNDS ? rounded16(values) : values;
    }

    // Those of a place and of the next.
    template <bool ROUNDS>
    inline Tables tables(const Numbers& numbers, long place) const {
        if (!ROUNDS) return {table<false>(numbers, place), table<false>(numbers, place + 1)};
        Tables out;
        // in turn: as words then each two neighbours are a code's value in the one table and in the other
        if (BY_PLACES) out = {value(numbers.lower, place, IN_TURN), value(numbers.upper, place, IN_TURN)};
        else out = {value(numbers.all, place, ALIKE), value(numbers.all, place + 1, ALIKE)};
        round_both(out.first, out.second);
        return out;
    }
};

// 16 codes of a byte each, as floats.
template <bool SIGNED>
static inline __m512 code_numbers(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
    return _mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

// 32 values, rounded if asked, by inputs that lie as `byte_inputs` gives them.
template <bool ROUNDS, int ROWS>
static inline void multiply_values(__m512 a, __m512 b, const float* x, long stride, Floats (&even)[ROWS], Floats (&odd)[ROWS]) {
    if (ROUNDS) round_both(a, b);
    for (int r = 0; r < ROWS; r++) {
        even[r] = fused((Floats)a, load(x + r * stride), even[r]);
        odd[r] = fused((Floats)b, load(x + r * stride + 16), odd[r]);
    }
}
template <typename T>
static FloatRows byte_inputs(bool rounds, const Inputs<T>& x) { return rounds && BY_PLACES ? x.paired() : x.plain(); }

// 32 values of a table by codes of which a byte has two, times inputs of even and of odd places.
template <int ROWS>
static inline void multiply_nibbles(__m512 table, const uint8_t* codes, FloatRows x, Floats (&even)[ROWS], Floats (&odd)[ROWS]) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    // a permutation reads the low four bits of each lane
    const Floats high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), low = (Floats)_mm512_permutexvar_ps(byte, table);
    for (int r = 0; r < ROWS; r++) {
        even[r] = fused(high, load(x.at + r * x.stride), even[r]);
        odd[r] = fused(low, load(x.at + r * x.stride + 16), odd[r]);
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
        constexpr bool ROUNDS = sizeof(T) == sizeof(bf16);
        const long blocks = width / BLOCK;
        const Places places = {scales.data() + output * blocks, nullptr, nullptr};
        const Numbers numbers(_mm512_loadu_ps(source.levels));
        const uint8_t* codes = source.codes + (first + output) * width / 2;
        Floats odd[ROWS] = {};
        const auto multiply_block_of = [&](__m512 table, long b) __attribute__((always_inline)) {
            multiply_nibbles<ROWS>(table, codes + 32 * b, {x.at + 64 * b, x.stride}, sum, odd);
            multiply_nibbles<ROWS>(table, codes + 32 * b + 16, {x.at + 64 * b + 32, x.stride}, sum, odd);
        };
        long b = 0;
        for (; b + 2 <= blocks; b += 2) {
            __builtin_prefetch(codes + 32 * b + AHEAD, 0, 2);
            const Tables both = places.tables<ROUNDS>(numbers, b);
            multiply_block_of(both.first, b);
            multiply_block_of(both.second, b + 1);
        }
        if (b < blocks) multiply_block_of(places.table<ROUNDS>(numbers, b), b);
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }
};

template <typename T>
struct RowsPanel {
    static constexpr bool ROUNDS = sizeof(T) == sizeof(bf16);
    const Rows& source;
    const long first, width;

    static bool fits(const Rows&, long width) { return width % 32 == 0; }
    static FloatRows inputs(const Rows&, const Inputs<T>& x) { return byte_inputs(ROUNDS, x); }

    RowsPanel(const Rows& source, long first, long, long width, std::vector<float>&) : source(source), first(first), width(width) {}

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const uint8_t* codes = (const uint8_t*)source.codes + (first + output) * width;
        const __m512 by = _mm512_set1_ps(source.largest[first + output]), share = _mm512_set1_ps(1.0f / 127);
        Floats odd[ROWS] = {};
        for (long k = 0; k < width; k += 32) {
            if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
            // one after the other, as a row is opened
            const __m512 a = _mm512_mul_ps(_mm512_mul_ps(code_numbers<true>(codes + k), by), share);
            const __m512 b = _mm512_mul_ps(_mm512_mul_ps(code_numbers<true>(codes + k + 16), by), share);
            multiply_values<ROUNDS, ROWS>(a, b, x.at + k, x.stride, sum, odd);
        }
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }
};

template <typename T>
struct GridPanel {
    const Grid& source;
    const long first, width, from;  // from: the first row of scales
    Places places;  // of the panel

    static bool rounds(const Grid& source) { return source.rounded || sizeof(T) == sizeof(bf16); }
    static bool fits(const Grid& source, long width) {
        return source.kind < 3 && !source.groups && source.columns % 32 == 0 && width % 32 == 0;
    }
    static FloatRows inputs(const Grid& source, const Inputs<T>& x) { return source.kind ? byte_inputs(rounds(source), x) : x.paired(); }

    GridPanel(const Grid& source, long first, long count, long width, std::vector<float>& space)
        : source(source), first(first), width(width), from(first / source.rows) {
        const long start = from * source.across, length = ((first + count - 1) / source.rows - from + 1) * source.across;
        space.resize(2 * length);
        float *scales = space.data(), *others = space.data() + length;
        if (source.halves) widen_halves((const uint16_t*)source.scales + start, length, scales);
        places = {source.halves ? scales : (const float*)source.scales + start, nullptr, nullptr};
        if (source.minimums) {
            widen_halves(source.minimums + start, length, others);
            places.least = others;
        } else if (source.zeros) {
            const uint8_t* zeros = source.zeros + start;
            // the product of a half and a code is exact, and so what is left of two of them is that of the difference, rounded once
            for (long i = 0; i < length; i++) others[i] = source.halves ? -(zeros[i] * scales[i]) : zeros[i];
            (source.halves ? places.least : places.zeros) = others;
        }
    }

    template <int ROWS>
    inline void multiply(long output, FloatRows x, Floats (&sum)[ROWS]) const {
        const long row = source.rows == 1 ? output : (first + output) / source.rows - from;
        Floats odd[ROWS] = {};
        if (source.kind == 0)
            rounds(source) ? multiply_halves<true, ROWS>(output, row, x, sum, odd) : multiply_halves<false, ROWS>(output, row, x, sum, odd);
        else
            rounds(source) ? multiply_bytes<true, ROWS>(output, row, x, sum, odd) : multiply_bytes<false, ROWS>(output, row, x, sum, odd);
        for (int r = 0; r < ROWS; r++) sum[r] += odd[r];
    }

    // Codes of which a byte has two.
    template <bool ROUNDS, int ROWS>
    inline void multiply_halves(long output, long row, FloatRows x, Floats (&sum)[ROWS], Floats (&odd)[ROWS]) const {
        const Places places = this->places;
        const Numbers numbers(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        const uint8_t* codes = source.codes + (first + output) * width / 2;
        const auto multiply_32 = [&](__m512 table, long k) __attribute__((always_inline)) {
            multiply_nibbles<ROWS>(table, codes + k / 2, {x.at + k, x.stride}, sum, odd);
        };
        long at = 0, place = row * source.across;
        if (source.columns == 32)
            for (; at + 64 <= width; at += 64, place += 2) {
                if (at % 128 == 0) __builtin_prefetch(codes + at / 2 + AHEAD, 0, 2);
                const Tables both = places.tables<ROUNDS>(numbers, place);
                multiply_32(both.first, at);
                multiply_32(both.second, at + 32);
            }
        for (; at < width; at += source.columns, place++) {
            const long end = std::min(at + source.columns, width);
            const __m512 table = places.table<ROUNDS>(numbers, place);
            for (long k = at; k < end; k += 32) {
                if (k % 128 == 0) __builtin_prefetch(codes + k / 2 + AHEAD, 0, 2);
                multiply_32(table, k);
            }
        }
    }

    // Codes of a byte each.
    template <bool ROUNDS, int ROWS>
    inline void multiply_bytes(long output, long row, FloatRows x, Floats (&sum)[ROWS], Floats (&odd)[ROWS]) const {
        const Places places = this->places;
        const uint8_t* codes = source.codes + (first + output) * width;
        const auto multiply_places = [&](auto is_signed) __attribute__((always_inline)) {
            constexpr bool SIGNED = decltype(is_signed)::value;
            for (long at = 0, place = row * source.across; at < width; at += source.columns, place++)
                for (long k = at, end = std::min(at + source.columns, width); k < end; k += 32) {
                    if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
                    const __m512 a = places.value(code_numbers<SIGNED>(codes + k), place, ALIKE);
                    const __m512 b = places.value(code_numbers<SIGNED>(codes + k + 16), place, ALIKE);
                    multiply_values<ROUNDS, ROWS>(a, b, x.at + k, x.stride, sum, odd);
                }
        };
        source.kind == 2 ? multiply_places(std::true_type()) : multiply_places(std::false_type());
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
                sum[r] = fused(value[0], load(x.at + r * x.stride + k), sum[r]);
                odd[r] = fused(value[1], load(x.at + r * x.stride + k + LANES), odd[r]);
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
                to.write(row + r, at, sums, count);
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
    const auto rows = x.as_factors();
    const long width = x.width;
#pragma omp parallel if (to.outputs * width > PARALLEL)
    {
        std::vector<T> panel(PANEL * width);
#pragma omp for schedule(static)
        for (long at = 0; at < to.outputs; at += PANEL) {
            const long count = std::min(PANEL, to.outputs - at);
            for (long o = 0; o < count; o++) source.row(at + o, width, panel.data() + o * width);
            multiply_panel<T>(panel.data(), nullptr, count, width, rows, x.rows, at, to);
        }
    }
}
