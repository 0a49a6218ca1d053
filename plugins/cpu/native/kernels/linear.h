// Products with weights as they lie in a checkpoint: y = x @ weight.T + bias.
#pragma once

#include "pool.h"
#include "product.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kOperandBytes = 64 << 20;  // of activations made ready at once

template <class T>
inline void multiply_rows(const Operand<T>& operand, const T* weight, int64_t outputs, const Target<T>& target,
                          int64_t chunk) {
    parallel_for(operand.num_parts(), [&](int64_t part, int) { operand.prepare(part); });
    const int64_t blocks = operand.num_blocks();
    parallel_for((outputs + chunk - 1) / chunk * blocks, [&](int64_t task, int thread) {
        const int64_t begin = task / blocks * chunk, end = begin + chunk < outputs ? begin + chunk : outputs;
        operand.multiply(task % blocks, weight, begin, end, target, thread);
    });
}

template <class T>
inline void linear_of(const void* x, int64_t x_stride, const void* weight, const void* bias, void* y, int64_t tokens,
                      int64_t inputs, int64_t outputs) {
    // In pieces, so that memory is bounded; a piece has as many tokens as make reading the weights cheap.
    const int64_t most = kOperandBytes / (4 * inputs), piece = most < 512 ? 512 : most / 512 * 512;
    for (int64_t first = 0; first < tokens; first += piece) {
        const int64_t count = tokens - first < piece ? tokens - first : piece;
        void* const memory = scratch(0, 0, Operand<T>::bytes(count, inputs));
        const Operand<T> operand(static_cast<const T*>(x) + first * x_stride, x_stride, count, inputs, memory);
        const Target<T> target = {static_cast<T*>(y) + first * outputs, outputs, static_cast<const T*>(bias)};
        const bool many = Operand<T>::many(count, inputs);
        const int64_t chunk = many ? large_chunk(outputs, operand.num_blocks()) : kChunk;
        multiply_rows(operand, static_cast<const T*>(weight), outputs, target, chunk);
    }
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
