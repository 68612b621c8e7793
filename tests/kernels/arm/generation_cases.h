// The kernels of generation, and of matrices of few bits.
#pragma once
#include "check.h"

extern "C" {
#define DECODE(T, NAME)                                                                                                          \
    int store_##NAME(const T*, const T*, const int64_t*, const int64_t*, const int64_t*, long, long, long, long);               \
    int attend_##NAME(const T*, T*, const int64_t*, const int64_t*, long, long, long, long, long, float);                       \
    int largest_##NAME(const T*, int64_t*, float*, long, long);                                                                 \
    int draw_##NAME(const T*, const double*, int64_t*, float*, long, long, float);                                              \
    void few_rows_##NAME(const T*, const T*, const T*, T*, long, long, long);                                                   \
    void low_rank_##NAME(const int64_t*, const T*, const int64_t*, long, long, long);                                           \
    void decode_layers_##NAME(const int64_t*, T*, const float*, const float*, const int64_t*, const int64_t*, const int64_t*,   \
                              const int64_t*, long);
void sum_words(const uint64_t*, uint64_t*, long);
void matmul_float(const float*, const float*, const float*, float*, long, long, long, long, long, long, long, long, long, float);
DECODE(bf16, bf16)
DECODE(float, float)
#define FLAT const uint8_t*, const void*, const float*, const float*, const float*, const float*
#define ROWS const int8_t*, const float*
#define GRID const uint8_t*, const void*, const uint8_t*, const uint16_t*, const int32_t*, long, long, long, long, long, long
#define HALVES const bf16*
#define PACKED(NAME, SOURCE)                                \
    void packed_open_##NAME(SOURCE, void*, long, long, long); \
    void packed_product_##NAME(SOURCE, const void*, const void*, void*, long, long, long, long);
PACKED(flat, FLAT)
PACKED(rows, ROWS)
PACKED(grid, GRID)
PACKED(halves, HALVES)
}

// --- a step of generation

template <typename T>
static void store_kv(int (*store)(const T*, const T*, const int64_t*, const int64_t*, const int64_t*, long, long, long, long)) {
    const long layers = 2, groups = 3, held = 19, width = 7, layer = 1, tokens = 5;
    List<T> cache[2] = {List<T>(layers * 2 * groups * held * width), List<T>(layers * 2 * groups * held * width)};
    const List<int64_t> table = {(int64_t)cache[0].data(), held, (int64_t)cache[1].data(), held};
    const List<int64_t> rows = {0, 1, 1, 0, 1}, positions = {3, 0, 18, 4, 7};
    const List<T> k = numbers<T>(tokens * groups * width), v = numbers<T>(tokens * groups * width);
    store(k.data(), v.data(), table.data(), rows.data(), positions.data(), layer, tokens, groups, width);
    double written = 0;
    for (const List<T>& one : cache)
        for (T x : one) written += x != 0;
    same(written, 2.0 * tokens * groups * width);
    for (long side = 0; side < 2; side++)
        for (long t = 0; t < tokens; t++)
            for (long g = 0; g < groups; g++)
                for (long i = 0; i < width; i++)
                    same(wide(cache[rows[t]][(((layer * 2 + side) * groups + g) * held + positions[t]) * width + i]),
                         wide((side ? v : k)[(t * groups + g) * width + i]));
}
static void stores() { store_kv<bf16>(store_bf16), store_kv<float>(store_float); }

