// What attention does to some query rows: their softmax over a split of keys, and products where there are no tiles.
#pragma once

#include "attention_rows.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kKeyStep = 32;                     // visible keys are rounded to it: products of tiles take as many
constexpr int64_t kScoreStride = kSplitKeys + 16;    // of a row, elements; not a power of two: rows share no cache sets
constexpr int64_t kWeightStride = kSplitKeys + 32;   // the same, of bfloat16
constexpr float kLowest = -3.402823466e+38f;         // not -infinity: the difference of two of them is no number
constexpr float kLog2e = 1.44269504088896341f;
constexpr int kPanels = kLanes == 16 ? 4 : 2;        // that a block of scores has
constexpr int kColumns = kLanes == 16 ? 4 : 2;       // vectors of values that a block of sums has
constexpr int kRowsAtOnce = 6;                       // as many accumulators as registers hold beside the operands
constexpr int64_t kPanelKeys = kPanels * kLanes;
constexpr int64_t kWordsOfStep = 16;  // words and keys that are multiplied between asking for what comes next
constexpr int64_t kKeysOfStep = 8;

// 2 to the x, below 2**127; 0 below 2**-126, NaN for NaN, 1 for 0: what nobody sees changes nothing. By coarse
// coefficients within 3e-6, else 2e-7: minimax polynomials of the relative error between -1/2 and 1/2.
template <bool kCoarse>
inline Float exp2(Float x) {
#if defined(__AVX512F__)
    const __m512 exponent = _mm512_roundscale_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float f = x - bits_as<Float>(exponent);
#else
    const Float held = max(min(x, splat(127.0f)), splat(-127.0f));
    const Float n = (held + 12582912.0f) - 12582912.0f;  // rounds to an integer: 1.5 * 2**23
    const Float f = held - n;
#endif
    Float p;
    if constexpr (kCoarse) {
        p = splat(9.582806818e-03f);
        p = p * f + 5.590642694e-02f;
        p = p * f + 2.402409939e-01f;
        p = p * f + 6.931241937e-01f;
    } else {
        p = splat(1.326466545e-03f);
        p = p * f + 9.671512607e-03f;
        p = p * f + 5.550733893e-02f;
        p = p * f + 2.402224209e-01f;
        p = p * f + 6.931469775e-01f;
    }
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return bits_as<Float>(_mm512_maskz_scalef_ps(kept, bits_as<__m512>(p), exponent));
#else
    const Int exponent = __builtin_convertvector(n, Int);
    const Float scaled = bits_as<Float>(bits_as<Int>(p) + (exponent << 23));
    return x < -126.0f ? Float{} : x == x ? scaled : x;
#endif
}

// Some rows' softmax so far. maximum: of logits times log2 e, [rows]; total: [rows]; weighted: [rows, width], values
// times weights.
struct Softmax {
    float* maximum;
    float* total;
    float* weighted;

    Softmax(float* memory, int64_t rows)
        : maximum(memory), total(memory + rounded_up(rows, 16)), weighted(memory + 2 * rounded_up(rows, 16)) {}

    static int64_t size(int64_t rows, int64_t width) { return rows * width + 2 * rounded_up(rows, 16); }

    // Not inlined: the compiler may fuse either product with the sum, and all who merge must get the same.
    __attribute__((noinline)) void merge(const Softmax& next, int64_t rows, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float before = maximum[row], after = next.maximum[row];
            const float raised = before > after ? before : after;
            const float kept = exp2<false>(splat(before - raised))[0], added = exp2<false>(splat(after - raised))[0];
            maximum[row] = raised;
            total[row] = total[row] * kept + next.total[row] * added;
            float* sums = weighted + row * width;
            const float* more = next.weighted + row * width;
            for (int64_t i = 0; i < width; i += kLanes) store(sums + i, load(sums + i) * kept + load(more + i) * added);
        }
    }
};

