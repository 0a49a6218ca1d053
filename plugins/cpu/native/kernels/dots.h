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

// The sum of the lanes of each of kLanes vectors, added as `sum` adds them: halves, then their halves.
inline Float sum_each(const Float* vectors) {
#if defined(__AVX512F__)
    __m512 some[16];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = bits_as<__m512>(vectors[2 * i]), b = bits_as<__m512>(vectors[2 * i + 1]);
        some[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = some[2 * i], b = some[2 * i + 1];
        some[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(some[2 * i]), b = _mm512_castps_pd(some[2 * i + 1]);
        some[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    const __m512 low = _mm512_shuffle_ps(some[0], some[1], 0x88), high = _mm512_shuffle_ps(some[0], some[1], 0xdd);
    // Vector 4 * i + j is now at 4 * j + i.
    const __m512i places = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return bits_as<Float>(_mm512_permutexvar_ps(places, _mm512_add_ps(low, high)));
#elif defined(__AVX2__)
    __m256 some[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 a = bits_as<__m256>(vectors[2 * i]), b = bits_as<__m256>(vectors[2 * i + 1]);
        some[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    for (int i = 0; i < 2; ++i) {
        const __m256d a = _mm256_castps_pd(some[2 * i]), b = _mm256_castps_pd(some[2 * i + 1]);
        some[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
    const __m256 low = _mm256_shuffle_ps(some[0], some[1], 0x88), high = _mm256_shuffle_ps(some[0], some[1], 0xdd);
    // Vector 2 * i + j is now at 4 * j + i.
    const __m256i places = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    return bits_as<Float>(_mm256_permutevar8x32_ps(_mm256_add_ps(low, high), places));
#else
    Float each = {};
    for (int i = 0; i < kLanes; ++i) each[i] = sum(vectors[i]);
    return each;
#endif
}

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
    const T* bias;          // by output, or null
    float* wide = nullptr;  // takes them in place of y, if not null, as they were summed

    // `count` outputs from `output` on, at most a vector's.
    void put_some(int64_t token, int64_t output, Float values, int64_t count) const {
        if (bias != nullptr) values += count == kLanes ? load(bias + output) : load_some(bias + output, count);
        const int64_t at = token * stride + output;
        if (wide != nullptr) store_vector(wide + at, values, count);
        else store_vector(y + at, values, count);
    }

    void put(int64_t token, int64_t output, float value) const {
        if (bias != nullptr) value += to_float(bias[output]);
        const int64_t at = token * stride + output;
        if (wide != nullptr) wide[at] = value;
        else store_one(y + at, value);
    }

private:
    template <class Y>
    static void store_vector(Y* to, Float values, int64_t count) {
        if (count == kLanes) store(to, values);
        else store_some(to, values, count);
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