template <typename T>
static void attend_to(int (*attend)(const T*, T*, const int64_t*, const int64_t*, long, long, long, long, long, float)) {
    for (long width : {5L, 64L, 128L})
        for (long share : {1L, 3L, 5L}) {
            const long layers = 2, layer = 1, groups = 2, held = 70, heads = groups * share, rows = 9;
            List<List<T>> cache;
            List<int64_t> table, lengths;
            for (long r = 0; r < rows; r++) {
                cache.push_back(numbers<T>(layers * 2 * groups * held * width));
                lengths.push_back(1 + r * 8);
            }
            for (List<T>& one : cache) table.push_back((int64_t)one.data()), table.push_back(held);
            const List<T> q = numbers<T>(rows * heads * width);
            List<T> o(rows * heads * width);
            const float scale = 1 / std::sqrt((float)width);
            attend(q.data(), o.data(), table.data(), lengths.data(), layer, rows, heads, groups, width, scale);
            for (long r = 0; r < rows; r++)
                for (long h = 0; h < heads; h++) {
                    const T* k = cache[r].data() + ((layer * 2 + 0) * groups + h / share) * held * width;
                    const T* v = k + groups * held * width;
                    List<double> p(lengths[r]);
                    double top = -INFINITY, sum = 0;
                    for (long t = 0; t < lengths[r]; t++) {
                        for (long i = 0; i < width; i++) p[t] += scale * wide(q[(r * heads + h) * width + i]) * wide(k[t * width + i]);
                        top = std::fmax(top, p[t]);
                    }
                    for (double& x : p) sum += x = std::exp(x - top);
                    for (long i = 0; i < width; i++) {
                        double want = 0, sizes = 0;
                        for (long t = 0; t < lengths[r]; t++) {
                            want += p[t] / sum * wide(v[t * width + i]);
                            sizes += p[t] / sum * std::fabs(wide(v[t * width + i]));
                        }
                        near_rounded(o[(r * heads + h) * width + i], want, 10 * sizes);
                    }
                }
        }
}
static void attends() { attend_to<bf16>(attend_bf16), attend_to<float>(attend_float); }