// How scores become weights. `factor` makes a score a logit times log2 e, after `scale` and `softcap`, if any.
struct Scaling {
    bool scaled;  // scale is in the factor: the largest score is the largest logit
    float factor;
    float scale;
    float softcap;        // 0: none
    const float* keys;    // [kSplitKeys], scales of the keys' codes, or null
    const float* values;  // the same of the values

    static Scaling of(float scale, float softcap, const float* keys, const float* values) {
        const bool scaled = softcap <= 0 && scale > 0;
        return {scaled, scaled ? scale * kLog2e : kLog2e, scale, softcap, keys, values};
    }

    void apply(float* scores, int64_t from, int64_t to) const {
        if (keys == nullptr && scaled) return;
        for (int64_t i = from; i < to; i += kLanes) {
            Float some = load(scores + i);
            if (keys != nullptr) some *= load(keys + i);
            if (!scaled) some *= scale;
            if (softcap > 0) some = softcap * tanh(some / softcap);
            store(scores + i, some);
        }
    }
};

// The keys of a split that one row sees, first - last - 1, of those that some row sees: from - to - 1.
struct Seen {
    int64_t first;
    int64_t last;
    int64_t from;  // these two are multiples of kKeyStep
    int64_t to;
};

inline Float shown(Float some, int64_t at, const Seen& seen, float hidden) {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Int after = lane >= static_cast<int32_t>(seen.first - at);
    const Int before = lane < static_cast<int32_t>(seen.last - at);
    return (after & before) != 0 ? some : splat(hidden);
}

inline float largest_of(const float* scores, const Seen& seen) {
    Float some = splat(kLowest), others = some;
    int64_t at = seen.first / kLanes * kLanes;
    for (; at < seen.last; at += kLanes) {
        const bool whole = at >= seen.first && at + kLanes <= seen.last;
        const Float next = load(scores + at);
        some = max(whole ? next : shown(next, at, seen, kLowest), some);
        std::swap(some, others);  // two chains of dependent maxima
    }
    return max_of(max(some, others));
}

// Put a row's weights, kLanes from `at` on: as they are, or rounded to bfloat16.
inline void put_weights(float* to, Float weights) { store(to, weights); }
#if defined(__AVX512BF16__)
inline void put_weights(BFloat16* to, Float weights) {
    const __m256i words = bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(weights)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
}
#endif

// Turn a row's scores into weights, e to the (logit - maximum); 0 for keys that it does not see.
template <class W>
inline void soften(float* scores, W* weights, const Seen& seen, const Scaling& scaling, float* maximum, float* total) {
    scaling.apply(scores, seen.first / kLanes * kLanes, seen.last);
    const float most = largest_of(scores, seen) * scaling.factor;
    Float sums = {};
    for (int64_t at = seen.from; at < seen.to; at += kLanes) {
        if (at + kLanes <= seen.first || at >= seen.last) {
            put_weights(weights + at, Float{});
            continue;
        }
        const bool whole = at >= seen.first && at + kLanes <= seen.last;
        Float some = exp2<sizeof(W) == 2>(load(scores + at) * scaling.factor - most);
        if (!whole) some = shown(some, at, seen, 0.0f);
        sums += some;
        if (scaling.values != nullptr) {
            some *= load(scaling.values + at);
            if (!whole) some = shown(some, at, seen, 0.0f);
        }
        put_weights(weights + at, some);
    }
    // Of no key no sum: its product with another maximum must be zero.
    *maximum = seen.first < seen.last && most > kLowest ? most : kLowest;
    *total = sum(sums);
}

// sums + keys * query, by words.
template <bool kPairs>
inline Float add_words(Float sums, Float keys, Float query) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
        const __m512bh pairs = bits_as<__m512bh>(query);
        return bits_as<Float>(_mm512_dpbf16_ps(bits_as<__m512>(sums), bits_as<__m512bh>(keys), pairs));
    }
