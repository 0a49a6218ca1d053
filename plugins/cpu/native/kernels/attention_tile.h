// Products of attention where there are no tiles: query rows times keys, and weights times values.
#pragma once

#include "attention_softmax.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int kPanels = kLanes == 16 ? 4 : 2;        // that a block of scores has
constexpr int kColumns = kLanes == 16 ? 4 : 2;       // vectors of values that a block of sums has
constexpr int kRowsAtOnce = 6;                       // as many accumulators as registers hold beside the operands
constexpr int64_t kPanelKeys = kPanels * kLanes;
constexpr int64_t kWordsOfStep = 16;  // words and keys that are multiplied between asking for what comes next
constexpr int64_t kKeysOfStep = 8;

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
