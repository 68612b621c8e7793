// Causal attention by segment in float32 on any processor, forward and backward; queries, keys and values lie in float32 or bfloat16.
//
// One call serves every segment of a packed batch: tokens of a segment see themselves and what is before them in it, so no mask and
// no padding exist in memory. The query heads that share a key/value head are folded into rows, (token, head), so keys and values
// are not repeated either, and a block of ROWS rows ends close to the diagonal. Keys are taken KEYS at a time.
//
// Scores S = Q K^T have queries as rows and keys as lanes. Right operands have lanes along a row: K^T and V^T (for dP = dO V^T) are
// made once per key/value head, K, V, Q and dO serve as they are. Left operands are read value by value, so P^T and dS^T are P and
// dS read the other way.
//
// Every segment is computed alone, in an order that shapes fix, whatever its neighbours say and however many threads there are.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "products.h"

namespace {

constexpr long ROWS = 96, KEYS = 64;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// `width` values times `by`, widened, and zeros up to a whole vector.
template <typename T>
void widen_row(const T* x, float by, long width, float* to) {
    long d = 0;
    for (; d + LANES <= width; d += LANES) store(to + d, load(x + d) * by);
    if (d < width) store(to + d, load_some(x + d, width - d) * by);
}

// The other way.
template <typename T>
void narrow_row(const float* x, float by, long width, T* to) {
    long d = 0;
    for (; d + LANES <= width; d += LANES) store(to + d, load(x + d) * by);
    if (d < width) store_some(to + d, load(x + d) * by, width - d);
}

// Sizes of one call. `width` of a head, `padded` to whole vectors; `share` query heads have one of the `groups` key/value heads.
struct Shape {
    const int64_t* starts;
    long segments, tokens, heads, groups, width, share, padded, keys = 0, longest = 0;
    std::vector<long> first;  // where each segment's keys begin, when every segment's are padded to whole vectors

    Shape(const int64_t* starts, long segments, long tokens, long heads, long groups, long width)
        : starts(starts), segments(segments), tokens(tokens), heads(heads), groups(groups), width(width), share(heads / groups),
          padded(whole_vectors(width)) {
        for (long s = 0; s < segments; s++) {
            first.push_back(keys);
            keys += whole_vectors(length(s));
            longest = std::max(longest, length(s));
        }
    }
    long length(long s) const { return starts[s + 1] - starts[s]; }
    long blocks(long s) const { return (length(s) * share + ROWS - 1) / ROWS; }
    long side() const { return whole_vectors(groups * keys * padded); }  // floats of all keys, or all values
};

// The keys or values of every segment and group: rows [length][padded] as they are, and turned, by blocks of KEYS, [width][lanes].
struct Side {
    float *rows, *turned;

    const float* row_block(const Shape& shape, long s, long g, long j) const {
        return rows + (g * shape.keys + shape.first[s] + j * KEYS) * shape.padded;
    }
    const float* turned_block(const Shape& shape, long s, long g, long j) const {
        return turned + (g * shape.keys + shape.first[s] + j * KEYS) * shape.padded;
    }
};

// The lanes of a segment's key block j, padded.
long lanes_of(const Shape& shape, long s, long j) { return whole_vectors(std::min(KEYS, shape.length(s) - j * KEYS)); }

// A block of folded rows. Of row r: where it lies in [tokens, heads, width] and in [heads, tokens], and its token in the segment.
struct RowBlock {
    long count, seen;  // seen: the keys that its last row sees
    long query[ROWS], stat[ROWS], token[ROWS];

