// Products of a few rows with matrices of few bits: codes become values in registers and are multiplied there.
//
// The values are those that a row is opened to (packed.h), bit for bit, and they are summed in the order of `multiply_block`, so that the
// product is that with the opened matrix, to the bit; but for float products of four-bit codes, whose even and odd places are summed apart
// (in order they would take two more permutations of every 32). Layouts and widths that registers do not fit are opened a panel at a time into
// the nearest cache.
#pragma once
#include "few_rows.h"
#include "packed.h"

#include <type_traits>

#if defined(__AVX512F__)
constexpr long AHEAD = 4096;  // bytes of codes that are on their way while those before them are multiplied
// Rows that are multiplied in registers; with more a panel that is opened once for all costs less. Measured on Intel's model 207, and where dot
// products are fast on Zen 5, of Q4_1, Q8_0 and NF4.
template <typename T>
constexpr long MOST_IN_REGISTERS = !DOTS ? 8 : sizeof(T) == sizeof(bf16) ? 12 : 32;

// Rounded to bfloat16 as `narrow` does; of finite values.
static inline __m512 rounded16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000)));
}

// Two vectors of 16 values as they follow one another, rounded to bfloat16: all 32 in order, two a word. Numbers below 2^-126 some
// processors take for 0, which those of half-precision scales never are.
static inline __m512i rounded_pairs(__m512 a, __m512 b) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(b, a);
#else
    const __m512i upper = _mm512_setr_epi64(0x0007000500030001, 0x000f000d000b0009, 0x0017001500130011, 0x001f001d001b0019, 0x0027002500230021,
                                            0x002f002d002b0029, 0x0037003500330031, 0x003f003d003b0039);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(rounded16(a)), upper, _mm512_castps_si512(rounded16(b)));
#endif
}

// The same as floats, of even places and of odd ones.
static inline void open_pairs(__m512i pairs, Floats (&to)[2]) {
    to[0] = (Floats)_mm512_slli_epi32(pairs, 16);
    to[1] = (Floats)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
}

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
#if DOTS
struct WordTables {
    __m512i first, second;
};
#endif

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

#if DOTS
    // For products of bfloat16: words, all 16 of them twice.
    inline __m512i word_table(const Numbers& numbers, long place) const {
        const __m512 values = value(numbers.all, place, ALIKE);
        return rounded_pairs(values, values);
    }
#endif

    // Those of a place and of the next.
    template <bool ROUNDS>
    inline Tables tables(const Numbers& numbers, long place) const {
        if (!ROUNDS) return {table<false>(numbers, place), table<false>(numbers, place + 1)};
#if defined(__AVX512BF16__)
        // in turn: as words then each two neighbours are a code's value in the one table and in the other
        Floats both[2];
        open_pairs(rounded_pairs(value(numbers.lower, place, IN_TURN), value(numbers.upper, place, IN_TURN)), both);
        return {(__m512)both[0], (__m512)both[1]};
#else
        return {table<true>(numbers, place), table<true>(numbers, place + 1)};
#endif
    }
};

