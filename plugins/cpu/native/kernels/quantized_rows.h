// Activations made ready for weights held as integers: rounded to 8 bits, token by token, or widened to float32.
#pragma once

#include <cmath>

#include "quantized_floats.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

constexpr float kCodeLimit = 127.0f;

inline Float magnitude(Float value) { return bits_as<Float>(bits_as<UInt>(value) & 0x7fffffffu); }

// The largest magnitude of a row; NaN where an element is not finite.
template <class T>
inline float largest(const T* x, int64_t count) {
    Float most = {}, poison = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Float some = load(x + k);
        most = max(magnitude(some), most);
        poison += some * 0.0f;
    }
    if (k < count) {
        const Float some = load_some(x + k, count - k);
        most = max(magnitude(some), most);
        poison += some * 0.0f;
    }
    return max_of(most) + sum(poison);
}

// Round to the nearest integer, ties to even, within +-127. Small enough numbers lose their fraction by an addition.
inline Int rounded(Float value) {
    const Float limited = max(min(value, splat(kCodeLimit)), splat(-kCodeLimit));
    return bits_as<Int>(limited + 12582912.0f) - 0x4b400000;  // 1.5 * 2**23
}

inline void store_codes(int8_t* to, Int codes) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits_as<__m512i>(codes)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(codes[i]);
#endif
}

inline void store_codes(int16_t* to, Int codes) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits_as<__m512i>(codes)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int16_t>(codes[i]);
#endif
}

// Round one row to codes, with zeros behind them up to `width`, a multiple of kLanes. Returns its scale and the sum of
// its codes. The scale is NaN, and codes are zeros, where an element is not finite.
template <class T, class Code>
inline IntegerRows::Token round_row(const T* x, int64_t count, Code* codes, int64_t width) {
    const float most = largest(x, count), scale = most / kCodeLimit;
    if (!(scale > 0.0f)) {
        std::memset(codes, 0, width * sizeof(Code));
        return {scale, 0};
    }
    Int total = {};
    for (int64_t k = 0; k < width; k += kLanes) {
        const int64_t left = count - k;
        const Float some = left >= kLanes ? load(x + k) : left > 0 ? load_some(x + k, left) : Float{};
        const Int own = rounded(some / scale);
        total += own;
        store_codes(codes + k, own);
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += total[i];
    return {scale, sum};
}

// One row in float32 in the order of `Layout`.
template <class T>
inline void widen_row(const T* x, const Layout& layout, float* to) {
    for (int64_t group = 0; group < layout.groups; ++group, x += layout.runs * layout.run) {
        for (int64_t step = 0; step < layout.steps; ++step) {
            const int64_t left = layout.run - step * kLanes;
            for (int run = 0; run < layout.runs; ++run, to += kLanes) {
                const T* from = x + run * layout.run + step * kLanes;
                store(to, left >= kLanes ? load(from) : load_some(from, left));
            }
        }
    }
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
