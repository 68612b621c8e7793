// One step of generation through all layers of a decoder in one call: with a row or a few the time is that of reading the weights, and
// a call of Python for each norm and product would take as long again.
//
// What is computed and where it is rounded is as in models/decoder/block.py; models/decoder/step.py describes the layers. Every row is computed alone, in a fixed order.
#include "low_rank.h"
#include "packed_rows.h"
#include "pointwise.h"

#define ATTENTION(T)                                                                                                                        \
    (const T* q, T* o, const int64_t* table, const int64_t* lengths, long layer, long rows, long heads, long groups, long width, float scale)
#define STORE(T)                                                                                                                            \
    (const T* k, const T* v, const int64_t* table, const int64_t* rows, const int64_t* positions, long layer, long tokens, long groups, long width)
LORRY int attend_bf16 ATTENTION(bf16);
LORRY int attend_float ATTENTION(float);
LORRY int store_bf16 STORE(bf16);
LORRY int store_float STORE(float);
static void attend ATTENTION(bf16) { attend_bf16(q, o, table, lengths, layer, rows, heads, groups, width, scale); }
static void attend ATTENTION(float) { attend_float(q, o, table, lengths, layer, rows, heads, groups, width, scale); }
static void store STORE(bf16) { store_bf16(k, v, table, rows, positions, layer, tokens, groups, width); }
static void store STORE(float) { store_float(k, v, table, rows, positions, layer, tokens, groups, width); }

template <typename T>
struct Norm {
    const T *weight, *bias;
    float eps;

    explicit Norm(Words& words) : weight(words.address<T>()), bias(words.address<T>()), eps(words.number()) {}

    // y [rows, width], which may be x; with a bias a layer norm, else an RMS norm.
    void compute(const T* x, T* y, long rows, long width) const {
        for (long r = 0; r < rows; r++) {
            const T* from = x + r * width;
            T* to = y + r * width;
            if (!bias) {
                rms_row(from, weight, to, width, eps);
                continue;
            }
            float mean = 0, squares = 0;
#pragma omp simd reduction(+ : mean)
            for (long i = 0; i < width; i++) mean += wide(from[i]);
            mean /= width;
#pragma omp simd reduction(+ : squares)
            for (long i = 0; i < width; i++) squares += (wide(from[i]) - mean) * (wide(from[i]) - mean);
            const float rstd = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
            for (long i = 0; i < width; i++) put(to[i], (wide(from[i]) - mean) * rstd * wide(weight[i]) + wide(bias[i]));
        }
    }
};

// A matrix, read as it lies or as it is packed.
template <typename T>
struct Linear {
    long layout, outputs, inputs;
    const T *bias, *dense = nullptr;
    Flat flat{};
    Rows rows{};
    Grid grid{};
    Halves halves{};

    explicit Linear(Words& words) : layout(words.next()), outputs(words.next()), inputs(words.next()), bias(words.address<T>()) {
        if (layout == 0)
            dense = words.address<T>();
        else if (layout == 1)
            flat = {words.address<uint8_t>(), words.address<void>(), words.address<float>(), words.address<float>(), words.address<float>(), words.address<float>()};
        else if (layout == 2)
            rows = {words.address<int8_t>(), words.address<float>()};
        else if (layout == 3)
            grid = {words.address<uint8_t>(), words.address<void>(), words.address<uint8_t>(), words.address<uint16_t>(), words.address<int32_t>(),
                    words.next(), words.next(), words.next(), words.next(), words.next(), words.next()};
        else
            halves = {words.address<bf16>()};
    }

    void multiply(const Inputs<T>& x, T* y) const {
        const Outputs<T> to = {y, bias, outputs, false, 1.0f};
        if (layout == 0)
            multiply_dense(dense, x, to);
        else if (layout == 1)
            multiply_packed(flat, x, to);
        else if (layout == 2)
            multiply_packed(rows, x, to);
        else if (layout == 3)
            multiply_packed(grid, x, to);
        else
            multiply_packed(halves, x, to);
    }
};

// Linears that read the same input, and what adapters add to them.
template <typename T>
struct Group {
    std::vector<Linear<T>> linears;
    LowRankTerms<T> terms;

    explicit Group(Words& words) : linears(read_linears(words)), terms(words) {}

    // x [rows, inputs] -> one [rows, outputs] for each linear.
    void multiply(const std::vector<T>& x, long rows, std::vector<std::vector<T>>& ys) const {
        const Inputs<T> in(x.data(), rows, linears[0].inputs, linears[0].inputs);
        std::vector<TermOutputs<T>> outputs;
        ys.resize(linears.size());
        for (size_t i = 0; i < linears.size(); i++) {
            ys[i].resize(rows * linears[i].outputs);
            linears[i].multiply(in, ys[i].data());
            outputs.push_back({ys[i].data(), linears[i].outputs});
        }
        terms.add(in, outputs);
    }