// 16 codes of a byte each, as floats.
template <bool SIGNED>
static inline __m512 code_numbers(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
    return _mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

// 32 values of codes of a byte each, as weights of a type are multiplied; those of float rounded if asked.
template <bool ROUNDS>
static inline void take_values(__m512 a, __m512 b, Floats (&to)[2], const float*) {
    to[0] = (Floats)(ROUNDS ? rounded16(a) : a);
    to[1] = (Floats)(ROUNDS ? rounded16(b) : b);
}
#if DOTS
template <bool ROUNDS>
static inline void take_values(__m512 a, __m512 b, __m512bh (&to)[1], const bf16*) { to[0] = (__m512bh)rounded_pairs(a, b); }
#else
template <bool ROUNDS>
static inline void take_values(__m512 a, __m512 b, Floats (&to)[2], const bf16*) { open_pairs(rounded_pairs(a, b), to); }
#endif

// 32 values by a row's inputs.
template <int ROWS>
static inline void multiply_values(const Floats (&values)[2], FloatRows x, Floats (&sum)[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        const float* from = x.at + r * x.stride;
        sum[r] = fused(values[1], load(from + LANES), fused(values[0], load(from), sum[r]));
    }
}
#if DOTS
template <int ROWS>
static inline void multiply_values(const __m512bh (&values)[1], Strided<bf16> x, Floats (&sum)[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        __m512bh in[1];
        open(x.at + r * x.stride, in);
        sum[r] = fused(values[0], in[0], sum[r]);
    }
}
#endif

// What 32 values of a type are multiplied as.
template <typename T>
struct Values {
    typedef Floats Type[2];
};
#if DOTS
template <>
struct Values<bf16> {
    typedef __m512bh Type[1];
};
#endif

// 32 values of a table by codes of which a byte has two: those of even places, and of odd ones.
static inline void look_up(__m512 table, const uint8_t* codes, Floats (&to)[2]) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    // a permutation reads the low four bits of each lane
    to[0] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
    to[1] = (Floats)_mm512_permutexvar_ps(byte, table);
}
#if DOTS
// Of a table of words, in order.
static inline void look_up(__m512i table, const uint8_t* codes, __m512bh (&to)[1]) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
    // a permutation of words reads the low five bits of each, and the table has its 16 twice
#if defined(__AVX512VBMI__)
    // of every two bytes the bits from 4, 0, 12 and 8 on
    const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2008200c20002004), _mm512_cvtepu16_epi64(bytes));
#else
    const __m512i byte = _mm512_cvtepu8_epi32(bytes), index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
#endif
    to[0] = (__m512bh)_mm512_permutexvar_epi16(index, table);
}
#endif

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

// Inputs of codes of which a byte has two: floats by even and odd places.
static inline FloatRows nibble_inputs(const Inputs<float>& x) { return x.paired(); }
static inline auto nibble_inputs(const Inputs<bf16>& x) { return x.as_factors(); }

// The 32 values from place k on.
template <typename T, int ROWS, typename Table>
static inline void multiply_nibbles(Table table, const uint8_t* codes, Strided<typename Factors<T>::Number> x, long k, Floats (&sum)[ROWS]) {
    typename Values<T>::Type values;
    look_up(table, codes, values);
    multiply_values<ROWS>(values, {x.at + k, x.stride}, sum);
}

template <typename T, bool ROUNDS>
static inline auto one_table(const Places& places, const Numbers& numbers, long place) {
#if DOTS
    if constexpr (sizeof(T) == sizeof(bf16)) return places.word_table(numbers, place);
    else
#endif
        return places.table<ROUNDS>(numbers, place);
}
template <typename T, bool ROUNDS>
static inline auto two_tables(const Places& places, const Numbers& numbers, long place) {
#if DOTS
    if constexpr (sizeof(T) == sizeof(bf16)) return WordTables{places.word_table(numbers, place), places.word_table(numbers, place + 1)};
    else
#endif
        return places.tables<ROUNDS>(numbers, place);
}

// Each kind of source, read by outputs. Made for a panel: `count` outputs from `first` on, whose scales are worked out together.
template <typename T>
struct FlatPanel {
    typedef Strided<typename Factors<T>::Number> In;
    const Flat& source;
    const long first, width;
    std::vector<float>& scales;

    static bool fits(const Flat&, long width) { return width % BLOCK == 0; }
    static In inputs(const Flat&, const Inputs<T>& x) { return nibble_inputs(x); }

    FlatPanel(const Flat& source, long first, long count, long width, std::vector<float>& space)
        : source(source), first(first), width(width), scales(space) {
        scales.resize(count * width / BLOCK);
        block_scales(source, first * width / BLOCK, scales.size(), scales.data());
    }

