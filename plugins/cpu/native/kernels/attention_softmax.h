// The softmax of attention: what scores of some query rows become over a split of keys, and the merging of splits.
#pragma once

#include <type_traits>

#include "attention_rows.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kKeyStep = 32;                     // visible keys are rounded to it: products of tiles take as many
constexpr int64_t kScoreStride = kSplitKeys + 16;    // of a row, elements; not a power of two: rows share no cache sets
constexpr int64_t kWeightStride = kSplitKeys + 32;   // the same, of bfloat16
constexpr float kLowest = -3.402823466e+38f;         // not -infinity: the difference of two of them is no number
constexpr float kLog2e = 1.44269504088896341f;
constexpr int64_t kSoftenRows = 16;  // that become weights together: their scores stay in the first cache

// 2 to the x, below 2**127; 0 below 2**-126, NaN for NaN, 1 for 0: what nobody sees changes nothing. By coarse
// coefficients within 3e-6, else 2e-7: minimax polynomials of the relative error between -1/2 and 1/2.
template <bool kCoarse>
inline Float exp2(Float x) {
#if defined(__AVX512F__)
    // What an integer leaves of x, and that integer; to round first and subtract then takes one operation more.
    const Float f = bits_as<Float>(_mm512_reduce_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m512 exponent = bits_as<__m512>(x - f);
#else
    const Float held = max(min(x, splat(127.0f)), splat(-127.0f));
    const Float n = (held + 12582912.0f) - 12582912.0f;  // rounds to an integer: 1.5 * 2**23
    const Float f = held - n;
#endif
    Float p;
    if constexpr (kCoarse) {
        p = splat(9.582806818e-03f);
        p = p * f + 5.590642694e-02f;
        p = p * f + 2.402409939e-01f;
        p = p * f + 6.931241937e-01f;
    } else {
        p = splat(1.326466545e-03f);
        p = p * f + 9.671512607e-03f;
        p = p * f + 5.550733893e-02f;
        p = p * f + 2.402224209e-01f;
        p = p * f + 6.931469775e-01f;
    }
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return bits_as<Float>(_mm512_maskz_scalef_ps(kept, bits_as<__m512>(p), exponent));
#else
    const Int exponent = __builtin_convertvector(n, Int);
    const Float scaled = bits_as<Float>(bits_as<Int>(p) + (exponent << 23));
    return x < -126.0f ? Float{} : x == x ? scaled : x;
#endif
}

// Some rows' softmax so far. maximum: of logits times log2 e, [rows]; total: [rows]; weighted: [rows, width], values
// times weights.
struct Softmax {
    float* maximum;
    float* total;
    float* weighted;

    Softmax(float* memory, int64_t rows)
        : maximum(memory), total(memory + rounded_up(rows, 16)), weighted(memory + 2 * rounded_up(rows, 16)) {}

    struct Row {
        float& maximum;
        float& total;
    };

    Row of(int64_t row) const { return {maximum[row], total[row]}; }

    static int64_t size(int64_t rows, int64_t width) { return rows * width + 2 * rounded_up(rows, 16); }

    // Not inlined: the compiler may fuse either product with the sum, and all who merge must get the same.
    __attribute__((noinline)) void merge(const Softmax& next, int64_t rows, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float before = maximum[row], after = next.maximum[row];
            const float raised = before > after ? before : after;
            const float kept = exp2<false>(splat(before - raised))[0], added = exp2<false>(splat(after - raised))[0];
            maximum[row] = raised;
            total[row] = total[row] * kept + next.total[row] * added;
            float* sums = weighted + row * width;
            const float* more = next.weighted + row * width;
            for (int64_t i = 0; i < width; i += kLanes) store(sums + i, load(sums + i) * kept + load(more + i) * added);
        }
    }
};

// How scores become weights. `factor` makes a score a logit times log2 e, after `scale` and `softcap`, if any.
struct Scaling {
    bool scaled;  // scale is in the factor: the largest score is the largest logit
    float factor;
    float scale;
    float softcap;        // 0: none
    const float* keys;    // [kSplitKeys], scales of the keys' codes, or null
    const float* values;  // the same of the values

    static Scaling of(float scale, float softcap, const float* keys, const float* values) {
        const bool scaled = softcap <= 0 && scale > 0;
        return {scaled, scaled ? scale * kLog2e : kLog2e, scale, softcap, keys, values};
    }

    void apply(float* scores, int64_t from, int64_t to) const {
        if (keys == nullptr && scaled) return;
        for (int64_t i = from; i < to; i += kLanes) {
            Float some = load(scores + i);
            if (keys != nullptr) some *= load(keys + i);
            if (!scaled) some *= scale;
            if (softcap > 0) some = softcap * tanh(some / softcap);
            store(scores + i, some);
        }
    }
};

