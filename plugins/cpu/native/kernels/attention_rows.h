// Rows of a paged cache as attention multiplies them: keys with one key to a lane, values widened or in pairs of keys.
//
//     panel   kLanes keys, word by word: word w of all of them lies at w * kLanes. A word has 32 bits: an element as
//             float32, or a pair of bfloat16 where there are products of such pairs
//     row     a key or value of one token and head, where the cache has it
#pragma once

#include <cmath>

#include "simd.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

// An element of a row whose scale, float32, lies behind its elements, at the next multiple of 4 bytes.
struct Int8 {
    int8_t code;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class C>
int64_t row_bytes(int64_t head_dim) {
    return head_dim * sizeof(C);
}

template <>
inline int64_t row_bytes<Int8>(int64_t head_dim) {
    return rounded_up(head_dim, 4) + 4;
}

inline float row_scale(const char* row, int64_t head_dim) {
    float scale;
    std::memcpy(&scale, row + rounded_up(head_dim, 4), sizeof(scale));
    return scale;
}

// Whether queries of T are multiplied in pairs.
template <class T>
constexpr bool kPaired = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPaired<BFloat16> = true;
#endif

template <bool kPairs>
constexpr int64_t kVectorElements = kLanes * (kPairs ? 2 : 1);  // of a vector of words

template <class C>
inline Float load_whole(const C* from) {
    return load(from);
}

inline Float load_whole(const Int8* from) {
#if defined(__AVX512F__)
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bits_as<Float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
#elif defined(__AVX2__)
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return bits_as<Float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
#else
    Float vector;
    for (int i = 0; i < kLanes; ++i) vector[i] = from[i].code;
    return vector;
#endif
}

// kLanes elements as float32, of which there are `left`; zeros behind them.
template <class C>
inline Float widened(const C* from, int64_t left) {
    if (left >= kLanes) return load_whole(from);
    C some[kLanes] = {};
    std::memcpy(static_cast<void*>(some), from, left * sizeof(C));
    return load_whole(some);
}

#if defined(__AVX512BF16__)
// 32 elements as bfloat16, of which there are `left`; zeros behind them.
inline __m512i as_pairs(const BFloat16* from, int64_t left) {
    return left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from);
}

// A code has seven bits and a sign: bfloat16 holds it as it is.
inline __m512i as_pairs(const Int8* from, int64_t left) {
    const Float low = widened(from, left), high = left > 16 ? widened(from + 16, left - 16) : Float{};
    return bits_as<__m512i>(_mm512_cvtne2ps_pbh(bits_as<__m512>(high), bits_as<__m512>(low)));
}
#endif

// kLanes words of a row, of whose elements there are `left`.
template <bool kPairs, class C>
inline Float words_of(const C* from, int64_t left) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) return bits_as<Float>(as_pairs(from, left));
#endif
    return widened(from, left);
}

template <int... kLane>
struct Lanes {};
#if ZIF_VECTOR_BYTES == 64
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif ZIF_VECTOR_BYTES == 32
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3> AllLanes;
#endif

// Exchange the lanes of a whose number has bit kWidth with those of b that have it not.
template <int kWidth, int... kLane>
inline void exchange(Float& a, Float& b, Lanes<kLane...>) {
    const Float first = __builtin_shufflevector(a, b, (kLane & kWidth ? (kLane ^ kWidth) + kLanes : kLane)...);
    b = __builtin_shufflevector(a, b, (kLane & kWidth ? kLane + kLanes : kLane | kWidth)...);
    a = first;
}

// Lane i of vector k becomes lane k of vector i. [kLanes]
template <int kWidth = kLanes / 2>
inline void transpose(Float* vectors) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if ((i & kWidth) == 0) exchange<kWidth>(vectors[i], vectors[i + kWidth], AllLanes());
    }
    if constexpr (kWidth > 1) transpose<kWidth / 2>(vectors);
}

constexpr int64_t kFewAhead = 16;   // how far ahead rows are asked for where they are used as they lie
constexpr int64_t kTileAhead = 64;  // the same of keys that are tiles

// Ask for the line of a row that has `at`, counted in bytes, once: where steps are shorter than lines.
template <int64_t kStep>
inline void ask(const char* row, int64_t at) {
    if (kStep >= 64 || at % 64 < kStep) __builtin_prefetch(row + at, 0, 2);
}

// Asks for rows that are read later, some at each step of the work before: evenly, as a burst holds up the loads behind
// it, and as memory would rest while there is computed.
struct Ahead {
    const char* const* rows;
    int64_t left;
    int64_t bytes;   // of a row
    int64_t pace;    // rows of a step, times 256
    int64_t credit;

    Ahead(const char* const* rows, int64_t count, int64_t bytes, int64_t steps)
        : rows(rows), left(count), bytes(bytes), pace((count << 8) / larger(1, steps) + 1), credit(0) {}

    void step() {
        for (credit += pace; credit >= 256 && left > 0; credit -= 256, --left, ++rows) {
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(*rows + at, 0, 2);
        }
    }
};

// Put kLanes keys into a panel.
template <bool kPairs, class C>
inline void pack_panel(const char* const* rows, int64_t head_dim, float* panel, Ahead& ahead) {
    constexpr int64_t kStep = kVectorElements<kPairs>;
    for (int64_t at = 0; at < head_dim; at += kStep, panel += kLanes * kLanes) {
        Float words[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            words[i] = words_of<kPairs>(reinterpret_cast<const C*>(rows[i]) + at, head_dim - at);
        }
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + i * kLanes, words[i]);
        ahead.step();
    }
}

// Put a row, as float32, into width elements.
template <class C>
inline void widen_row(const char* row, int64_t head_dim, int64_t width, float* to) {
    for (int64_t at = 0; at < width; at += kLanes) {
        store(to + at, widened(reinterpret_cast<const C*>(row) + at, head_dim - at));
    }
}

// Whether a row has an element that is no number, or infinite. Codes have none; their scale is looked at elsewhere.
template <class C>
inline bool all_finite(const char* row, int64_t head_dim) {
    Float sums = {};
    for (int64_t at = 0; at < head_dim; at += kLanes) {
        const Float some = widened(reinterpret_cast<const C*>(row) + at, head_dim - at);
        sums += some - some;
    }
    return sum(sums) == 0;
}

// Write a vector of a head to its row of the cache as codes: round(x / scale), ties to even; scale = largest / 127, or no number where an element is not finite.
template <class T>
inline void write_codes(const T* from, int64_t head_dim, char* row) {
    Float largest = {}, spoiled = {};
    for (int64_t at = 0; at < head_dim; at += kLanes) {
        const Float some = widened(from + at, head_dim - at);
        spoiled += some - some;
        largest = max(max(some, -some), largest);
    }
    const float scale = max_of(largest) / 127.0f + sum(spoiled);
    const Float divisor = splat(scale > 0 ? scale : 1.0f);
    for (int64_t at = 0; at < head_dim; at += kLanes) {
        // 1.5 * 2**23 rounds to an integer.
        const Float codes = (widened(from + at, head_dim - at) / divisor + 12582912.0f) - 12582912.0f;
        const Int integers = __builtin_convertvector(scale == scale ? codes : Float{}, Int);
        for (int64_t i = 0; i < smaller(kLanes, head_dim - at); ++i) row[at + i] = static_cast<char>(integers[i]);
    }
    const int64_t padded = rounded_up(head_dim, 4);
    std::memset(row + head_dim, 0, padded - head_dim);
    std::memcpy(row + padded, &scale, sizeof(scale));
}

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
