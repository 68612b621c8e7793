// Low-rank terms of many adapters at linears that read the same input, all at once: what every A makes of the rows of its term, then
// what every B adds to its linear's outputs of them. Of a few rows the time is that of reading the matrices, each of which is short:
// while one is multiplied the next is fetched.
//
// Every number is summed alone, in an order that widths and ranks decide, and terms of the same row are added in theirs: a row's result
// depends neither on its neighbours nor on threads.
#pragma once
#include "few_rows.h"

// What Python describes, read word by word: whole numbers, addresses, the bits of doubles.
struct Words {
    const int64_t* at;
    inline long next() { return (long)*at++; }
    template <typename T>
    inline const T* address() { return (const T*)*at++; }
    inline float number() {
        double out;
        std::memcpy(&out, at++, sizeof out);
        return (float)out;
    }
};

// One linear's share of a term: B [outputs, rank], for `rank` of what A makes, from the `first` on.
template <typename T>
struct TermPart {
    long linear, first, rank;
    const T* lora_B;
    float scale;

    explicit TermPart(Words& words) : linear(words.next()), first(words.next()), rank(words.next()), lora_B(words.address<T>()), scale(words.number()) {}
};

// A term of the rows from `start` on, before `stop` (-1: all): A [ranks, width]; rank_scales [ranks], or null; gates [rows, gate_columns],
// of which `columns` [ranks] says each rank's, or null.
template <typename T>
struct Term {
    long start, stop, ranks;
    const T *lora_A, *rank_scales, *gates;
    long gate_columns;
    const int64_t* columns;
    std::vector<TermPart<T>> parts;

    explicit Term(Words& words)
        : start(words.next()), stop(words.next()), ranks(words.next()), lora_A(words.address<T>()), rank_scales(words.address<T>()),
          gates(words.address<T>()), gate_columns(words.next()), columns(words.address<int64_t>()) {
        const long count = words.next();
        parts.reserve(count);
        for (long n = count; n > 0; n--) parts.emplace_back(words);
    }

    long rows(long all) const { return (stop < 0 ? all : stop) - start; }

    // A number that A made for a row, times its rank's scale and gate, each rounded.
    inline T weighed(T low, long row, long rank) const {
        if (rank_scales) put(low, wide(low) * wide(rank_scales[rank]));
        if (gates) put(low, wide(low) * wide(gates[row * gate_columns + columns[rank]]));
        return low;
    }
};

// Where a linear's outputs are: y [rows, outputs].
template <typename T>
struct TermOutputs {
    T* y;
    long outputs;
};

// A word is a float, or two numbers of bfloat16.
template <typename T>
constexpr long PER_WORD = sizeof(float) / sizeof(T);
// Words of a row that are turned at once, where there are no more and otherwise: an adapter of rank 16 in bfloat16 has 8.
constexpr int FEW_WORDS = LANES == 16 ? 8 : LANES, MOST_WORDS = LANES;

// LANES words of rows of N, `apart` each, `count` numbers of each row: the others are zeros.
template <int N, typename T>
static inline Floats load_words(const T* from, long apart, long count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const long bytes = std::min(count * (long)sizeof(T), 4L * N);
    if constexpr (N == LANES) return (Floats)_mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - bytes), from);
    const __mmask32 some = ~(__mmask32)0 >> (32 - bytes);
    const __m256i first = _mm256_maskz_loadu_epi8(some, from), second = _mm256_maskz_loadu_epi8(some, from + apart);
    return (Floats)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#else
    Floats whole;
    if (N == LANES && count >= N * PER_WORD<T>) return std::memcpy(&whole, from, sizeof whole), whole;
    float words[LANES] = {};
    for (int i = 0; i < LANES / N; i++) std::memcpy(words + i * N, from + i * apart, std::min(count * (long)sizeof(T), 4L * N));
    return load(words);
#endif
}

// words[j]: the j-th word of each of LANES rows, `width` apart, of which `rows` are there, and `count` numbers of each.
template <int N, typename T>
static inline void turn_rows(const T* from, long width, long rows, long count, Floats (&words)[N]) {
    if (rows == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) words[i] = load_words<N>(from + i * width, N * width, count);
    } else {
        // zeros for those that are not there
        T some[LANES * N * PER_WORD<T>] = {};
        for (long i = 0; i < rows; i++) std::copy_n(from + i * width, std::min(count, N * PER_WORD<T>), some + i * N * PER_WORD<T>);
        for (int i = 0; i < N; i++) words[i] = load_words<N>(some + i * N * PER_WORD<T>, N * N * PER_WORD<T>, N * PER_WORD<T>);
    }
    transpose<N>(words);
}

