// Products of weights held in 8 bits with activations rounded to 8 bits, in exact integers.
#pragma once

#include "panels.h"
#include "target.h"
#include "zif_cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace zif {
namespace ZIF_ISA {
namespace {

// Codes of 8 bits: a word has four, and sums wrap around.
template <>
struct Multiplier<int8_t> {
    typedef Int Sum;
    static constexpr int kElements = 4 * kLanes;

    static Float words(const int8_t* from) { return raw_words(from); }
    static Float some_words(const int8_t* from, int64_t count) { return some_raw_words(from, count); }

#if defined(__AVX512VNNI__)
    // The instruction wants one factor without a sign: the weights, by adding 128. What that adds is taken off later.
    static constexpr int32_t kShift = 128;
    static constexpr int kParts = 1;

    static void unpack(Float word, Float* parts) { parts[0] = bits_as<Float>(bits_as<UInt>(word) ^ 0x80808080u); }
    static void unpack_held(Float word, Float* parts) { parts[0] = word; }
    static Int add_words(Int sum, Float w, Float x) {
        return bits_as<Int>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(w), bits_as<__m512i>(x)));
    }
#elif defined(__SSE2__)
    // A word is two pairs of codes of 16 bits: the first and the third, the second and the fourth.
    static constexpr int32_t kShift = 0;
    static constexpr int kParts = 2;
    typedef int16_t Shorts __attribute__((vector_size(ZIF_VECTOR_BYTES)));

    static void unpack(Float word, Float* parts) {
        parts[0] = bits_as<Float>(bits_as<Shorts>(word) << 8 >> 8);
        parts[1] = bits_as<Float>(bits_as<Shorts>(word) >> 8);
    }
    static void unpack_held(Float word, Float* parts) { unpack(word, parts); }
    static Int add_words(Int sum, Float w, Float x) {
#if defined(__AVX512BW__)
        return sum + bits_as<Int>(_mm512_madd_epi16(bits_as<__m512i>(w), bits_as<__m512i>(x)));
#elif defined(__AVX2__)
        return sum + bits_as<Int>(_mm256_madd_epi16(bits_as<__m256i>(w), bits_as<__m256i>(x)));
#else
        return sum + bits_as<Int>(_mm_madd_epi16(bits_as<__m128i>(w), bits_as<__m128i>(x)));
#endif
    }
#else
    static constexpr int32_t kShift = 0;
    static constexpr int kParts = 4;

    static void unpack(Float word, Float* parts) {
        for (int i = 0; i < 4; ++i) parts[i] = bits_as<Float>(bits_as<Int>(word) << (24 - 8 * i) >> 24);
    }
    static void unpack_held(Float word, Float* parts) { unpack(word, parts); }
    static Int add_words(Int sum, Float w, Float x) { return sum + bits_as<Int>(w) * bits_as<Int>(x); }
#endif

    static Int add(Int sum, Float w, const float* x) {
        return add_words(sum, w, bits_as<Float>(bits_as<int32_t>(*x) - Int{}));
    }

    // Activations: up to kElements of a row, of which `left` are, to kParts vectors.
    static void hold_parts(const int8_t* from, int64_t left, Float* parts) {
        unpack_held(left >= kElements ? words(from) : some_words(from, left), parts);
    }

    static void hold(const int8_t* from, int64_t left, Float* held) {
        Float parts[kParts];
        hold_parts(from, left, parts);
        float own[kParts][kLanes], mixed[kLanes * kParts];
        std::memcpy(own, parts, sizeof(own));
        for (int i = 0; i < kLanes * kParts; ++i) mixed[i] = own[i % kParts][i / kParts];
        std::memcpy(held, mixed, sizeof(mixed));
    }
};

namespace quantized {

typedef Multiplier<int8_t> Integers;

// A token rounded to integers: `offset` is what `kShift` added to each of its sums.
struct RoundedToken {
    float scale;
    int32_t offset;
};

// Scales and bias at the end of integer sums.
template <class T>
struct IntegerSums final : Sums<Int> {
    const RoundedToken* tokens;
    const float* scales;  // of the outputs
    const Target<T>& target;

    IntegerSums(const RoundedToken* tokens, const float* scales, const Target<T>& target)
        : tokens(tokens), scales(scales), target(target) {}

    void ask(const Range& some, int64_t output) const override { target.ask_all(some, output); }

