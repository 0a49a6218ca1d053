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
inline void linear_of(const zif_cpu_product& call) {
    // In pieces, so that memory is bounded; a piece has as many tokens as make reading the weights cheap.
    const int64_t inputs = call.inputs, outputs = call.outputs;
    const int64_t most = kOperandBytes / (4 * inputs), piece = most < 512 ? 512 : most / 512 * 512;
    for (int64_t first = 0; first < call.tokens; first += piece) {
        const int64_t count = call.tokens - first < piece ? call.tokens - first : piece;
        void* const memory = scratch(0, 0, Operand<T>::bytes(count, inputs));
        const T* x = static_cast<const T*>(call.x) + first * call.x_stride;
        const Operand<T> operand(x, call.x_stride, count, inputs, memory);
        const int64_t begin = first * outputs;
        float* wide = call.wide ? static_cast<float*>(call.y) + begin : nullptr;
        const Target<T> target = {static_cast<T*>(call.y) + begin, outputs, static_cast<const T*>(call.bias), wide};
        const bool many = Operand<T>::many(count);
        const int64_t chunk = many ? large_chunk(outputs, operand.num_blocks()) : few_chunk(outputs);
        multiply_rows(operand, static_cast<const T*>(call.weight), outputs, target, chunk);
    }
}

void linear(const zif_cpu_product* call) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return linear_of<float>(*call);
        case ZIF_BFLOAT16: return linear_of<BFloat16>(*call);
        case ZIF_FLOAT16: return linear_of<Float16>(*call);
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