   private:
    static std::vector<Linear<T>> read_linears(Words& words) {
        std::vector<Linear<T>> out;
        for (long n = words.next(); n > 0; n--) out.emplace_back(words);
        return out;
    }
};

enum Activation { SILU, GELU, TANH_GELU, RELU };

static inline float activate(float x, long kind) {
    if (kind == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.707106781f));
    if (kind == TANH_GELU) return 0.5f * x * (1.0f + std::tanh(0.797884561f * (x + 0.044715f * x * x * x)));
    return x > 0 || x != x ? x : 0.0f;
}

// gate = act(gate) * up, or act(gate) where there is no up.
template <typename T>
static void activate(std::vector<T>& gate, const T* up, long kind) {
    const long count = gate.size();
    if (kind == SILU) return gate_with_silu(gate.data(), up, gate.data(), count);
#pragma omp parallel for schedule(static) if (count > PARALLEL)
    for (long i = 0; i < count; i++) {
        T value;
        put(value, activate(wide(gate[i]), kind));
        put(gate[i], up ? wide(value) * wide(up[i]) : wide(value));
    }
}

// to += from, rounded.
template <typename T>
static void add_rows(T* to, const T* from, long count) {
#pragma omp simd
    for (long i = 0; i < count; i++) put(to[i], wide(to[i]) + wide(from[i]));
}

// q, k, v of one product, whose rows are [heads, 3, width].
template <typename T>
static void split(std::vector<std::vector<T>>& ys, long rows, long heads, long width) {
    const std::vector<T> all = std::move(ys[0]);
    ys.assign(3, std::vector<T>(rows * heads * width));
    for (long i = 0; i < rows * heads; i++)
        for (long part = 0; part < 3; part++) std::copy_n(all.data() + (3 * i + part) * width, width, ys[part].data() + i * width);
}

// x [rows, width], each row the newest token of its row of the cache: overwritten with what the layers make of it.
template <typename T>
static void run_layers(const int64_t* description, T* x, const float* cos, const float* sin, const int64_t* table, const int64_t* cache_rows,
                       const int64_t* positions, const int64_t* lengths, long rows) {
    Words words = {description};
    const long layers = words.next(), width = words.next(), heads = words.next(), groups = words.next(), head = words.next();
    const long half = words.next(), fused = words.next(), activation = words.next(), parallel = words.next();
    std::vector<T> normed(rows * width), attention(rows * heads * head);
    std::vector<std::vector<T>> ys;
    for (long layer = 0; layer < layers; layer++) {
        const Norm<T> before_attention(words), before_mlp(words), of_queries(words), of_keys(words);
        const Group<T> qkv(words), attention_out(words), mlp_in(words), mlp_out(words);
        before_attention.compute(x, normed.data(), rows, width);
        qkv.multiply(normed, rows, ys);
        if (fused) split(ys, rows, heads, head);
        T *q = ys[0].data(), *k = ys[1].data();
        if (of_queries.weight) {
            of_queries.compute(q, q, rows * heads, head);
            of_keys.compute(k, k, rows * groups, head);
        }
        if (half) {
            rotate(q, cos, sin, rows, heads, head, half, 1);
            rotate(k, cos, sin, rows, groups, head, half, 1);
        }
        store(k, ys[2].data(), table, cache_rows, positions, layer, rows, groups, head);
        attend(q, attention.data(), table, lengths, layer, rows, heads, groups, head, 1.0f / std::sqrt((float)head));
        attention_out.multiply(attention, rows, ys);
        if (parallel) before_mlp.compute(x, normed.data(), rows, width);  // both halves read the layer's input
        add_rows(x, ys[0].data(), rows * width);
        if (!parallel) before_mlp.compute(x, normed.data(), rows, width);
        mlp_in.multiply(normed, rows, ys);
        activate(ys[0], ys.size() > 1 ? ys[1].data() : nullptr, activation);
        const std::vector<T> inner = std::move(ys[0]);
        mlp_out.multiply(inner, rows, ys);
        add_rows(x, ys[0].data(), rows * width);
    }
}

#define LAYERS(T)                                                                                                                              \
    (const int64_t* description, T* x, const float* cos, const float* sin, const int64_t* table, const int64_t* rows, const int64_t* positions, \
     const int64_t* lengths, long count) {                                                                                                    \
        run_layers(description, x, cos, sin, table, rows, positions, lengths, count);                                                          \
    }
LORRY void decode_layers_bf16 LAYERS(bf16)
LORRY void decode_layers_float LAYERS(float)
