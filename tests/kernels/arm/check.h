// Numbers to give to kernels, bfloat16 by its definition, and the two ways of comparing what kernels wrote: `near` and `same`.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint16_t bf16;
template <typename T>
using List = std::vector<T>;

// --- numbers

static double wide(float x) { return x; }
static double wide(bf16 x) {  // by the definition: sign, 8 bits of exponent, 7 of fraction
    const int exponent = x >> 7 & 0xff, fraction = x & 0x7f;
    const double size = exponent == 255 ? (fraction ? NAN : INFINITY)
                        : exponent      ? std::ldexp(128 + fraction, exponent - 134)
                                        : std::ldexp(fraction, -133);
    return x & 0x8000 ? -size : size;
}

// To 8 significant bits, ties to even: what bfloat16 keeps of a number of middling size.
static double rounded(double x, bf16*) {
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}
static double rounded(double x, float*) { return (float)x; }
template <typename T>
static double rounded(double x) { return rounded(x, (T*)nullptr); }

static void put(float& to, double x) { to = (float)x; }
static void put(bf16& to, double x) {
    const float single = (float)rounded<bf16>(x);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    to = bits >> 16;
}

static uint64_t seed = 1;
static double uniform() {  // [0, 1)
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (double)(seed >> 11) / 9007199254740992.0;
}
static double normal() {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
}
template <typename T>
static List<T> numbers(long count, double size = 1, double middle = 0) {
    List<T> made(count);
    for (T& x : made) put(x, middle + size * normal());
    return made;
}
static List<uint8_t> bytes(long count) {
    List<uint8_t> made(count);
    for (uint8_t& x : made) x = (uint8_t)(uniform() * 256);
    return made;
}

// --- comparing

static double wrong = 1;  // what references are multiplied by
static long compared, failed;
static double worst;      // the largest difference, as a share of what is allowed
static uint64_t digest;   // of everything that kernels wrote

static void note(double got) {
    uint64_t bits;
    std::memcpy(&bits, &got, 8);
    digest = (digest ^ bits) * 0x100000001b3u;
}
// Within so much, by kernels whose last bits may depend on the number of threads, as those of no other may.
static void within(double got, double want, double allowed) {
    const double gap = std::fabs(got - want * wrong);
    compared++;
    failed += !(gap <= allowed);
    worst = std::fmax(worst, gap / allowed);
}
static void near(double got, double want, double allowed) {
    note(got);
    within(got, want, allowed);
}
// A number that was rounded to T at the end, `terms` being the sum of sizes that were added in single precision before.
template <typename T>
static void near_rounded(T got, double want, double terms = 0) {
    const double rounding = sizeof(T) == 2 ? 1.0 / 256 : 0x1p-23;
    near(wide(got), want, 1.01 * rounding * std::fabs(want) + 2e-6 * terms + 1e-30);
}
static void same(double got, double want) {
    note(got);
    compared++;
    failed += !(got == want * wrong || (std::isnan(got) && std::isnan(want)));
}