// A word of ranks of some outputs by that of a row.
static inline Floats fused_word(Floats word, const float* low, Floats sum, const float*) { return fused(word, spread(low[0]), sum); }
#if DOTS
static inline Floats fused_word(Floats word, const bf16* low, Floats sum, const bf16*) {
    int32_t pair;
    std::memcpy(&pair, low, sizeof pair);
    return fused((__m512bh)word, (__m512bh)_mm512_set1_epi32(pair), sum);
}
#else
static inline Floats fused_word(Floats word, const float* low, Floats sum, const bf16*) {
    const Floats first = (Floats)((Bits)word << 16), second = (Floats)((Bits)word & 0xffff0000u);
    return fused(second, spread(low[1]), fused(first, spread(low[0]), sum));
}
#endif

constexpr long TURNED_ROWS = 64;  // rows whose sums are held beside what is turned

// sums [rows, LANES] += the outputs of `here` words, at most N of them, and of rows of low.
template <int N, typename T>
static inline void add_words(const Floats (&words)[N], long here, Strided<typename Factors<T>::Number> low, long rows, float* sums) {
    const auto add = [&](auto count, long r) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(count)::value;
        Floats sum[ROWS];
        for (int i = 0; i < ROWS; i++) sum[i] = load(sums + (r + i) * LANES);
        for (long j = 0; j < here; j++)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) sum[i] = fused_word(words[j], low.at + (r + i) * low.stride + j * PER_WORD<T>, sum[i], (const T*)nullptr);
        for (int i = 0; i < ROWS; i++) store(sums + (r + i) * LANES, sum[i]);
    };
    long r = 0;
    for (; r + 4 <= rows; r += 4) add(std::integral_constant<int, 4>(), r);
    for (; r < rows; r++) add(std::integral_constant<int, 1>(), r);
}

