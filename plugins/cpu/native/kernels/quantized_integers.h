// Inner products of weights held in 8 bits with activations rounded to 8 bits, in exact integers.
#pragma once

#include "target.h"
#include "zif_cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

constexpr int kPanel = 16;  // outputs whose sums are finished together
constexpr int kTokens = 4;  // tokens of a tile

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Sums of a panel: [tokens of a tile][outputs of a panel].
template <class Element>
struct alignas(64) PanelSums {
    Element at[kTokens][kPanel];
};

// How codes of 8 bits are multiplied: x is held as `Held`, `kStep` codes go at once, in sums that wrap around.
#if defined(__AVX512VNNI__)
struct Integers {
    typedef int8_t Held;
    typedef __m512i Sum;
    static constexpr int kStep = 64;
    // The instruction wants one factor without a sign: the weights, by adding 128. What that adds is taken off later.
    static constexpr int32_t kShift = 128;

    static Sum zero() { return _mm512_setzero_si512(); }
    static __m512i shifted(__m512i codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
    static __m512i codes(const int8_t* from) { return shifted(_mm512_loadu_si512(from)); }
    static __m512i some_codes(const int8_t* from, int64_t count) {
        return shifted(_mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, from));
    }
    static Sum add(Sum sum, __m512i w, const int8_t* x) {
        return _mm512_dpbusd_epi32(sum, w, _mm512_loadu_si512(x));
    }
#elif defined(__AVX512BW__)
struct Integers {
    typedef int16_t Held;
    typedef __m512i Sum;
    static constexpr int kStep = 32;
    static constexpr int32_t kShift = 0;

    static Sum zero() { return _mm512_setzero_si512(); }
    static __m512i codes(const int8_t* from) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static __m512i some_codes(const int8_t* from, int64_t count) {
        return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << count) - 1, from));
    }
    static Sum add(Sum sum, __m512i w, const int16_t* x) {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(w, _mm512_loadu_si512(x)));
    }
#elif defined(__AVX2__)
struct Integers {
    typedef int16_t Held;
    typedef __m256i Sum;
    static constexpr int kStep = 16;
    static constexpr int32_t kShift = 0;

    static Sum zero() { return _mm256_setzero_si256(); }
    static __m256i codes(const int8_t* from) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Sum add(Sum sum, __m256i w, const int16_t* x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
    }
#elif defined(__SSE2__)
struct Integers {
    typedef int16_t Held;
    typedef __m128i Sum;
    static constexpr int kStep = 8;
    static constexpr int32_t kShift = 0;

    static Sum zero() { return _mm_setzero_si128(); }
    static __m128i codes(const int8_t* from) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    }
    static Sum add(Sum sum, __m128i w, const int16_t* x) {
        return _mm_add_epi32(sum, _mm_madd_epi16(w, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
    }
#else
struct Integers {
    typedef int16_t Held;
    typedef Int Sum;
    static constexpr int kStep = kLanes;
    static constexpr int32_t kShift = 0;
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

    static Sum zero() { return Sum{}; }
    static Sum codes(const int8_t* from) {
        Bytes bytes;
        std::memcpy(&bytes, from, sizeof(bytes));
        return __builtin_convertvector(bytes, Int);
    }
    static Sum add(Sum sum, Sum w, const int16_t* x) {
        Shorts shorts;
        std::memcpy(&shorts, x, sizeof(shorts));
        return sum + w * __builtin_convertvector(shorts, Int);
    }
#endif
#if !defined(__AVX512BW__)
    static auto some_codes(const int8_t* from, int64_t count) {
        int8_t some[kStep] = {};
        std::memcpy(some, from, count);
        return codes(some);
    }
#endif
};

inline int32_t total(const Integers::Sum& sum) {
    uint32_t lanes[sizeof(sum) / 4];
    std::memcpy(lanes, &sum, sizeof(lanes));
    uint32_t all = 0;
    for (const uint32_t lane : lanes) all += lane;
    return static_cast<int32_t>(all);
}

// The totals of 4 sums, to to[0..3].
inline void put_totals(const Integers::Sum* sums, int32_t* to) {
#if defined(__AVX512BW__)
    const auto folded = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i low = folded(sums[0], sums[1]), high = folded(sums[2], sums[3]);
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), one);
#else
    for (int i = 0; i < 4; ++i) to[i] = total(sums[i]);
#endif
}

// Rows of activations rounded to integers; `offset` of a token is what `kShift` added to each of its sums.
struct IntegerRows {
    struct Token {
        float scale;
        int32_t offset;
    };
    const Token* tokens;
    const Integers::Held* codes;  // [tokens, stride], zeros behind the inputs
    int64_t stride;
    int64_t inputs;
};

// N outputs for M tokens. w: the first output's row; `ahead` bytes further is what will be read next, 0 for nothing.
// sums: of the first output and token.
template <int N, int M>
inline void integer_tile(const IntegerRows& x, const int8_t* w, int64_t token, int64_t ahead, int32_t* sums) {
    const Integers::Held* rows = x.codes + token * x.stride;
    Integers::Sum held[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) held[m][n] = Integers::zero();
    }
    int64_t k = 0;
    for (; k + Integers::kStep <= x.inputs; k += Integers::kStep) {
        for (int n = 0; n < N; ++n) {
            if (ahead != 0) __builtin_prefetch(w + n * x.inputs + k + ahead);
            const auto codes = Integers::codes(w + n * x.inputs + k);
            for (int m = 0; m < M; ++m) held[m][n] = Integers::add(held[m][n], codes, rows + m * x.stride + k);
        }
    }
    if (k < x.inputs) {
        for (int n = 0; n < N; ++n) {
            const auto codes = Integers::some_codes(w + n * x.inputs + k, x.inputs - k);
            for (int m = 0; m < M; ++m) held[m][n] = Integers::add(held[m][n], codes, rows + m * x.stride + k);
        }
    }
    for (int m = 0; m < M; ++m) {
        if constexpr (N % 4 == 0) {
            for (int n = 0; n < N; n += 4) put_totals(held[m] + n, sums + m * kPanel + n);
        } else {
            for (int n = 0; n < N; ++n) sums[m * kPanel + n] = total(held[m][n]);
        }
    }
}