    void take(const Shape& shape, long s, long g, long block) {
        const long from = block * ROWS;
        count = std::min(ROWS, shape.length(s) * shape.share - from);
        long t = from / shape.share, h = from % shape.share;
        for (long r = 0; r < count; r++) {
            const long head = g * shape.share + h, whole = shape.starts[s] + t;
            query[r] = (whole * shape.heads + head) * shape.width;
            stat[r] = head * shape.tokens + whole;
            token[r] = t;
            if (++h == shape.share) h = 0, t++;
        }
        seen = token[count - 1] + 1;
    }
};

// x [tokens, groups, width] into what `side` has room for.
template <typename T>
void prepare(const T* x, const Shape& shape, const Side& side) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (long g = 0; g < shape.groups; g++)
        for (long s = 0; s < shape.segments; s++)
            for (long j = 0; j * KEYS < shape.length(s); j++) {
                const long keys = std::min(KEYS, shape.length(s) - j * KEYS), lanes = lanes_of(shape, s, j);
                const T* from = x + ((shape.starts[s] + j * KEYS) * shape.groups + g) * shape.width;
                const long stride = shape.groups * shape.width;
                if (side.rows)
                    for (long r = 0; r < keys; r++)
                        widen_row(from + r * stride, 1.0f, shape.width,
                                  const_cast<float*>(side.row_block(shape, s, g, j)) + r * shape.padded);
                if (side.turned) {
                    float* to = const_cast<float*>(side.turned_block(shape, s, g, j));
                    for (long r = 0; r < lanes; r += LANES)
                        for (long d = 0; d < shape.width; d += LANES) {
                            Floats tile[LANES] = {};
                            for (long i = 0; i < LANES && r + i < keys; i++) {
                                const T* x = from + (r + i) * stride + d;
                                tile[i] = d + LANES <= shape.width ? load(x) : load_some(x, shape.width - d);
                            }
                            transpose(tile);
                            for (long e = 0; e < LANES && d + e < shape.width; e++) store(to + (d + e) * lanes + r, tile[e]);
                        }
                }
            }
}

// Of a row of scores over `lanes` keys: those beyond key `last` become -inf.
inline void hide(float* scores, long lanes, long last) {
    for (long i = std::max(last + 1, 0l); i < lanes; i++) scores[i] = -INFINITY;
}

struct Unit {
    long segment, group, block;  // block: of rows; in backward the first of those that the unit takes
};

template <typename T>
void forward(const T* q, const T* k, const T* v, T* o, float* lse, const Shape& shape, float scale, float* space) {
    const long side = shape.side(), padded = shape.padded, width = shape.width;
    const Side ks{nullptr, space}, vs{space + side, nullptr};
    prepare(k, shape, ks);
    prepare(v, shape, vs);
    std::vector<Unit> units;
    for (long s = 0; s < shape.segments; s++)
        for (long g = 0; g < shape.groups; g++)
            for (long i = shape.blocks(s) - 1; i >= 0; i--) units.push_back({s, g, i});
#pragma omp parallel
    {
        float* own = space + 2 * side + omp_get_thread_num() * ROWS * (KEYS + 2 * padded + LANES);
        float *scores = own, *queries = scores + ROWS * KEYS, *out = queries + ROWS * padded, *sums = out + ROWS * padded;
        alignas(64) float top[ROWS] = {}, level[ROWS] = {}, fix[ROWS];
        RowBlock at;
#pragma omp for schedule(dynamic, 1)
        for (size_t w = 0; w < units.size(); w++) {
            const auto [s, g, block] = units[w];
            at.take(shape, s, g, block);
            const long rows = at.count, seen = at.seen;
            for (long r = 0; r < rows; r++) {
                widen_row(q + at.query[r], scale * LOG2E, width, queries + r * padded);
                top[r] = -INFINITY;
                store(sums + r * LANES, Floats{});
            }
            for (long j = 0; j * KEYS < seen; j++) {
                const long keys = std::min(KEYS, seen - j * KEYS), lanes = whole_vectors(keys);
                product(rows, lanes, width, queries, padded, 1, ks.turned_block(shape, s, g, j), lanes_of(shape, s, j), scores, KEYS,
                        false);
                for (long r = 0; r < rows; r++) {
                    float* row = scores + r * KEYS;
                    hide(row, lanes, at.token[r] - j * KEYS);
                    Floats high = load(row);
                    for (long i = LANES; i < lanes; i += LANES) {
                        Floats x = load(row + i);
                        high = x > high ? x : high;
                    }
                    level[r] = std::max(top[r], highest_of(high));
                }
                for (long r = 0; r < ROWS; r += LANES) {
                    Floats now = load(level + r);
                    store(fix + r, exp2_of(load(top + r) - now));
                    store(top + r, now);
                }
                for (long r = 0; r < rows; r++) {
                    float* row = scores + r * KEYS;
                    Floats sum = load(sums + r * LANES) * fix[r];
                    for (long i = 0; i < lanes; i += LANES) {
                        Floats p = exp2_of(load(row + i) - top[r]);
                        store(row + i, p);
                        sum += p;
                    }
                    store(sums + r * LANES, sum);
                    if (j > 0 && fix[r] != 1.0f)
                        for (long d = 0; d < padded; d += LANES) store(out + r * padded + d, load(out + r * padded + d) * fix[r]);
                }
                product(rows, padded, keys, scores, KEYS, 1, vs.row_block(shape, s, g, j), padded, out, padded, j > 0);
            }
            for (long r = 0; r < rows; r++) {
                const float total = sum_of(load(sums + r * LANES));
                narrow_row(out + r * padded, 1.0f / total, width, o + at.query[r]);
                lse[at.stat[r]] = top[r] + std::log2(total);
            }
        }
    }
}

