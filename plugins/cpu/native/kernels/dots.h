// Inner products of rows of weights with rows of activations: the way to multiply where there are no matrix
// instructions, or too few tokens for them. Both lie row by row, so neither is packed.
#pragma once

#include "simd.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// How elements of T are multiplied. x is held as `Held`; `kStep` elements go at once.
template <class T>
struct Multiplier {
    typedef float Held;
    typedef Float Words;
    static constexpr int kStep = kLanes;

    template <class U>
    static Float words(const U* from) { return load(from); }
    template <class U>
    static Float some_words(const U* from, int64_t count) { return load_some(from, count); }
    static Float add(Float sum, Float w, Float x) { return sum + w * x; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 are multiplied and added to float32 in one instruction.
template <>
struct Multiplier<BFloat16> {
    typedef BFloat16 Held;
    typedef __m512i Words;
    static constexpr int kStep = 32;

    static __m512i words(const BFloat16* from) { return _mm512_loadu_si512(from); }
    static __m512i some_words(const BFloat16* from, int64_t count) {
        return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
    }
    static Float add(Float sum, __m512i w, __m512i x) {
        return bits_as<Float>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(w), bits_as<__m512bh>(x)));
    }
};
#endif

// Rows of activations as `Multiplier` wants them. stride counts elements of Held.
template <class T>
struct Rows {
    const typename Multiplier<T>::Held* data;
    int64_t stride;
    int64_t tokens;
    int64_t inputs;
};

// Where products go: element (token, output) to y[token * stride + output], after the bias is added.
template <class T>
struct Target {
    T* y;
    int64_t stride;
    const T* bias;  // by output, or null

    void put(int64_t token, int64_t output, float value) const {
        store_one(y + token * stride + output, bias == nullptr ? value : value + to_float(bias[output]));
    }
};

// N outputs from `output` on, for M tokens from `token` on.
template <class T, int N, int M>
inline void dot_tile(const Rows<T>& x, const T* weight, int64_t token, int64_t output, const Target<T>& target) {
    typedef Multiplier<T> Mul;
    const T* w = weight + output * x.inputs;
    const typename Mul::Held* rows = x.data + token * x.stride;
    Float sums[N][M] = {};
    int64_t k = 0;
    for (; k + Mul::kStep <= x.inputs; k += Mul::kStep) {
        typename Mul::Words held[M];
        for (int m = 0; m < M; ++m) held[m] = Mul::words(rows + m * x.stride + k);
        for (int n = 0; n < N; ++n) {
            const auto words = Mul::words(w + n * x.inputs + k);
            for (int m = 0; m < M; ++m) sums[n][m] = Mul::add(sums[n][m], words, held[m]);
        }
    }
    if (const int64_t rest = x.inputs - k; rest > 0) {
        for (int m = 0; m < M; ++m) {
            const auto held = Mul::some_words(rows + m * x.stride + k, rest);
            for (int n = 0; n < N; ++n) {
                sums[n][m] = Mul::add(sums[n][m], Mul::some_words(w + n * x.inputs + k, rest), held);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int m = 0; m < M; ++m) target.put(token + m, output + n, sum(sums[n][m]));
    }
}

// As many accumulators as registers hold beside the operands.
constexpr int kTileOutputs = ZIF_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kTileTokens = 4;
constexpr int kAloneOutputs = ZIF_VECTOR_BYTES == 64 ? 8 : 4;

template <class T, int M>
inline void dot_column(const Rows<T>& x, const T* weight, int64_t token, int64_t output, int64_t end,
                       const Target<T>& target) {
    constexpr int kOutputs = M == 1 ? kAloneOutputs : kTileOutputs;
    for (; output + kOutputs <= end; output += kOutputs) {
        dot_tile<T, kOutputs, M>(x, weight, token, output, target);
    }
    for (; output < end; ++output) dot_tile<T, 1, M>(x, weight, token, output, target);
}

// All tokens times outputs `begin` to `end` - 1. A token's result depends on no other token: the order of its sum is
// that of the inputs, whatever the tile.
template <class T>
void multiply_by_dots(const Rows<T>& x, const T* weight, int64_t begin, int64_t end, const Target<T>& target) {
    // A few rows of weights at a time: they stay in the first cache while all tokens pass.
    constexpr int64_t kPanel = 2 * kAloneOutputs;
    for (int64_t output = begin; output < end; output += kPanel) {
        const int64_t stop = output + kPanel < end ? output + kPanel : end;
        int64_t token = 0;
        for (; token + kTileTokens <= x.tokens; token += kTileTokens) {
            dot_column<T, kTileTokens>(x, weight, token, output, stop, target);
        }
        switch (x.tokens - token) {
            case 3: dot_column<T, 3>(x, weight, token, output, stop, target); break;
            case 2: dot_column<T, 2>(x, weight, token, output, stop, target); break;
            case 1: dot_column<T, 1>(x, weight, token, output, stop, target); break;
        }
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