// All layers in one call: two of them with RMS norms, rotary positions, shared keys and gated MLPs, and an adapter of some rows on
// the queries. What the kernel rounds on the way is not followed: in bfloat16 that is allowed for.
template <typename T>
static void layers_at_once(void (*decode)(const int64_t*, T*, const float*, const float*, const int64_t*, const int64_t*, const int64_t*, const int64_t*, long)) {
    const long layers = 2, width = 21, heads = 4, groups = 2, head = 6, half = 2, inner = 19, rank = 3, rows = 3, held = 5, seen = 4;
    const double eps = 1e-5, scale = 0.7;
    List<List<T>> kept;
    List<int64_t> words = {layers, width, heads, groups, head, half, 0, 0, 0};
    const auto address = [&](long count, double size, double middle = 0) {
        kept.push_back(numbers<T>(count, size, middle));
        words.push_back((int64_t)kept.back().data());
    };
    const auto bits = [&](double x) {
        int64_t word;
        std::memcpy(&word, &x, 8);
        words.push_back(word);
    };
    const auto linear = [&](long outputs, long inputs) {
        words.insert(words.end(), {0, outputs, inputs, 0});
        address(outputs * inputs, 1 / std::sqrt((double)inputs));
    };
    for (long layer = 0; layer < layers; layer++) {
        for (int norm = 0; norm < 2; norm++) address(width, 0.1, 1), words.push_back(0), bits(eps);
        words.insert(words.end(), 6, 0);  // none of queries and keys
        words.push_back(3), linear(heads * head, width), linear(groups * head, width), linear(groups * head, width);
        words.insert(words.end(), {1, 1, -1, rank}), address(rank * width, 0.2), words.insert(words.end(), {0, 0, 0, 0, 1, 0, 0, rank});
        address(heads * head * rank, 0.2), bits(scale);
        words.push_back(1), linear(width, heads * head), words.push_back(0);
        words.push_back(2), linear(inner, width), linear(inner, width), words.push_back(0);
        words.push_back(1), linear(width, inner), words.push_back(0);
    }
    List<T> x = numbers<T>(rows * width);
    List<double> want(rows * width);
    for (long i = 0; i < rows * width; i++) want[i] = wide(x[i]);
    List<float> cos(rows * half), sin(rows * half);
    for (long i = 0; i < rows * half; i++) cos[i] = std::cos(0.3 * i), sin[i] = std::sin(0.3 * i);
    List<List<T>> cache;
    List<int64_t> table, at(rows), positions(rows, seen), lengths(rows, seen + 1);
    for (long r = 0; r < rows; r++) cache.push_back(numbers<T>(layers * 2 * groups * held * head)), at[r] = r;
    for (List<T>& one : cache) table.push_back((int64_t)one.data()), table.push_back(held);

    typedef List<double> Row;
    const auto times = [](const List<T>& w, const Row& v) {
        Row out(w.size() / v.size());
        for (size_t o = 0; o < out.size(); o++)
            for (size_t i = 0; i < v.size(); i++) out[o] += wide(w[o * v.size() + i]) * v[i];
        return out;
    };
    const auto normed = [&](const double* v, const List<T>& w) {
        double squares = 0;
        for (long i = 0; i < width; i++) squares += v[i] * v[i];
        Row out(width);
        for (long i = 0; i < width; i++) out[i] = wide(w[i]) * v[i] / std::sqrt(squares / width + eps);
        return out;
    };
    for (long r = 0; r < rows; r++)
        for (long layer = 0; layer < layers; layer++) {
            const List<T>* own = &kept[layer * 11];  // two norms, q, k, v, A, B, o, gate, up, down
            double* stream = &want[r * width];
            const Row in = normed(stream, own[0]);
            Row q = times(own[2], in), k = times(own[3], in), v = times(own[4], in);
            if (r > 0) {
                const Row low = times(own[5], in), up = times(own[6], low);
                for (size_t i = 0; i < q.size(); i++) q[i] += scale * up[i];
            }
            for (Row* turned : {&q, &k})
                for (size_t h = 0; h < turned->size(); h += head)
                    for (long i = 0; i < half; i++) {
                        double &a = (*turned)[h + i], &b = (*turned)[h + half + i];
                        const double u = a, c = cos[r * half + i], s = sin[r * half + i];
                        a = u * c - b * s, b = b * c + u * s;
                    }
            Row mixed(heads * head);
            for (long h = 0; h < heads; h++) {
                const long g = h / (heads / groups);
                const T *keys = cache[r].data() + (layer * 2 * groups + g) * held * head, *values = keys + groups * held * head;
                Row p(seen + 1);
                double sum = 0;
                for (long t = 0; t <= seen; t++) {
                    for (long i = 0; i < head; i++) p[t] += q[h * head + i] * (t < seen ? wide(keys[t * head + i]) : k[g * head + i]);
                    sum += p[t] = std::exp(p[t] / std::sqrt((double)head));
                }
                for (long t = 0; t <= seen; t++)
                    for (long i = 0; i < head; i++) mixed[h * head + i] += p[t] / sum * (t < seen ? wide(values[t * head + i]) : v[g * head + i]);
            }
            const Row out = times(own[7], mixed);
            for (long i = 0; i < width; i++) stream[i] += out[i];
            const Row second = normed(stream, own[1]);
            Row gate = times(own[8], second);
            const Row up = times(own[9], second);
            for (long i = 0; i < inner; i++) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
            const Row down = times(own[10], gate);
            for (long i = 0; i < width; i++) stream[i] += down[i];
        }
    decode(words.data(), x.data(), cos.data(), sin.data(), table.data(), at.data(), positions.data(), lengths.data(), rows);
    double size = 0;
    for (double one : want) size = std::fmax(size, std::fabs(one));
    for (long i = 0; i < rows * width; i++) near(wide(x[i]), want[i], size * (sizeof(T) == 2 ? 1.0 / 80 : 1e-5));
}
static void steps() { layers_at_once<bf16>(decode_layers_bf16), layers_at_once<float>(decode_layers_float); }

static const long LOGITS[][2] = {{1, 1}, {3, 7}, {2, 131}, {33, 1201}};