// A panel of `count` outputs for M tokens.
template <int M>
inline void integer_panel(const IntegerRows& x, const int8_t* w, int64_t token, int64_t count, int64_t ahead,
                          int32_t* sums) {
    constexpr int kOutputs = M == 1 && ZIF_VECTOR_BYTES == 64 ? 8 : 4;
    int64_t n = 0;
    for (; n + kOutputs <= count; n += kOutputs) integer_tile<kOutputs, M>(x, w + n * x.inputs, token, ahead, sums + n);
    for (; n < count; ++n) integer_tile<1, M>(x, w + n * x.inputs, token, 0, sums + n);
}

// A whole vector of results.
template <class T>
inline void store_row(T* to, Float row) {
    store(to, row);
}

#if defined(__AVX512BF16__)
template <>
inline void store_row(BFloat16* to, Float row) {
    const __m256i words = bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(row)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
}
#endif

// Scales and bias at the end of integer sums: `count` outputs from `output` on of one token.
template <class T>
inline void put_integers(const int32_t* sums, int64_t count, IntegerRows::Token own, const float* scales,
                         int64_t token, int64_t output, const Target<T>& target) {
    T* y = target.y + token * target.stride + output;
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        Int part;
        std::memcpy(&part, sums + i, sizeof(part));
        const Float product = __builtin_convertvector(part - own.offset, Float) * own.scale;
        if (left >= kLanes) {
            const Float bias = target.bias == nullptr ? Float{} : load(target.bias + output + i);
            store_row(y + i, product * load(scales + output + i) + bias);
        } else {
            const Float bias = target.bias == nullptr ? Float{} : load_some(target.bias + output + i, left);
            store_some(y + i, product * load_some(scales + output + i, left) + bias, left);
        }
    }
}

// All tokens times outputs `begin` to `end` - 1.
template <class T>
void multiply_integers(const IntegerRows& x, int64_t tokens, const zif_cpu_quantized& weight, int64_t begin,
                       int64_t end, const Target<T>& target) {
    const auto* codes = static_cast<const int8_t*>(weight.codes);
    PanelSums<int32_t> sums = {};
    for (int64_t output = begin; output < end; output += kPanel) {
        const int64_t count = end - output < kPanel ? end - output : kPanel;
        const int8_t* w = codes + output * x.inputs;
        for (int64_t token = 0; token < tokens; token += kTokens) {
            const int64_t some = tokens - token < kTokens ? tokens - token : kTokens;
            const int64_t ahead = token == 0 && output + 2 * kPanel <= end ? kPanel * x.inputs : 0;
            switch (some) {
                case 4: integer_panel<4>(x, w, token, count, ahead, sums.at[0]); break;
                case 3: integer_panel<3>(x, w, token, count, ahead, sums.at[0]); break;
                case 2: integer_panel<2>(x, w, token, count, ahead, sums.at[0]); break;
                case 1: integer_panel<1>(x, w, token, count, ahead, sums.at[0]); break;
            }
            for (int64_t m = 0; m < some; ++m) {
                put_integers(sums.at[m], count, x.tokens[token + m], weight.scales, token + m, output, target);
            }
        }
    }
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
