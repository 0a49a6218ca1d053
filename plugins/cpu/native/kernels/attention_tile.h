// What attention does to a few query rows and keys: dot products, softmax, values times weights. `attention.h` has the
// whole.
#pragma once

#include "simd.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kScoreStride = 256 + 16;  // of a row: kSplitKeys, and whole vectors may be loaded from any key on
constexpr int64_t kAheadKeys = 16;          // how far ahead keys and values are asked for
constexpr float kLowest = -3.402823466e+38f;  // not -infinity: the difference of two of them is no number
constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// A vector, in a loop.
template <class T>
inline Float load_whole(const T* from) {
    return load(from);
}

#if defined(__AVX512F__)
// By one instruction: the compiler makes four of the conversion and as many of a mask that is all ones.
inline Float load_whole(const BFloat16* from) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bits_as<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
#endif

// The first `count` elements, zeros behind them, in a loop: by mask where there are masks.
template <class T>
inline Float load_tail(const T* from, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return bits_as<Float>(_mm512_maskz_loadu_ps(mask, from));
    T some[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(some), _mm256_maskz_loadu_epi16(mask, from));
    return load_whole(some);
#else
    return load_some(from, count);
#endif
}

// How a step of a dot product takes elements of T. `Query` is what the query is kept as.
template <class T>
struct Dot {
    typedef float Query;
    typedef Float Vector;
    static constexpr int64_t kStep = kLanes;

    static Vector query(const Query* from) { return load(from); }
    static Vector key(const T* from) { return load_whole(from); }
    static Vector key_tail(const T* from, int64_t count) { return load_tail(from, count); }
    static Float add(Float sums, Vector query, Vector key) { return sums + query * key; }

    static void keep(const T* from, Query* to, int64_t head_dim) {
        for (int64_t i = 0; i < head_dim; ++i) to[i] = to_float(from[i]);
    }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
    typedef BFloat16 Query;
    typedef __m512bh Vector;
    static constexpr int64_t kStep = 32;

    static Vector query(const Query* from) { return key(from); }
    static Vector key(const BFloat16* from) { return bits_as<Vector>(_mm512_loadu_si512(from)); }
    static Vector key_tail(const BFloat16* from, int64_t count) {
        return bits_as<Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
    }
    static Float add(Float sums, Vector query, Vector key) {
        return bits_as<Float>(_mm512_dpbf16_ps(bits_as<__m512>(sums), query, key));
    }

    static void keep(const BFloat16* from, Query* to, int64_t head_dim) {
        std::memcpy(to, from, head_dim * sizeof(BFloat16));
    }
};
#endif

template <int... kLane>
struct Lanes {};
#if ZIF_VECTOR_BYTES == 64
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif ZIF_VECTOR_BYTES == 32
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3> AllLanes;
#endif

// Lanes whose number has no bit kWidth: a's two sums of lanes kWidth apart; the others: b's.
template <int kWidth, int... kLane>
inline Float halved(Float a, Float b, Lanes<kLane...>) {
    return __builtin_shufflevector(a, b, (kLane & kWidth ? kLane + kLanes : kLane)...) +
           __builtin_shufflevector(a, b, (kLane & kWidth ? (kLane ^ kWidth) + kLanes : kLane ^ kWidth)...);
}

// Lane i of the result is the sum of vectors[i], each summed in the same order. [2 * kWidth], overwritten.
template <int kWidth>
inline Float sums_of(Float* vectors) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) vectors[i] = halved<kWidth>(vectors[i], vectors[i + kWidth], AllLanes());
    if constexpr (kWidth > 1) return sums_of<kWidth / 2>(vectors);
    return vectors[0];
}