    template <int ROWS>
    inline void multiply(long output, In x, Floats (&sum)[ROWS]) const {
        const long blocks = width / BLOCK;
        const Places places = {scales.data() + output * blocks, nullptr, nullptr};
        const Numbers numbers(_mm512_loadu_ps(source.levels));
        const uint8_t* codes = source.codes + (first + output) * width / 2;
        const auto multiply_block_of = [&](auto table, long b) __attribute__((always_inline)) {
            multiply_nibbles<T, ROWS>(table, codes + 32 * b, x, 64 * b, sum);
            multiply_nibbles<T, ROWS>(table, codes + 32 * b + 16, x, 64 * b + 32, sum);
        };
        long b = 0;
        for (; b + 2 <= blocks; b += 2) {
            __builtin_prefetch(codes + 32 * b + AHEAD, 0, 2);
            const auto both = two_tables<T, sizeof(T) == sizeof(bf16)>(places, numbers, b);
            multiply_block_of(both.first, b);
            multiply_block_of(both.second, b + 1);
        }
        if (b < blocks) multiply_block_of(one_table<T, sizeof(T) == sizeof(bf16)>(places, numbers, b), b);
    }
};

template <typename T>
struct RowsPanel {
    typedef Strided<typename Factors<T>::Number> In;
    const Rows& source;
    const long first, width;

    static bool fits(const Rows&, long width) { return width % 32 == 0; }
    static In inputs(const Rows&, const Inputs<T>& x) { return x.as_factors(); }

    RowsPanel(const Rows& source, long first, long, long width, std::vector<float>&) : source(source), first(first), width(width) {}

    template <int ROWS>
    inline void multiply(long output, In x, Floats (&sum)[ROWS]) const {
        const uint8_t* codes = (const uint8_t*)source.codes + (first + output) * width;
        const __m512 by = _mm512_set1_ps(source.largest[first + output]), share = _mm512_set1_ps(1.0f / 127);
        for (long k = 0; k < width; k += 32) {
            if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
            // one after the other, as a row is opened
            const __m512 a = _mm512_mul_ps(_mm512_mul_ps(code_numbers<true>(codes + k), by), share);
            const __m512 b = _mm512_mul_ps(_mm512_mul_ps(code_numbers<true>(codes + k + 16), by), share);
            typename Values<T>::Type values;
            take_values<false>(a, b, values, (const T*)nullptr);
            multiply_values<ROWS>(values, {x.at + k, x.stride}, sum);
        }
    }
};

template <typename T>
struct GridPanel {
    typedef Strided<typename Factors<T>::Number> In;
    const Grid& source;
    const long first, width, from;  // from: the first row of scales
    Places places;  // of the panel

    static bool fits(const Grid& source, long width) {
        return source.kind < 3 && !source.groups && source.columns % 32 == 0 && width % 32 == 0;
    }
    static In inputs(const Grid& source, const Inputs<T>& x) { return source.kind ? x.as_factors() : nibble_inputs(x); }

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
    inline void multiply(long output, In x, Floats (&sum)[ROWS]) const {
        const long row = source.rows == 1 ? output : (first + output) / source.rows - from;
        const bool rounds = source.rounded || sizeof(T) == sizeof(bf16);
        if (source.kind == 0)
            rounds ? multiply_halves<true, ROWS>(output, row, x, sum) : multiply_halves<false, ROWS>(output, row, x, sum);
        else
            rounds ? multiply_bytes<true, ROWS>(output, row, x, sum) : multiply_bytes<false, ROWS>(output, row, x, sum);
    }

