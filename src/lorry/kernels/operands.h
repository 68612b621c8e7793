// What both products of matrices, in float32 and in bfloat16, are told of their operands and results, and the room that they copy into.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace {

// A matrix whose element (i, k), k of the depth, lies at at[i * stride + k * step]; one of the two is 1.
template <typename T>
struct Operand {
    const T* at;
    long stride, step;
    Operand from(long i, long k = 0) const { return {at + i * stride + k * step, stride, step}; }
};

// Where a tile's sums go: c = scale * sum + bias (or null), or c += scale * sum.
template <typename T>
struct Result {
    T* at;
    long stride;
    const T* bias;
    bool add;
    float scale;
    Result from(long row, long column) const { return {at + row * stride + column, stride, bias ? bias + column : nullptr, add, scale}; }
};

// Room of a thread, kept. Where there is no memory the process ends and says so: what called has no way to hear of it.
struct Space {
    void* at = nullptr;
    size_t size = 0;
    Space() = default;
    Space(const Space&) = delete;
    Space& operator=(const Space&) = delete;
    ~Space() { std::free(at); }
    void* get(size_t wanted) {
        if (wanted <= size) return at;
        std::free(at);
        size = (wanted + 4095) / 4096 * 4096;
        at = std::aligned_alloc(64, size);
        if (!at) {
            std::fprintf(stderr, "lorry: no memory for a product of matrices (%zu bytes)\n", size);
            std::abort();
        }
        return at;
    }
};

}  // namespace
