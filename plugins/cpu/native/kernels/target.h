// Where the sums of products go.
#pragma once

#include "simd.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// Some of a product's tokens, or outputs: first to last - 1.
struct Range {
    int64_t first;
    int64_t last;

    int64_t count() const { return last - first; }
};

// Element (token, output) goes to y[token * stride + output], after the bias is added.
template <class T>
struct Target {
    T* y;
    int64_t stride;
    const T* bias;          // by output, or null
    float* wide = nullptr;  // takes them in place of y, if not null, as they were summed

    // The bias of `count` outputs from `output` on, at most a vector's; zeros where there is none.
    Float bias_of(int64_t output, int64_t count) const {
        if (bias == nullptr) return Float{};
        return count == kLanes ? load(bias + output) : load_some(bias + output, count);
    }

    void put_some(int64_t token, int64_t output, Float values, int64_t count) const {
        if (bias != nullptr) values += bias_of(output, count);
        put_biased(token, output, values, count);
    }

    // The same of values that have their bias.
    void put_biased(int64_t token, int64_t output, Float values, int64_t count) const {
        const int64_t at = token * stride + output;
        if (wide != nullptr) store_vector(wide + at, values, count);
        else store_vector(y + at, values, count);
    }

    const void* place(int64_t token, int64_t output) const {
        const int64_t at = token * stride + output;
        return wide != nullptr ? static_cast<const void*>(wide + at) : y + at;
    }

    // Ask the caches for where a token's outputs from `output` on go.
    void ask(int64_t token, int64_t output) const { __builtin_prefetch(place(token, output), 1, 3); }

    void ask_all(const Range& tokens, int64_t output) const {
        for (int64_t token = tokens.first; token < tokens.last; ++token) ask(token, output);
    }

private:
    template <class Y>
    static void store_vector(Y* to, Float values, int64_t count) {
        if (count == kLanes) store(to, values);
        else store_some(to, values, count);
    }
};

// Where a product's sums go. Known at run time, so that those of quantized weights are not compiled for each dtype; as
// such a call takes its time, the sums of some tokens go at once: of `count` outputs, at most a vector's, and each
// token's are `step` vectors behind those of the token before.
template <class Sum>
struct Sums {
    virtual void ask(const Range& tokens, int64_t output) const = 0;
    virtual void put(const Range& tokens, int64_t output, const Sum* sums, int64_t step, int64_t count) const = 0;
};

template <class T>
struct FloatSums final : Sums<Float> {
    const Target<T>& target;

    explicit FloatSums(const Target<T>& target) : target(target) {}

    void ask(const Range& tokens, int64_t output) const override { target.ask_all(tokens, output); }

    void put(const Range& tokens, int64_t output, const Float* sums, int64_t step, int64_t count) const override {
        for (int64_t token = tokens.first; token < tokens.last; ++token, sums += step) {
            target.put_some(token, output, *sums, count);
        }
    }
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
