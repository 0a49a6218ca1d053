// Weights as words of 32 bits, turned: a word is one float32, two bfloat16 or whatever an instruction multiplies at
// once, and a vector has the same word of kLanes rows. So lane i sums output i, and no sum is added up across lanes.
#pragma once

#include "simd.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first element of a word is its lowest part");

namespace zif {
namespace ZIF_ISA {
namespace {

#if defined(__AVX512F__)
// Rows and columns of 16 by 16 words change places.
__attribute__((always_inline)) inline void transpose_words(__m512i* rows) {
    __m512i some[16];
    for (int i = 0; i < 16; i += 2) {
        some[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        some[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(some[i], some[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(some[i], some[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(some[i + 1], some[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(some[i + 1], some[i + 3]);
    }
    // Now quarters of 4 words: rows[4 * a + b] has column 4 * q + b of rows 4 * a to 4 * a + 3 as its quarter q.
    for (int b = 0; b < 4; ++b) {
        some[b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
        some[4 + b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
        some[8 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
        some[12 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
    }
    for (int b = 0; b < 4; ++b) {
        rows[b] = _mm512_shuffle_i32x4(some[b], some[8 + b], 0x88);
        rows[8 + b] = _mm512_shuffle_i32x4(some[b], some[8 + b], 0xdd);
        rows[4 + b] = _mm512_shuffle_i32x4(some[4 + b], some[12 + b], 0x88);
        rows[12 + b] = _mm512_shuffle_i32x4(some[4 + b], some[12 + b], 0xdd);
    }
}
#endif

// kLanes rows of kLanes words and their columns change places. Inlined, as those above: words stay in registers.
__attribute__((always_inline)) inline void transpose(Float* rows) {
#if defined(__AVX512F__)
    __m512i words[16];
    for (int i = 0; i < 16; ++i) words[i] = bits_as<__m512i>(rows[i]);
    transpose_words(words);
    for (int i = 0; i < 16; ++i) rows[i] = bits_as<Float>(words[i]);
#elif defined(__AVX2__)
    __m256 some[8], pairs[8];
    for (int i = 0; i < 8; i += 2) {
        const __m256 a = bits_as<__m256>(rows[i]), b = bits_as<__m256>(rows[i + 1]);
        some[i] = _mm256_unpacklo_ps(a, b);
        some[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4) {
        pairs[i] = _mm256_shuffle_ps(some[i], some[i + 2], 0x44);
        pairs[i + 1] = _mm256_shuffle_ps(some[i], some[i + 2], 0xee);
        pairs[i + 2] = _mm256_shuffle_ps(some[i + 1], some[i + 3], 0x44);
        pairs[i + 3] = _mm256_shuffle_ps(some[i + 1], some[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = bits_as<Float>(_mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x20));
        rows[i + 4] = bits_as<Float>(_mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x31));
    }
#else
    static_assert(kLanes == 4);
    const Float a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
    const Float b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
    const Float c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    const Float d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// How elements of T are multiplied. A block is kElements of a row, which kLanes words hold; a word is unpacked to
// kParts factors, each of which is multiplied with a word of activations.
template <class T>
struct Multiplier {
    typedef Float Sum;
    static constexpr int kElements = kLanes;
    static constexpr int kParts = 1;

    static Float words(const T* from) { return load(from); }
    static Float some_words(const T* from, int64_t count) { return load_some(from, count); }
    static void unpack(Float word, Float* parts) { parts[0] = word; }
    static Float add(Float sum, Float w, const float* x) { return fused(w, splat(*x), sum); }

    // Activations: up to kElements of a row, of which `left` are, as kLanes * kParts words.
    static void hold(const T* from, int64_t left, Float* held) {
        held[0] = left >= kLanes ? load(from) : load_some(from, left);
    }
};

// The bits of kLanes words at `from`.
inline Float raw_words(const void* from) {
    Float words;
    std::memcpy(&words, from, sizeof(words));
    return words;
}

// The first `count` elements of T as bits of words, zeros behind them.
template <class T>
inline Float some_raw_words(const T* from, int64_t count) {
    T some[sizeof(Float) / sizeof(T)] = {};
    std::memcpy(some, from, count * sizeof(T));
    return raw_words(some);
}

template <>
struct Multiplier<BFloat16> {
    typedef Float Sum;
    static constexpr int kElements = 2 * kLanes;

    static Float words(const BFloat16* from) { return raw_words(from); }
    static Float some_words(const BFloat16* from, int64_t count) { return some_raw_words(from, count); }

#if defined(__AVX512BF16__)
    // Pairs are multiplied and added to float32 in one instruction.
    static constexpr int kParts = 1;

    static void unpack(Float word, Float* parts) { parts[0] = word; }
    static Float add(Float sum, Float w, const float* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof(pair));
        const auto held = bits_as<__m512bh>(_mm512_set1_epi32(pair));
        return bits_as<Float>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(w), held));
    }
    static void hold(const BFloat16* from, int64_t left, Float* held) {
        held[0] = left >= kElements ? raw_words(from) : some_raw_words(from, left);
    }
#else
    static constexpr int kParts = 2;

    static void unpack(Float word, Float* parts) {
        parts[0] = bits_as<Float>(bits_as<UInt>(word) << 16);
        parts[1] = bits_as<Float>(bits_as<UInt>(word) & 0xffff0000u);
    }
    static Float add(Float sum, Float w, const float* x) { return fused(w, splat(*x), sum); }
    static void hold(const BFloat16* from, int64_t left, Float* held) {
        held[0] = left >= kLanes ? load(from) : load_some(from, left);
        const int64_t more = left - kLanes;
        held[1] = more >= kLanes ? load(from + kLanes) : more > 0 ? load_some(from + kLanes, more) : Float{};
    }
#endif
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
