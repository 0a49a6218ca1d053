// Products with weights as they lie in a checkpoint: y = x @ weight.T + bias.
#pragma once

#include "pool.h"
#include "product.h"

namespace zif {
namespace ZIF_ISA {
namespace {

template <class T>
inline void linear_of(const void* x, int64_t x_stride, const void* weight, const void* bias, void* y, int64_t tokens,
                      int64_t inputs, int64_t outputs) {
    void* const memory = scratch(0, 0, Operand<T>::bytes(tokens, inputs));
    const Operand<T> operand(static_cast<const T*>(x), x_stride, tokens, inputs, memory);
    const Target<T> target = {static_cast<T*>(y), outputs, static_cast<const T*>(bias)};
    parallel_for(operand.num_parts(), [&](int64_t part, int) { operand.prepare(part); });
    parallel_for(num_chunks(outputs), [&](int64_t chunk, int) {
        operand.multiply(static_cast<const T*>(weight), chunk * kChunk, chunk_end(chunk, outputs), target);
    });
}

void linear(const void* x, int64_t x_stride, const void* weight, const void* bias, void* y, int64_t tokens,
            int64_t inputs, int64_t outputs, int32_t dtype) {
    switch (dtype) {
        case ZIF_FLOAT32: return linear_of<float>(x, x_stride, weight, bias, y, tokens, inputs, outputs);
        case ZIF_BFLOAT16: return linear_of<BFloat16>(x, x_stride, weight, bias, y, tokens, inputs, outputs);
        case ZIF_FLOAT16: return linear_of<Float16>(x, x_stride, weight, bias, y, tokens, inputs, outputs);
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