#endif
    return sums + keys * query;
}

template <bool kPairs>
inline Float splat_word(const float* word) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
        int32_t pair;
        std::memcpy(&pair, word, sizeof(pair));
        return bits_as<Float>(_mm512_set1_epi32(pair));
    }
#endif
    return splat(*word);
}

// scores[row][key] = query[row] @ key, of kRows rows and kPanels panels.
template <bool kPairs, int kRows>
inline void score_block(const float* query, int64_t words, const float* panels, float* scores, Ahead& ahead) {
    Float sums[kRows][kPanels] = {};
    for (int64_t word = 0; word < words; ++word) {
        if (word % kWordsOfStep == 0) ahead.step();
        Float keys[kPanels];
#pragma GCC unroll 16
        for (int i = 0; i < kPanels; ++i) keys[i] = load(panels + (i * words + word) * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
            for (int i = 0; i < kPanels; ++i) {
                sums[row][i] = add_words<kPairs>(sums[row][i], keys[i], splat_word<kPairs>(query + row * words + word));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kPanels; ++i) {
        store(scores + i / kPanels * kScoreStride + i % kPanels * kLanes, sums[i / kPanels][i % kPanels]);
    }
}

// weighted[row] += weights[row] @ values, of kVectors vectors of kRows rows and `count` keys.
template <int kRows, int kVectors>
inline void add_block(const float* weights, const float* values, int64_t count, float* weighted, int64_t width,
                      Ahead& ahead) {
    Float sums[kRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
        sums[i / kVectors][i % kVectors] = load(weighted + i / kVectors * width + i % kVectors * kLanes);
    }
    for (int64_t key = 0; key < count; ++key) {
        if (key % kKeysOfStep == 0) ahead.step();
        Float some[kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) some[i] = load(values + key * width + i * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Float weight = splat(weights[row * kScoreStride + key]);
#pragma GCC unroll 16
            for (int i = 0; i < kVectors; ++i) sums[row][i] += weight * some[i];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
        store(weighted + i / kVectors * width + i % kVectors * kLanes, sums[i / kVectors][i % kVectors]);
    }
}

template <int kRows>
inline void add_rows(const float* weights, const float* values, int64_t count, float* weighted, int64_t width,
                     Ahead& ahead) {
    int64_t at = 0;
    for (; at + kColumns * kLanes <= width; at += kColumns * kLanes) {
        add_block<kRows, kColumns>(weights, values + at, count, weighted + at, width, ahead);
    }
    for (; at < width; at += kLanes) add_block<kRows, 1>(weights, values + at, count, weighted + at, width, ahead);
}

// Lanes whose number has no bit kWidth: a's two sums of lanes kWidth apart; the others: b's.
template <int kWidth, int... kLane>
inline Float halved(Float a, Float b, Lanes<kLane...>) {
    return __builtin_shufflevector(a, b, (kLane & kWidth ? kLane + kLanes : kLane)...) +
           __builtin_shufflevector(a, b, (kLane & kWidth ? (kLane ^ kWidth) + kLanes : kLane ^ kWidth)...);
}

// Lane i of the result is the sum of vectors[i], each summed in the same order. [2 * kWidth], overwritten.
// Inlined: vectors are in registers then.
template <int kWidth>
__attribute__((always_inline)) inline Float sums_of(Float* vectors) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) vectors[i] = halved<kWidth>(vectors[i], vectors[i + kWidth], AllLanes());
    if constexpr (kWidth > 1) return sums_of<kWidth / 2>(vectors);
    return vectors[0];
}

// Add the products of a vector of words of kRows rows with a key's, of whose elements `left` are.
template <bool kPairs, class C, int kRows, bool kAsk>
__attribute__((always_inline)) inline void add_products(Float* sums, const float* query, int64_t words,
                                                        const char* const* row, int64_t at, int64_t left) {
    const Float key = words_of<kPairs>(reinterpret_cast<const C*>(row[0]) + at, left);
    if constexpr (kAsk) ask<kVectorElements<kPairs> * sizeof(C)>(row[kFewAhead], at * sizeof(C));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        Float& sum = sums[i * (kLanes / kRows)];
        sum = add_words<kPairs>(sum, key, load(query + i * words));
    }
}

