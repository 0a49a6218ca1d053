// Vectors of the width that the instruction set has, in the compiler's own notation, and the dtypes that they load.
//
// Everything is in the namespace of the instruction set and is used within one translation unit: the same function
// compiled for another set must never be taken by the linker in its place.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__F16C__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int kLanes = ZIF_VECTOR_BYTES / 4;  // float32 elements of a vector

typedef float Float __attribute__((vector_size(ZIF_VECTOR_BYTES)));
typedef int32_t Int __attribute__((vector_size(ZIF_VECTOR_BYTES)));
typedef uint32_t UInt __attribute__((vector_size(ZIF_VECTOR_BYTES)));
typedef uint16_t Half __attribute__((vector_size(ZIF_VECTOR_BYTES / 2)));  // as many 16-bit words as floats

// Elements as they lie in memory. They are only loaded and stored.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Float splat(float value) { return value - Float{}; }

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

inline Float load(const float* from) {
    Float vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline Float load(const BFloat16* from) {
    // GCC 12 widens by halves where an instruction widens all.
#if defined(__AVX512F__)
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bits_as<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
#elif defined(__AVX2__)
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bits_as<Float>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
#else
    Half words;
    std::memcpy(&words, from, sizeof(words));
    return bits_as<Float>(__builtin_convertvector(words, UInt) << 16);
#endif
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

// Through the compiler's own type: by instruction where there is one, else by its runtime.
inline float to_float(Float16 value) { return static_cast<float>(bits_as<_Float16>(value.bits)); }

inline Float load(const Float16* from) {
#if defined(__AVX512F__)
    return bits_as<Float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return bits_as<Float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Float vector;
    for (int i = 0; i < kLanes; ++i) vector[i] = to_float(from[i]);
    return vector;
#endif
}

inline void store(float* to, Float vector) { std::memcpy(to, &vector, sizeof(vector)); }

// Round to nearest, ties to even; what is no number stays none.
inline void store(BFloat16* to, Float vector) {
#if defined(__AVX512BF16__)
    // The instruction takes what is below the normal range for zero.
    const __m512 wide = bits_as<__m512>(vector);
    if (__builtin_expect(_mm512_fpclass_ps_mask(wide, 0x20) == 0, 1)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(_mm512_cvtneps_pbh(wide)));
        return;
    }
#endif
    const UInt bits = bits_as<UInt>(vector);
    const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UInt quiet = (bits >> 16) | 0x40;
    const UInt words = vector == vector ? rounded : quiet;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits_as<__m512i>(words)));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(bits_as<__m256i>(words), bits_as<__m256i>(words));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
    const Half narrow = __builtin_convertvector(words, Half);
    std::memcpy(to, &narrow, sizeof(narrow));
#endif
}

inline void store(Float16* to, Float vector) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bits_as<__m512>(vector), 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bits_as<__m256>(vector), 0));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = bits_as<Float16>(static_cast<_Float16>(vector[i]));
#endif
}

inline void store_one(float* to, float value) { *to = value; }

inline void store_one(BFloat16* to, float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

inline void store_one(Float16* to, float value) { *to = bits_as<Float16>(static_cast<_Float16>(value)); }

// The first `count` elements, zeros behind them; 0 <= count < kLanes.
template <class T>
inline Float load_some(const T* from, int64_t count) {
    T some[kLanes] = {};
    std::memcpy(some, from, count * sizeof(T));
    return load(some);
}

template <class T>
inline void store_some(T* to, Float vector, int64_t count) {
    T some[kLanes];
    store(some, vector);
    std::memcpy(to, some, count * sizeof(T));
}

// The value as an element of T has it.
template <class T>
inline Float rounded_to(Float vector) {
    T some[kLanes];
    store(some, vector);
    return load(some);
}

template <>
inline Float rounded_to<float>(Float vector) { return vector; }

inline float sum(Float vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(bits_as<__m512>(vector));
#else
    // By halves, so that the compiler keeps it in registers; the order of additions is fixed.
    float lanes[kLanes];
    std::memcpy(lanes, &vector, sizeof(lanes));
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
#endif
}

// a * b + c, rounded once where the processor can: left to the compiler, one loop might do it and another not.
inline Float fused(Float a, Float b, Float c) {
#if defined(__AVX512F__)
    return bits_as<Float>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
    return bits_as<Float>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
    return c + a * b;
#endif
}

inline Float max(Float a, Float b) { return a > b ? a : b; }  // b where either is no number

inline Float min(Float a, Float b) { return a < b ? a : b; }

inline float max_of(Float vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(bits_as<__m512>(vector));
#else
    float largest = vector[0];
    for (int i = 1; i < kLanes; ++i) largest = largest > vector[i] ? largest : vector[i];
    return largest;
#endif
}

// e to the x: within 2 units in the last place; 0 below -104, infinity above 88.8, NaN for NaN.
// Reduction by multiples of ln 2 in two parts, then the polynomial of Cephes' expf.
inline Float exp(Float x) {
    const Float clamped = max(min(x, splat(89.0f)), splat(-104.0f));
    const Float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer: 1.5 * 2**23
    const Float n = shifted - 12582912.0f;
    const Float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Float p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two factors, so that results below the normal range are rounded, not lost.
    const Int exponent = __builtin_convertvector(n, Int);
    const Int half = exponent >> 1;
    const Float low = bits_as<Float>((half + 127) << 23), high = bits_as<Float>((exponent - half + 127) << 23);
    return x == x ? p * low * high : x;
}

// 1 / (1 + e to the -x).
inline Float sigmoid(Float x) { return 1.0f / (1.0f + exp(-x)); }

inline Float tanh(Float x) {
    const Float small = x * x;
    // Near zero the difference of exponentials would lose digits: the odd series to x**7 there.
    const Float series = x * (1.0f + small * (-0.333333333f + small * (0.133333333f + small * -0.0539682540f)));
    const Float e = exp(max(min(x, splat(10.0f)), splat(-10.0f)) * 2.0f);
    const Float whole = x == x ? (e - 1.0f) / (e + 1.0f) : x;
    return small < 0.04f ? series : whole;
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