template <typename T>
static void choose(int (*largest)(const T*, int64_t*, float*, long, long), int (*draw)(const T*, const double*, int64_t*, float*, long, long, float)) {
    for (const auto& [rows, count] : LOGITS) {
        List<T> logits = numbers<T>(rows * count, 3);
        List<int64_t> places(rows), drawn(rows);
        List<float> values(rows), again(rows);
        List<double> at(rows);
        List<long> wanted(rows), first(rows);
        const float by = 1 / 0.8f;
        for (long r = 0; r < rows; r++) {
            const T* x = &logits[r * count];
            for (long i = 0; i < count; i++)
                if (wide(x[i]) > wide(x[first[r]])) first[r] = i;
            // the middle of the share of a place that has one to speak of
            double total = 0, before = 0, share = 0;
            for (long i = 0; i < count; i++) total += std::exp((wide(x[i]) - wide(x[first[r]])) * by);
            for (long i = 0; i < count; i++) {
                share = std::exp((wide(x[i]) - wide(x[first[r]])) * by) / total;
                if ((i >= count / 2 && share > 1e-4) || i == first[r]) {
                    wanted[r] = i, at[r] = before + share / 2;
                    if (i >= count / 2) break;
                }
                before += share;
            }
        }
        largest(logits.data(), places.data(), values.data(), rows, count);
        draw(logits.data(), at.data(), drawn.data(), again.data(), rows, count, by);
        for (long r = 0; r < rows; r++) {
            same((double)places[r], (double)first[r]);
            same((double)drawn[r], (double)wanted[r]);
            same(values[r], wide(logits[r * count + first[r]]));
            same(again[r], wide(logits[r * count + first[r]]));
        }
    }
    // of several the first; a NaN is told
    List<T> odd = numbers<T>(2 * 37, 0.1);
    put(odd[11], 9), put(odd[29], 9);
    if (sizeof(T) == 2) odd[50] = (T)0x7fc0;
    else odd[50] = (T)NAN;
    List<int64_t> places(2);
    List<float> values(2);
    largest(odd.data(), places.data(), values.data(), 2, 37);
    same((double)places[0], 11);
    same(values[1], NAN);
}
static void choices() { choose<bf16>(largest_bf16, draw_bf16), choose<float>(largest_float, draw_float); }

// --- a few rows by a matrix

template <typename T>
static void few_rows(void (*multiply)(const T*, const T*, const T*, T*, long, long, long)) {
    const long shapes[][3] = {{1, 37, 19}, {3, 64, 40}, {7, 5, 1}, {9, 130, 33}};  // rows, width, outputs
    for (const auto& [rows, width, outputs] : shapes)
        for (const bool biased : {false, true}) {
            const List<T> x = numbers<T>(rows * width), w = numbers<T>(outputs * width), bias = numbers<T>(outputs);
            List<T> y(rows * outputs);
            multiply(x.data(), w.data(), biased ? bias.data() : nullptr, y.data(), rows, width, outputs);
            for (long r = 0; r < rows; r++)
                for (long o = 0; o < outputs; o++) {
                    double truth = biased ? wide(bias[o]) : 0, size = std::fabs(truth);
                    for (long i = 0; i < width; i++) {
                        const double product = wide(x[r * width + i]) * wide(w[o * width + i]);
                        truth += product, size += std::fabs(product);
                    }
                    near(wide(y[r * outputs + o]), truth, std::fabs(truth) * (sizeof(T) == 2 ? 0x1p-8 : 0x1p-23) + size * (width + 1) * 0x1p-23);
                }
        }
}

