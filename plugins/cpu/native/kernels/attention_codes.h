// Products of attention in integers, for few queries on a cache of codes: codes are multiplied as they lie.
//
// Query rows and weights are split in two parts of 8 bits, so that no bit of a code is lost and few of the others.
// Sums are exact: they depend on no order (Intel, Architecture Instruction Set Extensions Programming Reference,
// VPDPBUSD).
#pragma once

#include "attention_plan.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

// Whether few queries of T are multiplied with a cache of C in integers. A float32 has more digits than two parts.
template <class T, class C>
#if defined(__AVX512VNNI__)
constexpr bool kByIntegers = std::is_same_v<T, BFloat16> && std::is_same_v<C, Int8>;
#else
constexpr bool kByIntegers = false;
#endif

// Some keys' values: from is a multiple of kKeyStep, to of 4; rows behind the last key may be any. coming: as
// many rows that are asked for meanwhile.
struct ValueCodes {
    const char* const* rows;
    const char* const* coming;
    int64_t from;
    int64_t to;
    int64_t head_dim;
};

#if defined(__AVX512VNNI__)

constexpr int64_t kCodes = 64;               // of a vector
constexpr float kQueryParts = 127.0f * 128;  // the largest query: 128 * high + low, both signed
constexpr float kWeightParts = 65535.0f;     // the largest weight: 256 * high + low, both unsigned

// A query row in integers times `unit`: parts of 64 elements, high before low, one after the other.
struct SplitRow {
    float unit;
    int32_t correction[kLanes];  // -128 * the sum of each lane's elements: codes are made unsigned by adding 128

    static int64_t size(int64_t head_dim) { return 128 + 2 * rounded_up(head_dim, kCodes); }
    const char* parts() const { return reinterpret_cast<const char*>(this) + 128; }
    char* parts() { return reinterpret_cast<char*>(this) + 128; }
};

// sums + each four of `bytes`, unsigned, times those of `codes`, signed. GCC 12 copies sums around the intrinsic.
inline void add_fours(__m512i& sums, __m512i bytes, __m512i codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "vm"(codes));
}

inline __m512i load_codes(const void* from, int64_t left) {
    return left >= kCodes ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << left) - 1, from);
}

template <class T>
inline void split_query(const T* from, int64_t head_dim, SplitRow& row) {
    Float largest = {}, spoiled = {};
    for (int64_t at = 0; at < head_dim; at += kLanes) {
        const Float some = widened(from + at, head_dim - at);
        spoiled += some - some;
        largest = max(max(some, -some), largest);
    }
    row.unit = max_of(largest) / kQueryParts + sum(spoiled);
    const Float divisor = splat(row.unit > 0 ? row.unit : 1.0f);
    std::memset(row.parts(), 0, SplitRow::size(head_dim) - 128);
    for (int64_t at = 0; at < head_dim; at += kLanes) {
        // Below the normal range the unit is too coarse: held, so that parts have their bits.
        const Float ratio = widened(from + at, head_dim - at) / divisor, most = splat(kQueryParts);
        const __m512i whole = _mm512_cvtps_epi32(bits_as<__m512>(max(min(ratio, most), -most)));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
        char* part = row.parts() + at / kCodes * (2 * kCodes) + at % kCodes;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(part), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(part + kCodes), _mm512_cvtepi32_epi8(low));
    }
    __m512i high = _mm512_setzero_si512(), low = high;
    for (int64_t at = 0; at < head_dim; at += kCodes) {
        const __m512i by = _mm512_set1_epi8(static_cast<char>(128));
        add_fours(high, by, _mm512_loadu_si512(row.parts() + 2 * at));
        add_fours(low, by, _mm512_loadu_si512(row.parts() + 2 * at + kCodes));
    }
    const __m512i sums = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
    _mm512_storeu_si512(row.correction, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
}

