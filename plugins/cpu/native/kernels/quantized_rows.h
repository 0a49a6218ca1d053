// Activations rounded to 8 bits, token by token.
#pragma once

#include <cmath>

#include "quantized_integers.h"

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

// Round one row to codes, with zeros behind them up to `width`, a multiple of kLanes. The scale is NaN, and codes
// are zeros, where an element is not finite.
template <class T>
inline RoundedToken round_row(const T* x, int64_t count, int8_t* codes, int64_t width) {
    const float most = largest(x, count), scale = most / kCodeLimit;
    if (!(scale > 0.0f)) {
        std::memset(codes, 0, width);
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
    return {scale, sum * Integers::kShift};
}

// Round the tokens of a group to words. x: its first token; tokens: of the group; codes: memory for their rows.
template <class T>
inline void round_group(const T* x, int64_t stride, int64_t inputs, const Words& to, int64_t group,
                        RoundedToken* tokens, int8_t* codes) {
    const int64_t width = rounded_up(inputs, kLanes);
    for (int64_t i = 0; i < to.width(group); ++i) {
        tokens[i] = round_row(x + i * stride, inputs, codes + i * width, width);
    }
    if (to.tokens > kFewestTokens) return hold_group(codes, width, inputs, to, group);
    for (int64_t i = 0; i < to.tokens; ++i) hold_row(codes + i * width, inputs, to.data + i * to.words);
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