// Terms of rows of their own, of shared ones and of none, at two linears; the second has scales and gates of its ranks.
template <typename T>
static void low_rank(void (*add)(const int64_t*, const T*, const int64_t*, long, long, long)) {
    struct Wanted {
        long start, stop, ranks[2];
    };
    const long rows = 9, outputs[2] = {37, 5};
    for (long width : {1L, 37L, 131L}) {
        const Wanted terms[] = {{0, 3, {3, 16}}, {2, -1, {1, 0}}, {5, 7, {33, 7}}};
        const List<T> x = numbers<T>(rows * width);
        List<T> ys[2] = {numbers<T>(rows * outputs[0]), numbers<T>(rows * outputs[1])};
        List<double> want[2], sizes[2];
        for (long i = 0; i < 2; i++)
            for (T y : ys[i]) want[i].push_back(wide(y)), sizes[i].push_back(std::fabs(wide(y)));
        List<List<T>> kept;
        const auto made = [&](long count, double size) {
            kept.push_back(numbers<T>(count, size));
            return (int64_t)kept.back().data();
        };
        List<int64_t> words = {3}, columns;
        for (long i = 0; i < 33; i++) columns.push_back(i % 2);
        for (const Wanted& term : terms) {
            const long ranks = term.ranks[0] + term.ranks[1], count = (term.stop < 0 ? rows : term.stop) - term.start;
            const bool weighed = term.stop < 0;
            words.insert(words.end(), {term.start, term.stop, ranks, made(ranks * width, 1 / std::sqrt((double)width))});
            const List<T> down = kept.back();
            words.insert(words.end(), {weighed ? made(ranks, 1) : 0});
            const List<T> scales = kept.back();
            words.insert(words.end(), {weighed ? made(count * 2, 1) : 0, weighed ? 2 : 0, weighed ? (int64_t)columns.data() : 0});
            const List<T> gates = kept.back();
            words.push_back(1 + (term.ranks[1] > 0));
            for (long i = 0, first = 0; i < 2 && term.ranks[i]; first += term.ranks[i++]) {
                const double scale = 0.75 - i;
                int64_t bits;
                std::memcpy(&bits, &scale, 8);
                words.insert(words.end(), {i, first, term.ranks[i], made(outputs[i] * term.ranks[i], 0.3), bits});
                for (long r = 0; r < count; r++)
                    for (long k = 0; k < term.ranks[i]; k++) {
                        double low = 0, size = 0;
                        for (long j = 0; j < width; j++) {
                            const double product = wide(x[(term.start + r) * width + j]) * wide(down[(first + k) * width + j]);
                            low += product, size += std::fabs(product);
                        }
                        const double by = weighed ? wide(scales[first + k]) * wide(gates[r * 2 + columns[first + k]]) : 1;
                        for (long o = 0; o < outputs[i]; o++) {
                            const double up = scale * by * wide(kept.back()[o * term.ranks[i] + k]);
                            want[i][(term.start + r) * outputs[i] + o] += up * low;
                            sizes[i][(term.start + r) * outputs[i] + o] += std::fabs(up) * size;
                        }
                    }
            }
        }
        const List<int64_t> to = {(int64_t)ys[0].data(), outputs[0], (int64_t)ys[1].data(), outputs[1]};
        add(words.data(), x.data(), to.data(), 2, rows, width);
        // in bfloat16 what A makes is rounded, and again at a scale and a gate, and y at every term
        for (long i = 0; i < 2; i++)
            for (size_t at = 0; at < ys[i].size(); at++) near(wide(ys[i][at]), want[i][at], sizes[i][at] * (sizeof(T) == 2 ? 6.0 / 256 : 4e-5));
    }
}
static void rows_of_inputs() {
    few_rows<bf16>(few_rows_bf16), few_rows<float>(few_rows_float);
    low_rank<bf16>(low_rank_bf16), low_rank<float>(low_rank_float);
    const List<uint64_t> words = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    uint64_t sum = 0;
    sum_words(words.data(), &sum, 11);
    same((double)sum, 66);
}

// --- products of whole matrices