// How backward shares its work. A unit is a key/value head of a segment, whose sums (dK, dV) it keeps to itself. Where those are few,
// which would leave threads idle, and memory allows, several units take its blocks of rows in turn, and their sums are added up after.
struct Sharing {
    long parts, sums;  // sums: floats of one part's dK (or dV) over the whole batch
    explicit Sharing(const Shape& shape) : sums(shape.side()) {
        constexpr long UNITS = 16, SPREAD = 16l << 20;  // SPREAD: floats
        long blocks = 1;
        for (long s = 0; s < shape.segments; s++) blocks = std::max(blocks, shape.blocks(s));
        parts = std::max(1l, std::min({blocks, UNITS / (shape.segments * shape.groups), SPREAD / std::max(2 * sums, 1l)}));
    }
};

template <typename T>
void backward(const T* q, const T* k, const T* v, const T* o, const float* lse, const T* go, T* dq, T* dk, T* dv, const Shape& shape,
              float scale, float* space) {
    const Sharing how(shape);
    const long side = shape.side(), padded = shape.padded, width = shape.width;
    const Side ks{space, space + side}, vs{nullptr, space + 2 * side};
    prepare(k, shape, ks);
    prepare(v, shape, vs);
    float* all_sums = space + 3 * side;
    std::vector<Unit> units;
    for (long s = 0; s < shape.segments; s++)
        for (long g = 0; g < shape.groups; g++)
            for (long part = 0; part < how.parts; part++) units.push_back({s, g, part});
#pragma omp parallel
    {
        float* own = all_sums + 2 * how.parts * how.sums + omp_get_thread_num() * ROWS * (2 * KEYS + 3 * padded);
        float *p = own, *ds = p + ROWS * KEYS, *queries = ds + ROWS * KEYS, *grads = queries + ROWS * padded, *out = grads + ROWS * padded;
        float level[ROWS], delta[ROWS];
        RowBlock at;
#pragma omp for schedule(dynamic, 1)
        for (size_t w = 0; w < units.size(); w++) {
            const auto [s, g, part] = units[w];
            const long place = (g * shape.keys + shape.first[s]) * padded;
            float *dks = all_sums + 2 * part * how.sums + place, *dvs = dks + how.sums;
            std::fill(dks, dks + shape.length(s) * padded, 0.0f);
            std::fill(dvs, dvs + shape.length(s) * padded, 0.0f);
            for (long block = part; block < shape.blocks(s); block += how.parts) {
                at.take(shape, s, g, block);
                const long rows = at.count, seen = at.seen;
                for (long r = 0; r < rows; r++) {
                    widen_row(q + at.query[r], scale * LOG2E, width, queries + r * padded);
                    widen_row(go + at.query[r], 1.0f, width, grads + r * padded);
                    widen_row(o + at.query[r], 1.0f, width, out + r * padded);
                    Floats dot = {};
                    for (long d = 0; d < padded; d += LANES) dot += load(out + r * padded + d) * load(grads + r * padded + d);
                    delta[r] = sum_of(dot);
                    level[r] = lse[at.stat[r]];
                }
                for (long j = 0; j * KEYS < seen; j++) {
                    const long keys = std::min(KEYS, seen - j * KEYS), lanes = whole_vectors(keys), stride = lanes_of(shape, s, j);
                    product(rows, lanes, width, queries, padded, 1, ks.turned_block(shape, s, g, j), stride, p, KEYS, false);
                    product(rows, lanes, width, grads, padded, 1, vs.turned_block(shape, s, g, j), stride, ds, KEYS, false);
                    for (long r = 0; r < rows; r++) {
                        float *pr = p + r * KEYS, *dr = ds + r * KEYS;
                        hide(pr, lanes, at.token[r] - j * KEYS);
                        for (long i = 0; i < lanes; i += LANES) {
                            Floats x = exp2_of(load(pr + i) - level[r]);
                            store(pr + i, x);
                            store(dr + i, x * (load(dr + i) - delta[r]));
                        }
                    }
                    product(keys, padded, rows, p, 1, KEYS, grads, padded, dvs + j * KEYS * padded, padded, true);
                    product(keys, padded, rows, ds, 1, KEYS, queries, padded, dks + j * KEYS * padded, padded, true);
                    product(rows, padded, keys, ds, KEYS, 1, ks.row_block(shape, s, g, j), padded, out, padded, j > 0);
                }
                for (long r = 0; r < rows; r++) narrow_row(out + r * padded, scale, width, dq + at.query[r]);
            }
        }
        // queries were scaled for powers of two: in dK that is taken back
#pragma omp for schedule(static) collapse(2)
        for (long s = 0; s < shape.segments; s++)
            for (long g = 0; g < shape.groups; g++)
                for (long t = 0; t < shape.length(s); t++) {
                    float* sums = all_sums + (g * shape.keys + shape.first[s] + t) * padded;
                    const long row = ((shape.starts[s] + t) * shape.groups + g) * width;
                    for (long part = 1; part < how.parts; part++)
                        for (long side = 0; side < 2; side++)
                            for (long d = 0; d < padded; d += LANES) {
                                float* to = sums + side * how.sums + d;
                                store(to, load(to) + load(to + 2 * part * how.sums));
                            }
                    narrow_row(sums, LN2, width, dk + row);
                    narrow_row(sums + how.sums, 1.0f, width, dv + row);
                }
    }
}

}  // namespace

