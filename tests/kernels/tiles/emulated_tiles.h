// Matrix tiles (AMX) in plain C++, for processors that have none: read before every source of the kernels (-include), in the place of the
// compiler's intrinsics. By Intel's Software Developer's Manual, volume 2: what the instructions LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
// TDPBF16PS and TILERELEASE do with rows, bytes and zeros, and what a processor faults on, which here is said, and ends the process.
//
// The rest of the kernels' source for tiles is AVX-512 with bfloat16, which the processor has to have.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
// no processor has tiles and is built for dot products
#undef LORRY_DOTS
// the system is asked for leave to use tiles, and for nothing else (amx.cpp)
#define syscall(...) 0L

namespace emulated_tiles {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct Tile {
    int rows, bytes;
    alignas(64) unsigned char data[MOST_ROWS][MOST_BYTES];
};

// Of a thread, as the registers are.
inline thread_local bool configured = false;
inline thread_local Tile tiles[TILES];

[[noreturn]] inline void fault(const char* instruction, const char* why) {
    std::fprintf(stderr, "%s would fault: %s\n", instruction, why);
    std::abort();
}

inline void check(bool good, const char* instruction, const char* why) {
    if (!good) fault(instruction, why);
}

inline void release() {
    configured = false;
    std::memset(tiles, 0, sizeof tiles);
}

inline void load_config(const void* memory) {
    unsigned char bytes[64];
    std::memcpy(bytes, memory, sizeof bytes);
    const auto empty = [&](int from, int to) {
        for (int i = from; i < to; i++)
            if (bytes[i]) return false;
        return true;
    };
    const char* name = "LDTILECFG";
    release();
    if (bytes[0] == 0) return;
    check(bytes[0] == 1, name, "there is no such palette");
    check(empty(1, 16) && empty(32, 48) && empty(56, 64), name, "what is reserved, or of tiles that do not exist, is not 0");
    for (int i = 0; i < TILES; i++) {
        uint16_t columns;
        std::memcpy(&columns, bytes + 16 + 2 * i, sizeof columns);
        const int rows = bytes[48 + i];
        check(rows <= MOST_ROWS && columns <= MOST_BYTES, name, "a tile has no more than 16 rows of 64 bytes");
        check((rows == 0) == (columns == 0), name, "a tile with rows and no columns, or the reverse");
        tiles[i].rows = rows, tiles[i].bytes = columns;
    }
    configured = true;
}

inline Tile& at(int number, const char* instruction) {
    check(configured, instruction, "no tiles are configured");
    check(number >= 0 && number < TILES && tiles[number].rows, instruction, "the tile is not configured");
    return tiles[number];
}

inline void zero(int number) { std::memset(at(number, "TILEZERO").data, 0, sizeof Tile::data); }

inline void load(int number, const void* memory, long stride) {
    Tile& to = at(number, "TILELOADD");
    std::memset(to.data, 0, sizeof to.data);
    for (int r = 0; r < to.rows; r++) std::memcpy(to.data[r], (const char*)memory + r * stride, to.bytes);
}

inline void store(int number, void* memory, long stride) {
    const Tile& from = at(number, "TILESTORED");
    for (int r = 0; r < from.rows; r++) std::memcpy((char*)memory + r * stride, from.data[r], from.bytes);
}

// Numbers below 2^-126 count for 0, of what is read as of every result.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

// c += a b: pairs of numbers of rows of a by pairs of columns of b, those of even places and of odd ones summed apart.
#if !defined(__clang__)
__attribute__((optimize("O3")))  // also where a sanitizer's build is not
#endif
inline void multiply(int c_number, int a_number, int b_number) {
    const char* name = "TDPBF16PS";
    Tile &c = at(c_number, name), &a = at(a_number, name), &b = at(b_number, name);
    check(c_number != a_number && c_number != b_number && a_number != b_number, name, "a tile is named twice");
    check(c.bytes % 4 == 0 && a.bytes % 4 == 0 && b.bytes % 4 == 0, name, "a row is no whole number of words");
    check(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, name, "the tiles' rows and columns do not fit");
    const int depth = a.bytes / 4, columns = c.bytes / 4;
    float right[MOST_ROWS][2][16] = {};
    for (int k = 0; k < depth; k++)
        for (int n = 0; n < columns; n++) {
            uint16_t pair[2];
            std::memcpy(pair, b.data[k] + 4 * n, sizeof pair);
            right[k][0][n] = widened(pair[0]), right[k][1][n] = widened(pair[1]);
        }
    for (int m = 0; m < c.rows; m++) {
        float sums[2][16] = {}, before[16] = {};
        for (int k = 0; k < depth; k++) {
            uint16_t pair[2];
            std::memcpy(pair, a.data[m] + 4 * k, sizeof pair);
            for (int part = 0; part < 2; part++) {
                const float left = widened(pair[part]);
                for (int n = 0; n < 16; n++) sums[part][n] = flushed(std::fma(left, right[k][part][n], sums[part][n]));
            }
        }
        std::memcpy(before, c.data[m], c.bytes);
        for (int n = 0; n < columns; n++) before[n] = flushed(flushed(before[n]) + flushed(sums[0][n] + sums[1][n]));
        std::memset(c.data[m], 0, MOST_BYTES);
        std::memcpy(c.data[m], before, c.bytes);
    }
    std::memset(c.data[c.rows], 0, (MOST_ROWS - c.rows) * MOST_BYTES);
}

}  // namespace emulated_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) emulated_tiles::load_config(memory)
#define _tile_release() emulated_tiles::release()
#define _tile_zero(tile) emulated_tiles::zero(tile)
#define _tile_loadd(tile, memory, stride) emulated_tiles::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) emulated_tiles::store(tile, memory, stride)
#define _tile_dpbf16ps(c, a, b) emulated_tiles::multiply(c, a, b)