static void matrices() {
    const long shapes[][3] = {{1, 1, 1}, {3, 17, 40}, {37, 50, 300}, {261, 13, 7}, {150, 150, 150}};  // rows, columns, depth
    for (const auto& [rows, columns, depth] : shapes)
        for (const int how : {0, 1, 2, 3, 4, 5, 6, 7}) {
            // either operand by its rows or by its columns, a few more beside them
            const bool left = how & 1, right = how & 2, add = how & 4;
            const long a_step = left ? rows + 3 : 1, a_stride = left ? 1 : depth + 3, b_step = right ? columns + 2 : 1,
                       b_stride = right ? 1 : depth + 2, stride = columns + 1;
            const float scale = add ? -0.75f : 1;
            const List<float> a = numbers<float>((rows + 3) * (depth + 3)), b = numbers<float>((columns + 2) * (depth + 2)),
                              bias = numbers<float>(columns);
            List<float> c = numbers<float>(rows * stride);
            const List<float> before = c;
            matmul_float(a.data(), b.data(), add ? nullptr : bias.data(), c.data(), rows, columns, depth, a_stride, a_step, b_stride, b_step,
                         stride, add, scale);
            for (long i = 0; i < rows; i++) {
                for (long j = 0; j < columns; j++) {
                    const double added = add ? before[i * stride + j] : bias[j];
                    double sum = 0, size = std::fabs(added);
                    for (long k = 0; k < depth; k++) {
                        const double product = (double)a[i * a_stride + k * a_step] * b[j * b_stride + k * b_step];
                        sum += product, size += std::fabs(product);
                    }
                    near(c[i * stride + j], scale * sum + added, size * (depth + 3) * 0x1p-24);
                }
                same(c[i * stride + columns], before[i * stride + columns]);
            }
        }
}

// --- matrices of few bits

static double half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}
static double eighth(uint8_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return bits & 0x80 ? -size : size;
}

