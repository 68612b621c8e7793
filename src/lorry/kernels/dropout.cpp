// Dropout whose mask is a function of names: element n of a sequence is kept if its half of a hash of (seed, n / 2) reaches the
// threshold. Nothing is stored: backward asks the same question again. `lorry.bank.noise` has the same hash, bit for bit.
#include "common.h"

static inline uint32_t hashed(uint32_t n, uint32_t low, uint32_t high) {
    uint32_t x = n * 0x9E3779B1u + low;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = ((x ^ (x >> 13)) + high) * 0xC2B2AE35u;
    x = (x ^ (x >> 16)) * 0x27D4EB2Fu;
    return x ^ (x >> 15);
}

// Where row r of the batch lies: its sequence's seed, and the number of its first element here. Of rows of `whole` elements
// this process may have those from `offset` on alone (tensor parallel).
struct Place {
    uint32_t low, high;
    uint64_t n;
    Place(const int64_t* seeds, const int64_t* starts, long sequences, long r, long whole, long offset) {
        long first = 0, last = sequences;
        while (last - first > 1) {
            long middle = (first + last) / 2;
            (starts[middle] <= r ? first : last) = middle;
        }
        low = (uint32_t)seeds[first], high = (uint32_t)(seeds[first] >> 32), n = (uint64_t)(r - starts[first]) * whole + offset;
    }
    bool keeps(long i, uint32_t threshold) const {
        uint32_t h = hashed((uint32_t)((n + i) >> 1), low, high);
        return ((n + i) & 1 ? h >> 16 : h & 0xffff) >= threshold;
    }
};

static inline float from_bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// y = x * keep where kept, else 0, for rows first .. first + rows of the batch.
LORRY void dropout_rows(const bf16* x, bf16* y, const int64_t* seeds, const int64_t* starts, long sequences, long first, long rows,
                        long width, long whole, long offset, long threshold, float keep) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const Place at(seeds, starts, sequences, first + r, whole, offset);
        const bf16* xr = x + r * width;
        bf16* yr = y + r * width;
        if (width % 2 || at.n % 2) {  // pairs that share a hash do not lie in one word
            for (long i = 0; i < width; i++) yr[i] = at.keeps(i, threshold) ? narrow(widen(xr[i]) * keep) : (bf16)0;
            continue;
        }
        const uint32_t n = (uint32_t)(at.n >> 1), low = at.low, high = at.high, limit = (uint32_t)threshold;
#pragma omp simd
        for (long i = 0; i < width / 2; i++) {  // two elements in a word: the even one in its lower half
            uint32_t pair, h = hashed(n + (uint32_t)i, low, high);
            std::memcpy(&pair, xr + 2 * i, 4);
            uint32_t even = narrow(from_bits(pair << 16) * keep), odd = narrow(from_bits(pair & 0xffff0000u) * keep);
            pair = ((h & 0xffff) >= limit ? even : 0u) | ((h >> 16) >= limit ? odd << 16 : 0u);
            std::memcpy(yr + 2 * i, &pair, 4);
        }
    }
}

// The mask itself, for other number formats.
LORRY void dropout_mask(uint8_t* kept, const int64_t* seeds, const int64_t* starts, long sequences, long first, long rows, long width,
                        long whole, long offset, long threshold) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const Place at(seeds, starts, sequences, first + r, whole, offset);
        for (long i = 0; i < width; i++) kept[r * width + i] = at.keeps(i, (uint32_t)threshold);
    }
}
