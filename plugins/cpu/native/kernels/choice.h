// The next token of each row of logits: the most likely one, or one drawn after min_p, top_k and top_p.
//
// Weights are integers, floor(2**40 * likelihood), so that sums are exact in any order. Thresholds are found by digits
// of the scores, from the highest down, in place of sorting: the vocabulary is passed over three times at most.
#pragma once

#include "pool.h"
#include "simd.h"
#include "zif_cpu.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr float kWeightScale = 1099511627776.0f;  // 2**40
constexpr int kFractionBits = 62;

// A number that orders as the score does.
inline uint32_t ordered(float score) {
    const uint32_t bits = bits_as<uint32_t>(score);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What may be drawn of one row: tokens of weight above zero, rising. keys: `ordered` scores.
struct Candidates {
    uint32_t* keys;
    int32_t* tokens;
    int64_t* weights;
    int64_t count;

    static int64_t bytes(int64_t vocabulary) { return vocabulary * 16; }
    static Candidates in(void* memory, int64_t vocabulary) {
        auto* weights = static_cast<int64_t*>(memory);
        auto* keys = reinterpret_cast<uint32_t*>(weights + vocabulary);
        return {keys, reinterpret_cast<int32_t*>(keys + vocabulary), weights, 0};
    }

    int64_t total() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += weights[i];
        return sum;
    }

    // Leave out whose key is below `least`. Order stays.
    void keep(uint32_t least) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            keys[kept] = keys[i];
            tokens[kept] = tokens[i];
            weights[kept] = weights[i];
            kept += keys[i] >= least;
        }
        count = kept;
    }
};

// floor(total * fraction / 2**62).
inline int64_t share_of(int64_t total, int64_t fraction) {
    return static_cast<int64_t>(static_cast<__int128>(total) * fraction >> kFractionBits);
}

// The largest key such that the sizes of candidates with this key or a larger one reach `goal`; 0 where all together
// do not. size(i): 1 to count candidates, or their weights.
template <class Size>
inline uint32_t key_at(const Candidates& row, int64_t goal, const Size& size) {
    constexpr int kShifts[] = {21, 10, 0}, kBits[] = {11, 11, 10};
    int64_t above = 0;
    uint32_t prefix = 0;
    for (int digit = 0; digit < 3; ++digit) {
        int64_t sums[1 << 11] = {}, counts[1 << 11] = {};
        const int shift = kShifts[digit];
        const uint32_t mask = (1u << kBits[digit]) - 1;
        const uint64_t parent = uint64_t(prefix) >> kBits[digit] >> shift;
        for (int64_t i = 0; i < row.count; ++i) {
            if (digit > 0 && uint64_t(row.keys[i]) >> kBits[digit] >> shift != parent) continue;
            const uint32_t place = (row.keys[i] >> shift) & mask;
            sums[place] += size(i);
            ++counts[place];
        }
        int64_t place = mask;
        while (place >= 0 && (counts[place] == 0 || above + sums[place] < goal)) above += sums[place--];
        if (place < 0) return 0;
        prefix |= static_cast<uint32_t>(place) << shift;
    }
    return prefix;
}

// The largest element, NaN where there is one, and its first place.
struct Peak {
    float value;
    int64_t place;
};

inline Peak peak_of(const float* row, int64_t count) {
    constexpr int64_t kPart = 64 * kLanes;
    float largest = -__builtin_inff();
    int64_t first = 0;
    for (int64_t begin = 0; begin < count; begin += kPart) {
        const int64_t end = begin + kPart < count ? begin + kPart : count;
        Float top = splat(-__builtin_inff());
        Int missing = {};
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Float values = load(row + i);
            missing |= values != values;
            top = max(values, top);
        }
        float part = max_of(top);
        bool absent = false;
        for (int lane = 0; lane < kLanes; ++lane) absent |= missing[lane] != 0;
        for (; i < end; ++i) {
            absent |= row[i] != row[i];
            part = row[i] > part ? row[i] : part;
        }
        if (absent) return {__builtin_nanf(""), 0};
        if (part > largest) {
            largest = part;
            first = begin;
        }
    }
    while (largest > -__builtin_inff() && row[first] != largest) ++first;
    return {largest, first};
}

class Choice {
public:
    Choice(const zif_cpu_choice& call, int64_t row, void* memory)
        : call_(call), row_(row), logits_(call.logits + row * call.stride),
          candidates_(Candidates::in(memory, call.vocabulary)) {}

    void run() {
        const Peak peak = peak_of(logits_, call_.vocabulary);
        call_.peaks[row_] = peak.value;
        call_.tokens[row_] = peak.place;
        const bool finite = peak.value - peak.value == 0.0f;
        if (finite && call_.temperature[row_] > 0.0f) call_.tokens[row_] = draw(peak.value);
    }

private:
    int64_t draw(float peak) {
        collect(peak);
        const int64_t top_k = call_.top_k[row_];
        if (top_k < candidates_.count) candidates_.keep(key_at(candidates_, top_k, [](int64_t) { return 1; }));
        if (const double top_p = call_.top_p[row_]; top_p < 1.0) {
            const auto share = static_cast<int64_t>(top_p * 4611686018427387904.0);  // 2**62
            const int64_t goal = share_of(candidates_.total(), share);
            candidates_.keep(key_at(candidates_, goal, [this](int64_t i) { return candidates_.weights[i]; }));
        }
        const int64_t goal = share_of(candidates_.total(), call_.fractions[row_]);
        int64_t running = 0;
        for (int64_t i = 0; i < candidates_.count; ++i) {
            running += candidates_.weights[i];
            if (running > goal) return candidates_.tokens[i];
        }
        return candidates_.tokens[candidates_.count - 1];  // not reached: fractions are below 1
    }

    // Gather what min_p leaves of the tokens whose weight is not zero. The most likely token is always among them.
    void collect(float peak) {
        const float temperature = call_.temperature[row_], least = call_.min_p[row_];
        for (int64_t begin = 0; begin < call_.vocabulary; begin += kLanes) {
            const int64_t left = call_.vocabulary - begin;
            const int64_t lanes = left < kLanes ? left : kLanes;
            const Float values = lanes == kLanes ? load(logits_ + begin) : load_some(logits_ + begin, lanes);
            const Float scores = (values - peak) / temperature;
            float likelihoods[kLanes], keys[kLanes];
            store(likelihoods, exp(scores));
            store(keys, scores);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const auto weight = static_cast<int64_t>(likelihoods[lane] * kWeightScale);
                candidates_.keys[candidates_.count] = ordered(keys[lane] + 0.0f);
                candidates_.tokens[candidates_.count] = static_cast<int32_t>(begin + lane);
                candidates_.weights[candidates_.count] = weight;
                candidates_.count += weight > 0 && likelihoods[lane] >= least;
            }
        }
    }

    const zif_cpu_choice& call_;
    int64_t row_;
    const float* logits_;
    Candidates candidates_;
};

void choose(const zif_cpu_choice* call) {
    parallel_for(call->rows, [&](int64_t row, int thread) {
        Choice(*call, row, scratch(thread, 0, Candidates::bytes(call->vocabulary + 1))).run();
    });
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