// Outputs from `from` on, before `to`, of B [outputs, rank] by rows of low; as many of `ahead` [outputs, its rank] are fetched.
template <typename T>
static void add_outputs(const T* lora_B, long rank, const T* ahead, long ahead_rank, Strided<typename Factors<T>::Number> low, long rows,
                        long from, long to, const Outputs<T>& outputs) {
    alignas(64) float sums[TURNED_ROWS * LANES];
    for (long at = from; at < to; at += LANES) {
        const long count = std::min((long)LANES, to - at);
        for (const char *p = (const char*)(ahead + (at - from) * ahead_rank), *end = p + count * ahead_rank * sizeof(T); p < end; p += 64)
            __builtin_prefetch(p, 0, 2);
        for (long first = 0; first < rows; first += TURNED_ROWS) {
            const long some = std::min(TURNED_ROWS, rows - first);
            std::fill_n(sums, some * LANES, 0.0f);
            for (long k = 0; k < rank;) {
                const T* here = lora_B + at * rank + k;
                const long left = rank - k, words = (left + PER_WORD<T> - 1) / PER_WORD<T>;
                const auto ranks = Strided<typename Factors<T>::Number>{low.at + first * low.stride + k, low.stride};
                const auto turn = [&](auto most) __attribute__((always_inline)) {
                    constexpr int N = decltype(most)::value;
                    Floats turned[N];
                    turn_rows<N>(here, rank, count, left, turned);
                    add_words<N, T>(turned, std::min(words, (long)N), ranks, some, sums);
                    return N * PER_WORD<T>;
                };
                if (words <= FEW_WORDS) k += turn(std::integral_constant<int, FEW_WORDS>());
                else k += turn(std::integral_constant<int, MOST_WORDS>());
            }
            for (long r = 0; r < some; r++) outputs.write(first + r, at, sums + r * LANES, count);
        }
    }
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
static inline bool has_tiles(const bf16*) { return lorry_amx(); }
#endif
template <typename T>
static inline bool has_tiles(const T*) { return false; }

template <typename T>
class LowRankTerms {
    typedef typename Factors<T>::Number Number;
    std::vector<Term<T>> terms;

   public:
    explicit LowRankTerms(Words& words) {
        const long count = words.next();
        terms.reserve(count);
        for (long n = count; n > 0; n--) terms.emplace_back(words);
    }

    // Add to ys, of all rows of x, what the terms make of theirs.
    void add(const Inputs<T>& x, const std::vector<TermOutputs<T>>& ys) const {
        if (terms.empty()) return;
        if (has_tiles((const T*)nullptr)) return add_on_tiles(x, ys);
        std::vector<Part> parts;
        std::vector<Down> downs;
        long numbers = 0, weights = 0, lows = 0;
        for (const Term<T>& term : terms) {
            const long rows = term.rows(x.rows), first = (long)parts.size();
            long ranks = 0;
            for (const TermPart<T>& part : term.parts) {
                parts.push_back({&term, &part, rows, numbers + ranks, 0});
                ranks += (part.rank + 1) / 2 * 2;  // pairs are of one part
                weights += part.rank * ys[part.linear].outputs;
            }
            for (size_t i = first; i < parts.size(); i++) parts[i].stride = ranks;
            for (long at = 0; at < term.ranks; at += PANEL)
                downs.push_back({&term, rows, at, std::min(PANEL, term.ranks - at), lows + at, first, (long)parts.size()});
            numbers += rows * ranks, lows += rows * term.ranks;
            weights += term.ranks * x.width;
        }
        std::vector<Up> ups;
        std::vector<long> starts;
        for (long linear = 0; linear < (long)ys.size(); linear++)
            for (long at = 0; at < ys[linear].outputs; at += STRETCH) {
                starts.push_back(ups.size());
                for (const Part& part : parts)
                    if (part.part->linear == linear) ups.push_back({&part, at, std::min(at + STRETCH, ys[linear].outputs)});
            }
        starts.push_back(ups.size());
        const long units = (long)starts.size() - 1;
        const auto rows = x.as_factors();
        std::vector<T> lows_space(lows);
        std::vector<Number> space(numbers);
#pragma omp parallel if (weights > PARALLEL)
        {
#pragma omp for schedule(static)
            for (size_t i = 0; i < downs.size(); i++) {
                const Down& down = downs[i];
                const Term<T>& term = *down.term;
                const T* ahead = i + 1 < downs.size() ? downs[i + 1].matrix(x.width) : nullptr;
                T* low = lows_space.data() + down.low - down.at;
                multiply_panel(down.matrix(x.width), ahead, down.count, x.width, rows.from(term.start), down.rows, down.at,
                               Outputs<T>{low, nullptr, term.ranks, false, 1.0f});
                for (long p = down.first; p < down.last; p++) {
                    const Part& part = parts[p];
                    const long begin = std::max(down.at, part.part->first), end = std::min(down.at + down.count, part.part->first + part.part->rank);
                    for (long r = 0; r < down.rows; r++)
                        for (long k = begin; k < end; k++)
                            take(term.weighed(low[r * term.ranks + k], r, k), space[part.low + r * part.stride + k - part.part->first]);
                }
            }
#pragma omp for schedule(static)
            for (long i = 0; i < units; i++)
                for (long u = starts[i]; u < starts[i + 1]; u++) {
                    const Part& part = *ups[u].part;
                    const TermOutputs<T>& to = ys[part.part->linear];
                    const Up& next = ups[std::min(u + 1, (long)ups.size() - 1)];
                    add_outputs(part.part->lora_B, part.part->rank, next.matrix(), next.part->part->rank, {space.data() + part.low, part.stride},
                                part.rows, ups[u].from, ups[u].to,
                                Outputs<T>{to.y + part.term->start * to.outputs, nullptr, to.outputs, true, part.part->scale});
                }
        }
    }

   private:
    static constexpr long STRETCH = 256;  // outputs of one matrix before those of the next: some kilobytes that lie together

    // A part with its rows of what A made, numbers from `low` on, `stride` apart.
    struct Part {
        const Term<T>* term;
        const TermPart<T>* part;
        long rows, low, stride;
    };
    // Some ranks of A, from `at` on: what they make goes to `low`, and to the parts from `first` on before `last`.
    struct Down {
        const Term<T>* term;
        long rows, at, count, low, first, last;
        const T* matrix(long width) const { return term->lora_A + at * width; }
    };
    // Outputs of a part from `from` on, before `to`.
    struct Up {
        const Part* part;
        long from, to;
        const T* matrix() const { return part->part->lora_B + from * part->part->rank; }
    };

    static inline void take(T from, T& to) { to = from; }
    template <typename N>
    static inline void take(T from, N& to) { to = wide(from); }

    // Term by term: tiles take a whole matrix, and its rows as they lie.
    void add_on_tiles(const Inputs<T>& x, const std::vector<TermOutputs<T>>& ys) const {
        bool apart = true;  // whether no row has two terms
        for (size_t i = 1; i < terms.size(); i++) apart &= terms[i - 1].stop >= 0 && terms[i].start >= terms[i - 1].stop;
        x.as_factors();  // made before several threads ask for it
        // with terms of rows of their own threads take one after the other, which is less to wait for than sharing each
#pragma omp parallel for schedule(dynamic) if (apart && terms.size() > 1 && x.rows * x.width > PARALLEL / 8)
        for (size_t i = 0; i < terms.size(); i++) {
            const Term<T>& term = terms[i];
            const long rows = term.rows(x.rows);
            std::vector<T> low(rows * term.ranks);
            multiply_dense(term.lora_A, Inputs<T>(x, term.start, rows), {low.data(), nullptr, term.ranks, false, 1.0f});
            for (long r = 0; r < rows; r++)
                for (long k = 0; k < term.ranks; k++) low[r * term.ranks + k] = term.weighed(low[r * term.ranks + k], r, k);
            for (const TermPart<T>& part : term.parts) {
                const TermOutputs<T>& to = ys[part.linear];
                multiply_dense(part.lora_B, Inputs<T>(low.data() + part.first, rows, part.rank, term.ranks),
                               {to.y + term.start * to.outputs, nullptr, to.outputs, true, part.scale});
            }
        }
    }
};
