// What the kernels share: bfloat16, an exponential that vectorises, and when threads are worth their start.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define LORRY extern "C" __attribute__((visibility("default")))

typedef uint16_t bf16;
constexpr long PARALLEL = 1 << 15;  // elements; below this one thread is faster than waking another

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest, ties to even, as torch does; a NaN stays one.
static inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? (bf16)0x7fc0 : (bf16)rounded;
}

// For kernels that are compiled for both formats: what a value is as a float, and the other way.
static inline float wide(float x) { return x; }
static inline float wide(bf16 x) { return widen(x); }
static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) { to = narrow(x); }

// e^x to about 2 units in the last place of a float, without a branch: 2^n times a polynomial on half an octave either side. From about
// 2^127.5 on it is infinity.
static inline float exp_fast(float x) {
    float y = x * 1.44269504f;
    y = y < -126.0f ? -126.0f : y;  // a NaN passes both comparisons unchanged
    y = y > 128.0f ? 128.0f : y;
    float n = (y + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    float f = (y - n) * 0.693147181f;
    float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
    int32_t power = (int32_t)(n == n ? n : 0.0f);  // a NaN has no integer; the polynomial carries it on
    uint32_t bits = (uint32_t)(power + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