    void put(const Range& some, int64_t output, const Int* sums, int64_t step, int64_t count) const override {
        const Float scale = count == kLanes ? load(scales + output) : load_some(scales + output, count);
        const Float bias = target.bias_of(output, count);
        for (int64_t token = some.first; token < some.last; ++token, sums += step) {
            const RoundedToken own = tokens[token];
            const Float product = __builtin_convertvector(*sums - own.offset, Float) * own.scale;
            target.put_biased(token, output, fused(product, scale, bias), count);
        }
    }
};

// Of fewest tokens rows are multiplied as they lie, and sums are added up across lanes: integers allow any order.
constexpr int kFewestTokens = 4;
static_assert(kFewestTokens <= kFewTokens, "their words are one group");

// One token's words: [blocks][parts][lanes].
inline void hold_row(const int8_t* codes, int64_t inputs, float* to) {
    for (int64_t k = 0; k < inputs; k += Integers::kElements, to += Integers::kParts * kLanes) {
        Float parts[Integers::kParts];
        Integers::hold_parts(codes + k, inputs - k, parts);
        for (int part = 0; part < Integers::kParts; ++part) store(to + part * kLanes, parts[part]);
    }
}

// One block of N rows, `inputs` apart, by M tokens, `words` apart; of it `left` codes are there, if not all.
template <int N, int M, bool kWhole>
__attribute__((always_inline)) inline void add_block(const int8_t* from, int64_t inputs, int64_t left, const float* x,
                                                     int64_t words, Int (&sums)[M][N]) {
    constexpr int kParts = Integers::kParts;
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n, from += inputs) {
        Float parts[kParts];
        Integers::unpack(kWhole ? Integers::words(from) : Integers::some_words(from, left), parts);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
            for (int part = 0; part < kParts; ++part) {
                sums[m][n] = Integers::add_words(sums[m][n], parts[part], load(x + m * words + part * kLanes));
            }
        }
    }
}

// N rows from `row` on by M tokens; `ahead` rows further is what will be read next, 0 for nothing. sums: [M][kLanes].
template <int N, int M>
inline void sum_rows(const PlainRows<int8_t>& rows, const Words& words, int64_t row, int64_t ahead, Int* sums) {
    const int64_t inputs = rows.inputs, whole = inputs / Integers::kElements;
    const int8_t* from = rows.data + row * inputs;
    const float* x = words.data;
    Int own[M][N] = {};
    for (int64_t i = 0; i < whole; ++i, from += Integers::kElements, x += Integers::kParts * kLanes) {
        if (ahead != 0) {
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) __builtin_prefetch(from + (ahead + n) * inputs);
        }
        add_block<N, M, true>(from, inputs, 0, x, words.words, own);
    }
    const int64_t left = inputs - whole * Integers::kElements;
    if (left > 0) add_block<N, M, false>(from, inputs, left, x, words.words, own);
#pragma GCC unroll 16
    for (int i = 0; i < N * M; ++i) sums[i / N * kLanes + i % N] = own[i / N][i % N];
}

// M tokens times outputs `begin` to `end` - 1. x: as `hold_row` makes it.
template <int M>
inline void multiply_as_they_lie(const PlainRows<int8_t>& rows, const Words& x, int64_t begin, int64_t end,
                                 const Sums<Int>& sink) {
    constexpr int kRows = 4;
    Int sums[M][kLanes] = {};
    for (int64_t output = begin; output < end; output += kLanes) {
        const int64_t count = end - output < kLanes ? end - output : kLanes;
        const int64_t ahead = output + 2 * kLanes <= end ? kLanes : 0;
        int64_t n = 0;
        for (; n + kRows <= count; n += kRows) sum_rows<kRows, M>(rows, x, output + n, ahead, sums[0] + n);
        for (; n < count; ++n) sum_rows<1, M>(rows, x, output + n, 0, sums[0] + n);
        for (int m = 0; m < M; ++m) {
            Float turned[kLanes];
            std::memcpy(turned, sums[m], sizeof(turned));
            transpose(turned);
            Int total = {};
            for (int i = 0; i < kLanes; ++i) total += bits_as<Int>(turned[i]);
            sink.put({m, m + 1}, output, &total, 1, count);
        }
    }
}

template <int M = kFewestTokens>
inline void multiply_fewest(const PlainRows<int8_t>& rows, const Words& x, int64_t begin, int64_t end,
                            const Sums<Int>& sink) {
    if (x.tokens == M) return multiply_as_they_lie<M>(rows, x, begin, end, sink);
    if constexpr (M > 1) multiply_fewest<M - 1>(rows, x, begin, end, sink);
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
