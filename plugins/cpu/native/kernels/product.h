// One product of activations with rows of weights, by the way that suits their number: what `linear` and `experts` share.
#pragma once

#include "dots.h"
#include "tiles.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kChunk = 32;     // outputs of a task
constexpr int64_t kPartRows = 16;  // rows that are made ready at once

inline int64_t num_chunks(int64_t outputs) { return (outputs + kChunk - 1) / kChunk; }

inline int64_t chunk_end(int64_t chunk, int64_t outputs) {
    return (chunk + 1) * kChunk < outputs ? (chunk + 1) * kChunk : outputs;
}

template <class T>
constexpr bool kHeldAsIs = sizeof(typename Multiplier<T>::Held) == sizeof(T);

#if defined(__AMX_BF16__)
// Whether products of T are made by tiles: from one token on, as reading the weights limits even that.
template <class T>
constexpr bool kTiled = kHeldAsIs<T> && sizeof(T) == 2;
#endif

// Activations x, [tokens, inputs], as a product wants them: as they are, widened, or packed for tiles.
template <class T>
class Operand {
public:
    // The memory that `tokens` rows need; 0 where they are used as they are.
    static int64_t bytes(int64_t tokens, int64_t inputs) {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return packed_bytes(tokens, inputs);
#endif
        return kHeldAsIs<T> ? 0 : tokens * inputs * 4;
    }

    // memory: 64-byte aligned, as much as `bytes` says; filled by `prepare`.
    Operand(const T* x, int64_t stride, int64_t tokens, int64_t inputs, void* memory)
        : x_(x), stride_(stride), tokens_(tokens), inputs_(inputs), memory_(memory) {}

    // Parts to be prepared, each once, in any order; 0 where there is nothing to do.
    int64_t num_parts() const {
        return bytes(tokens_, inputs_) == 0 ? 0 : (tokens_ + kPartRows - 1) / kPartRows;
    }

    void prepare(int64_t part) const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return pack_tile(x_, stride_, packed(), part);
#endif
        if constexpr (!kHeldAsIs<T>) widen(part);
    }

    // All tokens times outputs `begin` to `end` - 1 of weight, [outputs, inputs].
    void multiply(const T* weight, int64_t begin, int64_t end, const Target<T>& target) const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return multiply_by_tiles(packed(), weight, begin, end, target);
#endif
        multiply_by_dots(rows(), weight, begin, end, target);
    }

private:
    typedef typename Multiplier<T>::Held Held;

#if defined(__AMX_BF16__)
    PackedRows packed() const { return {static_cast<const uint32_t*>(memory_), tokens_, inputs_}; }
#endif

    Rows<T> rows() const {
        if constexpr (kHeldAsIs<T>) return {reinterpret_cast<const Held*>(x_), stride_, tokens_, inputs_};
        return {static_cast<const Held*>(memory_), inputs_, tokens_, inputs_};
    }

    void widen(int64_t part) const {
        const int64_t end = (part + 1) * kPartRows < tokens_ ? (part + 1) * kPartRows : tokens_;
        for (int64_t token = part * kPartRows; token < end; ++token) {
            const T* from = x_ + token * stride_;
            float* to = static_cast<float*>(memory_) + token * inputs_;
            int64_t k = 0;
            for (; k + kLanes <= inputs_; k += kLanes) store(to + k, load(from + k));
            for (; k < inputs_; ++k) to[k] = to_float(from[k]);
        }
    }

    const T* x_;
    int64_t stride_;
    int64_t tokens_;
    int64_t inputs_;
    void* memory_;
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