    // Codes of which a byte has two.
    template <bool ROUNDS, int ROWS>
    inline void multiply_halves(long output, long row, In x, Floats (&sum)[ROWS]) const {
        const Places places = this->places;
        const Numbers numbers(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        const uint8_t* codes = source.codes + (first + output) * width / 2;
        long at = 0, place = row * source.across;
        if (source.columns == 32)
            for (; at + 64 <= width; at += 64, place += 2) {
                if (at % 128 == 0) __builtin_prefetch(codes + at / 2 + AHEAD, 0, 2);
                const auto both = two_tables<T, ROUNDS>(places, numbers, place);
                multiply_nibbles<T, ROWS>(both.first, codes + at / 2, x, at, sum);
                multiply_nibbles<T, ROWS>(both.second, codes + at / 2 + 16, x, at + 32, sum);
            }
        for (; at < width; at += source.columns, place++) {
            const long end = std::min(at + source.columns, width);
            const auto table = one_table<T, ROUNDS>(places, numbers, place);
            for (long k = at; k < end; k += 32) {
                if (k % 128 == 0) __builtin_prefetch(codes + k / 2 + AHEAD, 0, 2);
                multiply_nibbles<T, ROWS>(table, codes + k / 2, x, k, sum);
            }
        }
    }

    // Codes of a byte each.
    template <bool ROUNDS, int ROWS>
    inline void multiply_bytes(long output, long row, In x, Floats (&sum)[ROWS]) const {
        const Places places = this->places;
        const uint8_t* codes = source.codes + (first + output) * width;
        const auto multiply_places = [&](auto is_signed) __attribute__((always_inline)) {
            constexpr bool SIGNED = decltype(is_signed)::value;
            for (long at = 0, place = row * source.across; at < width; at += source.columns, place++)
                for (long k = at, end = std::min(at + source.columns, width); k < end; k += 32) {
                    if (k % 64 == 0) __builtin_prefetch(codes + k + AHEAD, 0, 2);
                    const __m512 a = places.value(code_numbers<SIGNED>(codes + k), place, ALIKE);
                    const __m512 b = places.value(code_numbers<SIGNED>(codes + k + 16), place, ALIKE);
                    typename Values<T>::Type values;
                    take_values<ROUNDS>(a, b, values, (const T*)nullptr);
                    multiply_values<ROWS>(values, {x.at + k, x.stride}, sum);
                }
        };
        source.kind == 2 ? multiply_places(std::true_type()) : multiply_places(std::false_type());
    }
};

template <typename T>
struct HalvesPanel {
    typedef Strided<typename Factors<T>::Number> In;
    const Halves& source;
    const long first, width;

    static bool fits(const Halves&, long width) { return width % (2 * LANES) == 0; }
    static In inputs(const Halves&, const Inputs<T>& x) { return x.as_factors(); }

    HalvesPanel(const Halves& source, long first, long, long width, std::vector<float>&) : source(source), first(first), width(width) {}

    template <int ROWS>
    inline void multiply(long output, In x, Floats (&sum)[ROWS]) const {
        const bf16* codes = source.codes + (first + output) * width;
        for (long k = 0; k < width; k += 2 * LANES) {
            __builtin_prefetch((const char*)(codes + k) + AHEAD, 0, 2);
            typename Values<T>::Type values;
            take_values<false>((__m512)load(codes + k), (__m512)load(codes + k + LANES), values, (const T*)nullptr);
            multiply_values<ROWS>(values, {x.at + k, x.stride}, sum);
        }
    }
};

template <typename T> FlatPanel<T> panel_of(const Flat&);
template <typename T> RowsPanel<T> panel_of(const Rows&);
template <typename T> GridPanel<T> panel_of(const Grid&);
template <typename T> HalvesPanel<T> panel_of(const Halves&);

template <typename T, int ROWS, typename Source>
static void multiply_packed_rows(const Source& source, long width, Strided<typename Factors<T>::Number> x, long row, const Outputs<T>& to) {
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
    if (x.rows > MOST_IN_REGISTERS<T> || !Panel::fits(source, x.width)) return false;
    const auto inputs = Panel::inputs(source, x);
    for (long row = 0; row < x.rows; row += 4) {
        const auto here = inputs.from(row);
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
