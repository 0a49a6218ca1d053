// Products of all tokens of a call, plain or gated, with weights of any kind: y = x @ weight.T + bias.
#pragma once

#include "gated.h"
#include "pool.h"
#include "product.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// Make activations ready, in pieces: multiply(product, first token). call: x, x_stride, tokens.
template <class Product, class Call, class Multiply>
inline void for_pieces(const Call& call, const typename Product::Weight& weight, const Multiply& multiply) {
    const int64_t most = Product::at_once(weight, call.tokens);
    for (int64_t first = 0; first < call.tokens; first += most) {
        const int64_t count = call.tokens - first < most ? call.tokens - first : most;
        void* const memory = scratch(0, 0, Product::bytes(weight, count));
        const auto* x = static_cast<const typename Product::Element*>(call.x) + first * call.x_stride;
        const Product product(x, call.x_stride, count, weight, memory);
        parallel_for(product.num_parts(), [&](int64_t part, int thread) { product.prepare(part, thread); });
        multiply(product, first);
    }
}

// Call multiply(block of tokens, outputs, thread) for all blocks and outputs, `chunk` of these at a time.
template <class Multiply>
inline void for_chunks(int64_t outputs, int64_t chunk, int64_t blocks, const Multiply& multiply) {
    parallel_for((outputs + chunk - 1) / chunk * blocks, [&](int64_t task, int thread) {
        const int64_t begin = task / blocks * chunk;
        multiply(task % blocks, Range{begin, begin + chunk < outputs ? begin + chunk : outputs}, thread);
    });
}

// wide: whether y is float32 whatever the dtype of x is.
template <class Product, class Call>
inline void linear_of(const Call& call, const typename Product::Weight& weight, bool wide) {
    typedef typename Product::Element T;
    const int64_t outputs = weight.outputs;
    for_pieces<Product>(call, weight, [&](const Product& product, int64_t first) {
        const int64_t begin = first * outputs;
        float* sums = wide ? static_cast<float*>(call.y) + begin : nullptr;
        const Target<T> target = {static_cast<T*>(call.y) + begin, outputs, static_cast<const T*>(call.bias), sums};
        for_chunks(outputs, product.chunk(outputs), product.num_blocks(),
                   [&](int64_t block, const Range& range, int thread) {
                       product.multiply(block, range, target, thread);
                   });
    });
}

template <class Product, class Call>
inline void gated_linear_of(const Call& call, const typename Product::Weight& weight, int32_t activation) {
    typedef typename Product::Element T;
    const int64_t inner = weight.outputs / 2;
    for_pieces<Product>(call, weight, [&](const Product& product, int64_t first) {
        const Gated<T> gated = {static_cast<T*>(call.y) + first * inner, inner, static_cast<const T*>(call.bias),
                                activation};
        for_chunks(inner, product.chunk(inner), product.num_blocks(),
                   [&](int64_t block, const Range& range, int thread) {
                       gated.multiply(product, block, range, thread);
                   });
    });
}

template <class T>
inline PlainWeight<T> weight_of(const zif_cpu_product& call) {
    return {static_cast<const T*>(call.weight), call.outputs, call.inputs};
}

#if defined(ZIF_COMPACTS)
inline CompactWeight compact_of(const zif_cpu_product& call) { return {call.compact, call.outputs, call.inputs}; }
#endif

void linear(const zif_cpu_product* call) {
#if defined(ZIF_COMPACTS)
    if (call->compact != nullptr) {
        return linear_of<RowProduct<CompactWeight>>(*call, compact_of(*call), call->wide != 0);
    }
#endif
    const auto multiply = [&](auto element) {
        typedef decltype(element) T;
        linear_of<PlainProduct<T>>(*call, weight_of<T>(*call), call->wide != 0);
    };
    switch (call->dtype) {
        case ZIF_FLOAT32: return multiply(float());
        case ZIF_BFLOAT16: return multiply(BFloat16());
        case ZIF_FLOAT16: return multiply(Float16());
    }
}

void gated_linear(const zif_cpu_gated_product* call) {
#if defined(ZIF_COMPACTS)
    if (call->product.compact != nullptr) {
        return gated_linear_of<RowProduct<CompactWeight>>(call->product, compact_of(call->product), call->activation);
    }
#endif
    const auto multiply = [&](auto element) {
        typedef decltype(element) T;
        gated_linear_of<PlainProduct<T>>(call->product, weight_of<T>(call->product), call->activation);
    };
    switch (call->product.dtype) {
        case ZIF_FLOAT32: return multiply(float());
        case ZIF_BFLOAT16: return multiply(BFloat16());
        case ZIF_FLOAT16: return multiply(Float16());
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