// A key's sums with kRows split rows, `bytes` apart. kSteps: vectors of a key, or 0 for as many as head_dim has.
template <int kRows, int kSteps>
__attribute__((always_inline)) inline void add_key(const char* query, int64_t bytes, const char* key,
                                                   int64_t head_dim, __m512i (*sums)[2]) {
    const auto add = [&](int64_t at, int64_t left) {
        const __m512i some = _mm512_xor_si512(load_codes(key + at, left), _mm512_set1_epi8(static_cast<char>(128)));
#pragma GCC unroll 8
        for (int part = 0; part < 2 * kRows; ++part) {
            const auto* row = reinterpret_cast<const SplitRow*>(query + part / 2 * bytes);
            const char* parts = row->parts() + 2 * at + part % 2 * kCodes;
            add_fours(sums[part / 2][part % 2], some, _mm512_loadu_si512(parts));
        }
    };
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) add(step * kCodes, kCodes);
    for (int64_t at = 0; kSteps == 0 && at < head_dim; at += kCodes) add(at, head_dim - at);
}

// Put the scores of kRows split rows, `bytes` apart, and kLanes / kRows keys. coming: rows to ask for meanwhile,
// or null.
template <int kRows, int kSteps>
inline void score_codes(const char* query, int64_t bytes, const char* const* keys, const char* const* coming,
                        int64_t head_dim, float* scores) {
    constexpr int kKeys = kLanes / kRows;
    const auto row_of = [&](int row) { return reinterpret_cast<const SplitRow*>(query + row * bytes); };
    Float all[kLanes];
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
        for (int64_t at = 0; coming != nullptr && at < head_dim; at += 64) __builtin_prefetch(coming[key] + at, 0, 2);
        __m512i sums[kRows][2];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            sums[row][0] = _mm512_setzero_si512(), sums[row][1] = _mm512_loadu_si512(row_of(row)->correction);
        }
        add_key<kRows, kSteps>(query, bytes, keys[key], head_dim, sums);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums[row][0], 7), sums[row][1]);
            all[row * kKeys + key] = bits_as<Float>(_mm512_cvtepi32_ps(sum));
        }
    }
    float each[kLanes];
    store(each, sums_of<kLanes / 2>(all));
    for (int i = 0; i < kRows; ++i) {
        const float unit = row_of(i)->unit;
        for (int key = 0; key < kKeys; ++key) scores[i * kScoreStride + key] = each[i * kKeys + key] * unit;
    }
}

// Split a row's weights of keys from - to - 1, multiples of 16: [2, kSplitKeys], high before low. Returns their unit.
inline float split_weights(const float* weights, int64_t from, int64_t to, uint8_t* parts) {
    Float most = {}, spoiled = {};
    for (int64_t at = from; at < to; at += kLanes) {
        const Float some = load(weights + at);
        spoiled += some - some;
        most = max(some, most);
    }
    const float unit = max_of(most) / kWeightParts + sum(spoiled);
    const Float divisor = splat(unit > 0 ? unit : 1.0f);
    for (int64_t at = from; at < to; at += kLanes) {
        const Float some = min(load(weights + at) / divisor, splat(kWeightParts));
        const __m512i whole = _mm512_cvtps_epi32(bits_as<__m512>(some));
        const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)), low = _mm512_cvtepi32_epi8(whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(parts + at), high);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(parts + kSplitKeys + at), low);
    }
    return unit;
}

// Four keys' codes of 64 elements, side by side: of each 16 elements the first vector has 0 - 3, and so on.
inline void unpack_codes(const char* const* rows, int64_t at, int64_t left, __m512i* vectors) {
    __m512i lying[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) lying[i] = load_codes(rows[i] + at, left);
    const __m512i low = _mm512_unpacklo_epi8(lying[0], lying[1]), others = _mm512_unpacklo_epi8(lying[2], lying[3]);
    const __m512i high = _mm512_unpackhi_epi8(lying[0], lying[1]), rest = _mm512_unpackhi_epi8(lying[2], lying[3]);
    vectors[0] = _mm512_unpacklo_epi16(low, others), vectors[1] = _mm512_unpackhi_epi16(low, others);
    vectors[2] = _mm512_unpacklo_epi16(high, rest), vectors[3] = _mm512_unpackhi_epi16(high, rest);
}