// Put the scores of kRows rows and kLanes / kRows keys, where the cache has them: for few rows no panel is worth it.
template <bool kPairs, class C, int kRows, bool kAsk>
inline void score_rows(const float* query, int64_t words, const char* const* rows, int64_t head_dim, float* scores) {
    constexpr int64_t kKeys = kLanes / kRows, kStep = kVectorElements<kPairs>;
    Float sums[kLanes] = {};
    // Key by key, as they lie: memory that is read in order comes before it is asked for.
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
        const float* some = query;
        int64_t at = 0;
        for (; at + kStep <= head_dim; at += kStep, some += kLanes) {
            add_products<kPairs, C, kRows, kAsk>(sums + key, some, words, rows + key, at, kStep);
        }
        if (at < head_dim) {
            add_products<kPairs, C, kRows, kAsk>(sums + key, some, words, rows + key, at, head_dim - at);
        }
    }
    float each[kLanes];
    store(each, sums_of<kLanes / 2>(sums));
    for (int i = 0; i < kRows; ++i) std::memcpy(scores + i * kScoreStride, each + i * kKeys, kKeys * sizeof(float));
}

// As `add_rows`, of values where the cache has them.
template <class C, int kRows, int kVectors>
inline void add_values(const float* weights, const char* const* rows, int64_t at, int64_t head_dim, int64_t count,
                       float* weighted, int64_t width) {
    Float sums[kRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
        sums[i / kVectors][i % kVectors] = load(weighted + i / kVectors * width + at + i % kVectors * kLanes);
    }
    for (int64_t key = 0; key < count; ++key) {
        const C* value = reinterpret_cast<const C*>(rows[key]) + at;
        Float some[kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
            // The first of several starts a line.
            const int64_t of_line = (kVectors > 1 ? i * kLanes : at) * sizeof(C) % 64;
            if (of_line < kLanes * int64_t(sizeof(C))) {
                __builtin_prefetch(rows[key + kFewAhead] + (at + i * kLanes) * sizeof(C), 0, 2);
            }
            some[i] = kVectors > 1 ? load_whole(value + i * kLanes) : widened(value, head_dim - at);
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Float weight = splat(weights[row * kScoreStride + key]);
#pragma GCC unroll 16
            for (int i = 0; i < kVectors; ++i) sums[row][i] += weight * some[i];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
        store(weighted + i / kVectors * width + at + i % kVectors * kLanes, sums[i / kVectors][i % kVectors]);
    }
}

template <class C, int kRows>
inline void add_lying(const float* weights, const char* const* rows, int64_t head_dim, int64_t count, float* weighted,
                      int64_t width) {
    constexpr int kMost = kRows > 2 ? kColumns : 2 * kColumns;  // whole rows, read in order, where there is room
    int64_t at = 0;
    for (; at + kMost * kLanes <= head_dim; at += kMost * kLanes) {
        add_values<C, kRows, kMost>(weights, rows, at, head_dim, count, weighted, width);
    }
    for (; at < head_dim; at += kLanes) {
        add_values<C, kRows, 1>(weights, rows, at, head_dim, count, weighted, width);
    }
}

// Call block(row, constant number of rows) for all rows, kRowsAtOnce at a time.
template <int kRows = kRowsAtOnce, class Block>
inline void by_rows(int64_t row, int64_t rows, const Block& block) {
    for (; row + kRows <= rows; row += kRows) block(row, std::integral_constant<int, kRows>());
    if constexpr (kRows > 1) by_rows<kRows - 1>(row, rows, block);
}

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