// Bytes that the two calls below want as `space`, aligned to 64.
LORRY long attention_vectors_space(const int64_t* starts, long segments, long tokens, long heads, long groups, long width,
                                   long with_backward) {
    const Shape shape(starts, segments, tokens, heads, groups, width);
    const long threads = omp_get_max_threads();
    if (!with_backward) return sizeof(float) * (2 * shape.side() + threads * ROWS * (KEYS + 2 * shape.padded + LANES));
    return sizeof(float) *
           (3 * shape.side() + 2 * Sharing(shape).parts * shape.side() + threads * ROWS * (2 * KEYS + 3 * shape.padded));
}

// q, o [tokens, heads, width], k, v [tokens, groups, width], float32 or (is_bf16) bfloat16; lse [heads, tokens] in powers of two,
// starts [segments + 1].
LORRY void attention_vectors_forward(const void* q, const void* k, const void* v, void* o, float* lse, const int64_t* starts,
                                     long segments, long tokens, long heads, long groups, long width, float scale, float* space,
                                     long is_bf16) {
    const Shape shape(starts, segments, tokens, heads, groups, width);
    if (is_bf16)
        forward((const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)o, lse, shape, scale, space);
    else
        forward((const float*)q, (const float*)k, (const float*)v, (float*)o, lse, shape, scale, space);
}

LORRY void attention_vectors_backward(const void* q, const void* k, const void* v, const void* o, const float* lse, const void* go,
                                      void* dq, void* dk, void* dv, const int64_t* starts, long segments, long tokens, long heads,
                                      long groups, long width, float scale, float* space, long is_bf16) {
    const Shape shape(starts, segments, tokens, heads, groups, width);
    if (is_bf16)
        backward((const bf16*)q, (const bf16*)k, (const bf16*)v, (const bf16*)o, lse, (const bf16*)go, (bf16*)dq, (bf16*)dk, (bf16*)dv,
                 shape, scale, space);
    else
        backward((const float*)q, (const float*)k, (const float*)v, (const float*)o, lse, (const float*)go, (float*)dq, (float*)dk,
                 (float*)dv, shape, scale, space);
}