// Put the sums of a row's vectors, as `unpack_codes` leaves them, in order.
inline void put_sums(const __m512i* high, const __m512i* low, float unit, int64_t left, float* weighted) {
    float each[4][kLanes];
    for (int i = 0; i < 4; ++i) {
        const Float some = bits_as<Float>(_mm512_cvtepi32_ps(high[i])) * 256.0f;
        store(each[i], (some + bits_as<Float>(_mm512_cvtepi32_ps(low[i]))) * unit);
    }
    for (int64_t at = 0; at < smaller(left, kCodes); at += kLanes) {
        for (int i = 0; i < 4; ++i) std::memcpy(weighted + at + i * 4, each[i] + at / 4, 4 * sizeof(float));
    }
}

// weighted[row] = weights[row] @ values, of kRows rows. parts: [kRows, 2, kSplitKeys].
template <int kRows>
inline void add_codes(const ValueCodes& values, const uint8_t* parts, const float* units, float* weighted,
                      int64_t width) {
    for (int64_t at = 0; at < values.head_dim; at += kCodes) {
        const int64_t left = values.head_dim - at;
        __m512i sums[2 * kRows][4];
#pragma GCC unroll 32
        for (int i = 0; i < 8 * kRows; ++i) sums[i / 4][i % 4] = _mm512_setzero_si512();
        for (int64_t key = values.from; key < values.to; key += 4) {
            __m512i some[4];
            unpack_codes(values.rows + key, at, left, some);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) __builtin_prefetch(values.coming[key - values.from + i] + at, 0, 2);
#pragma GCC unroll 16
            for (int part = 0; part < 2 * kRows; ++part) {
                int32_t weights;
                std::memcpy(&weights, parts + part * kSplitKeys + key, sizeof(weights));
                const __m512i four = _mm512_set1_epi32(weights);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) add_fours(sums[part][i], four, some[i]);
            }
        }
        for (int row = 0; row < kRows; ++row) {
            put_sums(sums[2 * row], sums[2 * row + 1], units[row], left, weighted + row * width + at);
        }
    }
}

#endif

// Query rows and weights of a task in integers.
template <class T>
struct SplitRows {
#if defined(__AVX512VNNI__)
    int64_t head_dim;
    int64_t bytes;  // of a query row
    char* query;
    uint8_t* weights;  // [rows, 2, kSplitKeys]
    float* units;      // [rows], of the weights

    void place(Pieces& pieces, int64_t rows, int64_t channels) {
        head_dim = channels, bytes = SplitRow::size(channels);
        query = pieces.take<char>(rows * bytes);
        weights = pieces.take<uint8_t>(rows * 2 * kSplitKeys);
        units = pieces.take<float>(rows);
    }

    void keep(const T* from, int64_t row) const {
        split_query(from, head_dim, *reinterpret_cast<SplitRow*>(query + row * bytes));
    }

    // As `score_codes`. The first rows ask for the lines of `coming`.
    template <int kRows>
    void score(int64_t row, const char* const* keys, const char* const* coming, float* scores) const {
        const auto by = head_dim == 2 * kCodes ? score_codes<kRows, 2> : score_codes<kRows, 0>;
        by(query + row * bytes, bytes, keys, row == 0 ? coming : nullptr, head_dim, scores);
    }

    // Values of keys that a row does not see have weights of zero. scores: weights, [rows, kScoreStride].
    void add(const ValueCodes& values, const float* scores, int64_t rows, float* weighted, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* parts = weights + row * 2 * kSplitKeys;
            const int64_t to = rounded_up(values.to, kLanes);
            units[row] = split_weights(scores + row * kScoreStride, values.from, to, parts);
        }
        by_rows<2>(0, rows, [&](int64_t row, auto count) {
            const uint8_t* parts = weights + row * 2 * kSplitKeys;
            add_codes<count.value>(values, parts, units + row, weighted + row * width, width);
        });
    }
#endif
};

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