// What opening has to give to the bit, and the product with a few rows within rounding. values: the matrix in double, each as float.
template <typename T, typename Open, typename Product>
static void packed(const List<double>& values, long outputs, long inputs, Open open, Product product) {
    List<T> out(outputs * inputs);
    open(out.data());
    for (long i = 0; i < outputs * inputs; i++) same(wide(out[i]), rounded<T>(values[i]));
    for (long tokens : {1L, 3L}) {
        const List<T> x = numbers<T>(tokens * inputs), bias = numbers<T>(outputs);
        for (bool biased : {false, true}) {
            List<T> y(tokens * outputs);
            product(x.data(), biased ? bias.data() : nullptr, y.data(), tokens);
            for (long t = 0; t < tokens; t++)
                for (long o = 0; o < outputs; o++) {
                    double want = biased ? wide(bias[o]) : 0, sizes = std::fabs(want);
                    for (long i = 0; i < inputs; i++) {
                        const double term = rounded<T>(values[o * inputs + i]) * wide(x[t * inputs + i]);
                        want += term, sizes += std::fabs(term);
                    }
                    near_rounded(y[t * outputs + o], want, sizes);
                }
        }
    }
}
#define PACKED_BOTH(NAME, ...)                                                                                                   \
    packed<bf16>(                                                                                                                \
        values, outputs, inputs, [&](void* out) { packed_open_##NAME(__VA_ARGS__, out, outputs, inputs, 1); },                   \
        [&](const void* x, const void* b, void* y, long n) { packed_product_##NAME(__VA_ARGS__, x, b, y, n, outputs, inputs, 1); }); \
    packed<float>(                                                                                                               \
        values, outputs, inputs, [&](void* out) { packed_open_##NAME(__VA_ARGS__, out, outputs, inputs, 0); },                   \
        [&](const void* x, const void* b, void* y, long n) { packed_product_##NAME(__VA_ARGS__, x, b, y, n, outputs, inputs, 0); })

static const long MATRICES[][2] = {{1, 1}, {3, 33}, {7, 150}, {131, 260}};

static void flat_codes() {
    for (const auto& [outputs, inputs] : MATRICES)
        for (bool nested : {false, true}) {
            const long blocks = (outputs * inputs + 63) / 64;
            const List<uint8_t> codes = bytes((outputs * inputs + 1) / 2), small = bytes(blocks);
            const List<float> levels = numbers<float>(16), scales = numbers<float>(blocks), map = numbers<float>(256);
            const List<float> outer = numbers<float>((blocks + 255) / 256), offset = {0.37f};
            List<double> values(outputs * inputs);
            for (long i = 0; i < outputs * inputs; i++) {
                const float product = (float)((double)map[small[i / 64]] * outer[i / 64 / 256]);
                const float by = nested ? (float)((double)product + offset[0]) : scales[i / 64];
                values[i] = (float)((double)levels[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * by);
            }
            const void* held = nested ? (const void*)small.data() : scales.data();
            PACKED_BOTH(flat, codes.data(), held, nested ? map.data() : nullptr, outer.data(), offset.data(), levels.data());
        }
}

static void row_codes() {
    for (const auto& [outputs, inputs] : MATRICES) {
        const List<uint8_t> codes = bytes(outputs * inputs);
        const List<float> largest = numbers<float>(outputs);
        List<double> values(outputs * inputs);
        for (long i = 0; i < outputs * inputs; i++)
            values[i] = (float)((double)(float)((int8_t)codes[i] * (double)largest[i / inputs]) * (1.0f / 127));
        PACKED_BOTH(rows, (const int8_t*)codes.data(), largest.data());
    }
}

static void half_codes() {
    for (const auto& [outputs, inputs] : MATRICES) {
        const List<bf16> codes = numbers<bf16>(outputs * inputs);
        List<double> values(outputs * inputs);
        for (long i = 0; i < outputs * inputs; i++) values[i] = wide(codes[i]);
        PACKED_BOTH(halves, codes.data());
    }
}

static void grid_codes() {
    // kind, scales as halves, zeros, minimums, groups, rounded
    const bool S[][5] = {{0, 0, 0, 0, 0}, {1, 1, 0, 0, 1}, {1, 0, 1, 0, 0}, {1, 1, 0, 1, 0}, {1, 0, 1, 0, 1}};
    for (const auto& [outputs, inputs] : MATRICES)
        for (long kind = 0; kind < 4; kind++)
            for (const auto& [halves, zeroed, lowest, grouped, narrowed] : S) {
                if (kind > 1 && (zeroed || lowest || grouped)) continue;  // whole numbers alone have those
                const long rows = 2, columns = 32, across = (inputs + columns - 1) / columns, places = (outputs + 1) / 2 * across;
                List<uint8_t> codes = bytes(outputs * (kind ? inputs : (inputs + 1) / 2)), zeros = bytes(places);
                for (uint8_t& code : codes) code = kind == 3 && (code & 0x7f) == 0x7f ? 1 : code;  // which is no number
                List<float> scales = numbers<float>(places, 0.1);
                List<uint16_t> small(places), minimums(places);
                for (long i = 0; i < places; i++) small[i] = 0x2c00 + i % 1000, minimums[i] = 0xb000 + i % 999;
                List<int32_t> groups(inputs);
                for (long i = 0; i < inputs; i++) groups[i] = (int32_t)((i * 7) % across);
                List<double> values(outputs * inputs);
                for (long o = 0; o < outputs; o++)
                    for (long i = 0; i < inputs; i++) {
                        const uint8_t byte = codes[kind ? o * inputs + i : o * ((inputs + 1) / 2) + i / 2];
                        const double code = kind == 0 ? (i % 2 ? byte & 15 : byte >> 4) : kind == 1 ? byte : kind == 2 ? (int8_t)byte : eighth(byte);
                        const long place = o / rows * across + (grouped ? groups[i] : i / columns);
                        const double by = halves ? half(small[place]) : scales[place];
                        const double exact = (zeroed ? code - zeros[place] : code) * by + (lowest ? half(minimums[place]) : 0);
                        values[o * inputs + i] = narrowed ? rounded<bf16>((float)exact) : (float)exact;
                    }
                const void* held = halves ? (const void*)small.data() : scales.data();
                PACKED_BOTH(grid, codes.data(), held, zeroed ? zeros.data() : nullptr, lowest ? minimums.data() : nullptr,
                            grouped ? groups.data() : nullptr, kind, halves, rows, columns, across, narrowed);
            }
}
