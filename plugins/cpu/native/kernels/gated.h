// Gated products, y = f(x @ gate.T) * (x @ up.T): both for a part of the outputs at a time, and gated where the second
// cache still has them.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "pool.h"
#include "target.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kGatedBytes = 512 << 10;  // of a part, unless the fewest outputs need more
constexpr int64_t kGatedStep = 32;          // outputs of a part are a multiple of it

// Where a gated product goes.
template <class T>
struct Gated {
    T* y;  // [tokens, inner]
    int64_t inner;  // outputs, half the rows of the weight
    const T* bias;  // [2 * inner], or null
    int32_t activation;

    // One block of the product's tokens and some of the outputs, in parts.
    template <class Product>
    void multiply(const Product& product, int64_t block, const Range& outputs, int thread) const {
        const Range tokens = product.tokens_of(block);
        const int64_t held = kGatedBytes / (2 * tokens.count() * int64_t(sizeof(T))) / kGatedStep * kGatedStep;
        const int64_t step = std::max(held, kGatedStep);
        for (int64_t first = outputs.first; first < outputs.last; first += step) {
            const Range part = {first, std::min(first + step, outputs.last)};
            multiply_part(product, block, part, thread);
        }
    }

private:
    static constexpr int64_t kPadding = 64 / sizeof(T);  // rows share no cache sets

    // A thread holds [tokens, gates before what they gate], rounded to T as `gated_activation` reads it.
    template <class Product>
    void multiply_part(const Product& product, int64_t block, const Range& outputs, int thread) const {
        const Range tokens = product.tokens_of(block);
        const int64_t count = outputs.count(), stride = 2 * count + kPadding;
        T* memory = static_cast<T*>(scratch(thread, 5, tokens.count() * stride * sizeof(T)));
        for (const int64_t half : {int64_t(0), inner}) {
            const Range rows = {half + outputs.first, half + outputs.last};
            // Column 0, or `count`, of the memory is row rows.first of the weight.
            T* first = memory + (half > 0 ? count : 0) - tokens.first * stride - rows.first;
            product.multiply(block, rows, Target<T>{first, stride, bias}, thread);
        }
        for (int64_t token = tokens.first; token < tokens.last; ++token, memory += stride) {
            gate_row(memory, memory + count, y + token * inner + outputs.first, count, activation);
        }
    }
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