// The keys of a split that one row sees, first - last - 1, of those that some row sees: from - to - 1.
struct Seen {
    int64_t first;
    int64_t last;
    int64_t from;  // these two are multiples of kKeyStep
    int64_t to;
};

inline Float shown(Float some, int64_t at, const Seen& seen, float hidden) {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Int after = lane >= static_cast<int32_t>(seen.first - at);
    const Int before = lane < static_cast<int32_t>(seen.last - at);
    return (after & before) != 0 ? some : splat(hidden);
}

// The largest of a row's scores that it sees; what is no number is passed over.
inline float largest_of(const float* scores, const Seen& seen) {
    Float some = splat(kLowest), others = some;
    const auto edge = [&](int64_t at) { some = max(shown(load(scores + at), at, seen, kLowest), some); };
    const int64_t end = seen.last / kLanes * kLanes;
    int64_t at = rounded_up(seen.first, kLanes);
    if (at > seen.first) edge(at - kLanes);
    for (; at + kLanes < end; at += 2 * kLanes) {  // two chains of dependent maxima
        some = max(load(scores + at), some);
        others = max(load(scores + at + kLanes), others);
    }
    if (at < end) some = max(load(scores + at), some);
    if (end < seen.last && end >= seen.first) edge(end);
    return max_of(max(some, others));
}

// Put a row's weights, 2 * kLanes: as they are, or rounded to bfloat16.
inline void put_weights(float* to, Float low, Float high) {
    store(to, low);
    store(to + kLanes, high);
}
#if defined(__AVX512BF16__)
inline void put_weights(BFloat16* to, Float low, Float high) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(bits_as<__m512>(high), bits_as<__m512>(low));
    _mm512_storeu_si512(to, bits_as<__m512i>(pairs));
}
#endif

// Make a row's scores final but for the factor. Returns the largest, times the factor.
inline float find_largest(float* scores, const Seen& seen, const Scaling& scaling) {
    scaling.apply(scores, seen.first / kLanes * kLanes, seen.last);
    return largest_of(scores, seen) * scaling.factor;
}

// Turn a row's scores into weights, e to the (logit - maximum); 0 for keys that it does not see. row: its maximum is
// what `find_largest` returned.
template <class W>
inline void soften(const float* scores, W* weights, const Seen& seen, const Scaling& scaling, const Softmax::Row& row) {
    const Float factor = splat(scaling.factor), largest = splat(row.maximum);
    const float* scales = scaling.values;
    Float sums = {};
    const auto weigh = [&](int64_t at, bool whole) {
        Float some = exp2<sizeof(W) == 2>(load(scores + at) * factor - largest);
        if (!whole) some = shown(some, at, seen, 0.0f);
        sums += some;
        if (scales == nullptr) return some;
        some *= load(scales + at);
        return whole ? some : shown(some, at, seen, 0.0f);
    };
    for (int64_t at = seen.from; at < seen.to; at += 2 * kLanes) {
        const bool whole = at >= seen.first && at + 2 * kLanes <= seen.last;
        Float low = {}, high = {};
        if (whole) {
            low = weigh(at, true);
            high = weigh(at + kLanes, true);
        } else if (at + 2 * kLanes > seen.first && at < seen.last) {
            low = weigh(at, false);
            high = weigh(at + kLanes, false);
        }
        put_weights(weights + at, low, high);
    }
    row.total = sum(sums);
    // Of no key no sum: its product with another maximum must be zero.
    if (!(seen.first < seen.last && row.maximum > kLowest)) row.maximum = kLowest;
}

// The same of some rows. Their maxima before their weights: a row's weights then wait for nothing, and rows overlap.
template <class W>
inline void soften_rows(float* scores, W* weights, const Seen* seen, int64_t rows, const Scaling& scaling,
                        const Softmax& softmax) {
    constexpr int64_t kStride = std::is_same_v<W, float> ? kScoreStride : kWeightStride;
    for (int64_t first = 0; first < rows; first += kSoftenRows) {
        const int64_t end = smaller(rows, first + kSoftenRows);
        for (int64_t row = first; row < end; ++row) {
            softmax.maximum[row] = find_largest(scores + row * kScoreStride, seen[row], scaling);
        }
        for (int64_t row = first; row < end; ++row) {
            soften(scores + row * kScoreStride, weights + row * kStride, seen[row], scaling, softmax.of(row));
        }
    }
}

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
