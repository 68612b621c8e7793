// Vectors of floats in the compiler's own terms, as wide as what is compiled for has them: one source for AVX-512, AVX2, NEON and
// whatever is below them.
#pragma once
#include "common.h"

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Whether dot products of bfloat16 pairs are there and fast (processor.py says of which processors).
#if defined(LORRY_DOTS) && defined(__AVX512BF16__)
#define DOTS 1
#else
#define DOTS 0
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(LANES * 2)));

static inline Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

static inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// The same from and to bfloat16, rounded as `narrow` does.
static inline Floats load(const bf16* from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Bits) << 16);
}

static inline void store(bf16* to, Floats x) {
    const Bits bits = (Bits)x;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Ints is_nan = x != x;
    rounded = is_nan ? Bits{} + 0x7fc0 : rounded;
    const HalfBits half = __builtin_convertvector(rounded, HalfBits);
    std::memcpy(to, &half, sizeof half);
}

// Fewer than a vector, `count` of them; the other lanes are 0.
template <typename T>
static inline Floats load_some(const T* from, long count) {
    T all[LANES] = {};
    std::memcpy(all, from, sizeof(T) * count);
    return load(all);
}

template <typename T>
static inline void store_some(T* to, Floats x, long count) {
    T all[LANES];
    store(all, x);
    std::memcpy(to, all, sizeof(T) * count);
}

static inline Floats spread(float x) { return x - Floats{}; }

// a b + c, rounded once where the processor has that: left to the compiler it would be so in one place and not in another, and a row's
// result would hang on how many there are.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

constexpr long whole_vectors(long n) { return (n + LANES - 1) / LANES * LANES; }

static inline float sum_of(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The highest lane; a NaN may be passed over.
static inline float highest_of(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

#if defined(__AVX512F__)
// Lane i of the result is the sum over the lanes of r[i].
static inline __m512 sums16(const __m512* r) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) a[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
#endif

// The sum over the lanes of each of COUNT vectors, always in the same order.
template <int COUNT>
static inline void add_lanes(const Floats* from, float* to) {
#if defined(__AVX512F__)
    __m512 all[16];
    for (int i = 0; i < 16; i++) all[i] = i < COUNT ? (__m512)from[i] : _mm512_setzero_ps();
    const __m512 sums = sums16(all);
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << COUNT) - 1), sums);
#else
    for (int i = 0; i < COUNT; i++) to[i] = sum_of(from[i]);
#endif
}

// 2^x for x <= 127 to about 2 units in the last place. Below 2^-100 it is 0, so that no sum meets denormal numbers; a NaN stays one.
static inline Floats exp2_of(Floats x) {
    const Floats shift = spread(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    const Floats shifted = x + shift, f = x - (shifted - shift);
    const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
    Floats p = f * 0.00132647238f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
    return x < spread(-100.0f) ? Floats{} : p * power;
}

// What `open` makes of weights of a type: STEP of them into so many vectors.
template <typename T>
struct Opened {
    static constexpr int VECTORS = 1;
    static constexpr long STEP = LANES;
};
template <>
struct Opened<bf16> {
    static constexpr int VECTORS = 2;
    static constexpr long STEP = 2 * LANES;
};

static inline void open(const float* from, Floats (&to)[1]) { to[0] = load(from); }

// Those of even places, then those of odd ones: a word holds one of each, and either is one operation away from a float. (A dot product of
// bfloat16 pairs, where a processor has one, takes as long as three such products on Sapphire Rapids.)
static inline void open(const bf16* from, Floats (&to)[2]) {
    Bits both;
    std::memcpy(&both, from, sizeof both);
    to[0] = (Floats)(both << 16);
    to[1] = (Floats)(both & 0xffff0000u);
}

// Of two vectors the lanes that an exchange of blocks of STEP lanes leaves in the first, or (UPPER) the second.
template <int STEP, bool UPPER, int... LANE>
static inline Floats exchanged(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE - (UPPER ? 0 : STEP) : LANE + (UPPER ? STEP : 0))...);
#else
    return __builtin_shuffle(a, b, Ints{(LANE & STEP ? LANES + LANE - (UPPER ? 0 : STEP) : LANE + (UPPER ? STEP : 0))...});
#endif
}

// N x N floats of every stretch of N lanes: rows become columns.
template <int N = LANES, int STEP = N / 2>
static inline void transpose(Floats (&x)[N]) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
        if (i & STEP) continue;
        const Floats first = x[i], second = x[i + STEP];
        x[i] = exchanged<STEP, false>(first, second, lanes);
        x[i + STEP] = exchanged<STEP, true>(first, second, lanes);
    }
    if constexpr (STEP > 1) transpose<N, STEP / 2>(x);
}
