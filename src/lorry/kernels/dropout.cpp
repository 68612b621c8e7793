// Dropout whose mask is a function of names: element n of a sequence is kept if a hash of (seed, n) reaches the threshold.
// Nothing is stored: backward asks the same question again. The hash is the one of `lorry.bank.noise`, bit for bit.
#include "common.h"

static inline uint32_t hashed(uint32_t n, uint32_t low, uint32_t high) {
    uint32_t x = n * 0x9E3779B1u + low;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = ((x ^ (x >> 13)) + high) * 0xC2B2AE35u;
    x = (x ^ (x >> 16)) * 0x27D4EB2Fu;
    return x ^ (x >> 15);
}

// The sequence that row r lies in.
static inline long sequence_of(const int64_t* starts, long sequences, long r) {
    long low = 0, high = sequences;
    while (high - low > 1) {
        long middle = (low + high) / 2;
        (starts[middle] <= r ? low : high) = middle;
    }
    return low;
}

// y = x * keep where kept, else 0, for rows first .. first + rows of the batch.
LORRY void dropout_rows(const bf16* x, bf16* y, const int64_t* seeds, const int64_t* starts, long sequences, long first, long rows,
                        long width, long threshold, float keep) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        long s = sequence_of(starts, sequences, first + r);
        uint32_t low = (uint32_t)seeds[s], high = (uint32_t)(seeds[s] >> 32), n = (uint32_t)((first + r - starts[s]) * width);
        const bf16* xr = x + r * width;
        bf16* yr = y + r * width;
        for (long i = 0; i < width; i++)
            yr[i] = hashed(n + (uint32_t)i, low, high) >= (uint32_t)threshold ? narrow(widen(xr[i]) * keep) : (bf16)0;
    }
}

// The mask itself, for other number formats.
LORRY void dropout_mask(uint8_t* kept, const int64_t* seeds, const int64_t* starts, long sequences, long first, long rows, long width,
                        long threshold) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        long s = sequence_of(starts, sequences, first + r);
        uint32_t low = (uint32_t)seeds[s], high = (uint32_t)(seeds[s] >> 32), n = (uint32_t)((first + r - starts[s]) * width);
        for (long i = 0; i < width; i++) kept[r * width + i] = hashed(n + (uint32_t)i, low, high) >= (uint32_t)threshold;
    }
}