// Dot products of kRows queries and kLanes / kRows keys, in this order. kAsk: ask for keys ahead; evenly, because a
// burst of requests holds up the loads behind it.
template <class T, int kRows, bool kAsk>
inline Float dots(const typename Dot<T>::Query* query, int64_t query_stride, const T* keys, const int64_t* offsets,
                  int64_t head_dim) {
    constexpr int kKeys = kLanes / kRows;
    Float sums[kLanes] = {};
    int64_t at = 0;
    for (; at + Dot<T>::kStep <= head_dim; at += Dot<T>::kStep) {
        typename Dot<T>::Vector some[kRows];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) some[row] = Dot<T>::query(query + row * query_stride + at);
#pragma GCC unroll 16
        for (int key = 0; key < kKeys; ++key) {
            const auto vector = Dot<T>::key(keys + offsets[key] + at);
            if constexpr (kAsk) __builtin_prefetch(keys + offsets[key + kAheadKeys] + at, 0, 2);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                sums[row * kKeys + key] = Dot<T>::add(sums[row * kKeys + key], some[row], vector);
            }
        }
    }
    if (at < head_dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            const auto vector = Dot<T>::key_tail(keys + offsets[i % kKeys] + at, head_dim - at);
            sums[i] = Dot<T>::add(sums[i], Dot<T>::query(query + i / kKeys * query_stride + at), vector);
        }
    }
    return sums_of<kLanes / 2>(sums);
}

// weighted[row] += weights[row] @ values, of kVectors vectors of kRows rows; `tail`: elements of a last part, or 0.
template <class T, int kRows, int kVectors, bool kAsk>
inline void add_values(const float* weights, const T* values, const int64_t* offsets, int64_t count, float* weighted,
                       int64_t width, int64_t tail) {
    Float sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVectors; ++i) {
        sums[i / kVectors][i % kVectors] = load(weighted + i / kVectors * width + i % kVectors * kLanes);
    }
    for (int64_t key = 0; key < count; ++key) {
        const T* value = values + offsets[key];
        Float some[kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (kAsk) __builtin_prefetch(values + offsets[key + kAheadKeys] + i * kLanes, 0, 2);
            some[i] = kVectors == 1 && tail > 0 ? load_tail(value, tail) : load_whole(value + i * kLanes);
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Float weight = splat(weights[row * kScoreStride + key]);
#pragma GCC unroll 16
            for (int i = 0; i < kVectors; ++i) sums[row][i] += weight * some[i];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVectors; ++i) {
        store(weighted + i / kVectors * width + i % kVectors * kLanes, sums[i / kVectors][i % kVectors]);
    }
}

// Some rows' softmax so far. maximum, total: [rows]; weighted: [rows, width], values times weights.
struct Softmax {
    float* maximum;
    float* total;
    float* weighted;

    Softmax(float* memory, int64_t rows) : maximum(memory), total(memory + rows), weighted(memory + 2 * rows) {}

    static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }

    void merge(const Softmax& next, int64_t rows, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float before = maximum[row], after = next.maximum[row];
            const float raised = before > after ? before : after;
            const float kept = exp(splat(before - raised))[0], added = exp(splat(after - raised))[0];
            maximum[row] = raised;
            total[row] = total[row] * kept + next.total[row] * added;
            float* sums = weighted + row * width;
            const float* more = next.weighted + row * width;
            for (int64_t i = 0; i < width; i += kLanes) store(sums + i, load(sums + i) * kept + load(more + i) * added);
        }
    }
};

// scale, then cap. Whole vectors are written, as below.
inline void make_logits(float* scores, int64_t count, float scale, float softcap) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Float some = load(scores + i) * scale;
        store(scores + i, softcap > 0 ? softcap * tanh(some / softcap) : some);
    }
}

// Turn scores into weights, e to the (score - maximum). Whole vectors are written: up to kLanes - 1 behind the last.
inline void soften(float* scores, int64_t count, float* maximum, float* total) {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    Float largest = splat(kLowest), sums = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Float some = lane < static_cast<int32_t>(count - i) ? load(scores + i) : splat(kLowest);
        largest = max(some, largest);
    }
    *maximum = max_of(largest);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Float weights = exp(load(scores + i) - *maximum);
        const Float some = lane < static_cast<int32_t>(count - i) ? weights : Float{};
        store(scores + i, some);
        sums += some;
    }
    *total = sum(sums);
}

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
