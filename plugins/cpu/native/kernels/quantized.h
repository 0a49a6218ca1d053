// Products with weights held as integers, as they lie in a checkpoint.
#pragma once

#include "pool.h"
#include "product.h"
#include "quantized_decoded.h"
#include "quantized_rows.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

enum class Way { kIntegers, kFloats, kIntegerTiles, kDecodedTiles };

#if defined(__AMX_INT8__)
constexpr int64_t kIntegersTokens = 4;  // up to as many tokens sums of integers go by vectors
#endif

// How a product is made. That of integers is exact, so there the number of tokens may choose; it must not elsewhere.
template <class T>
inline Way way_of(const zif_cpu_quantized& weight, [[maybe_unused]] int64_t tokens) {
#if defined(__AMX_INT8__)
    if (weight.dynamic_activations && tokens > kIntegersTokens) return Way::kIntegerTiles;
    if (!weight.dynamic_activations && kTiled<T> && weight.group % kTileInputs == 0) return Way::kDecodedTiles;
#endif
    return weight.dynamic_activations ? Way::kIntegers : Way::kFloats;
}

// One weight of a stack.
inline zif_cpu_quantized entry(zif_cpu_quantized weight, int64_t index) {
    const int64_t rows = index * weight.outputs, groups = weight.inputs / weight.group;
    weight.codes = static_cast<const uint8_t*>(weight.codes) + rows * (weight.inputs * weight.bits / 8);
    weight.scales += rows * groups;
    if (weight.zeros != nullptr) weight.zeros += rows * groups;
    return weight;
}

// Activations x, [tokens, inputs], as a product with a weight wants them.
template <class T>
class Activations {
public:
    static int64_t bytes(const zif_cpu_quantized& weight, int64_t tokens) {
        switch (way_of<T>(weight, tokens)) {
            case Way::kIntegers:
                return heads(tokens) + tokens * stride_of(weight) * int64_t(sizeof(Integers::Held));
            case Way::kFloats: return tokens * Layout(weight).width() * 4;
#if defined(__AMX_INT8__)
            case Way::kIntegerTiles: return heads(tokens) + packed_bytes(tokens, weight.inputs, kTileCodes);
            case Way::kDecodedTiles: return PackedPairs::bytes(weight, tokens);
#endif
            default: return 0;
        }
    }

    // memory: 64-byte aligned, as much as `bytes` says; filled by `prepare`.
    Activations(const T* x, int64_t stride, int64_t tokens, const zif_cpu_quantized& weight, void* memory)
        : x_(x), stride_(stride), tokens_(tokens), weight_(weight), memory_(static_cast<char*>(memory)),
          way_(way_of<T>(weight, tokens)) {}

    // Parts to be prepared, each once, in any order.
    int64_t num_parts() const { return (tokens_ + kPartRows - 1) / kPartRows; }

    void prepare(int64_t part, [[maybe_unused]] int thread) const {
        const int64_t first = part * kPartRows;
        const int64_t end = first + kPartRows < tokens_ ? first + kPartRows : tokens_;
#if defined(__AMX_INT8__)
        if (way_ == Way::kIntegerTiles) {
            void* const rows = scratch(thread, 3, kTile * num_tiles(weight_.inputs, kTileCodes) * kTileCodes);
            return pack_codes(x_, stride_, packed(), part, own_tokens(), static_cast<int8_t*>(rows), weight_.inputs);
        }
        if constexpr (kTiled<T>) {
            if (way_ == Way::kDecodedTiles) return pack_pairs(x_, stride_, weight_, pairs(), part);
        }
#endif
        for (int64_t token = first; token < end; ++token) {
            if (way_ == Way::kIntegers) {
                const int64_t width = stride_of(weight_);
                const auto own = round_row(x_ + token * stride_, weight_.inputs, own_codes() + token * width, width);
                own_tokens()[token] = {own.scale, own.offset * Integers::kShift};
            } else {
                const Layout layout(weight_);
                widen_row(x_ + token * stride_, layout, reinterpret_cast<float*>(memory_) + token * layout.width());
            }
        }
    }

    // All tokens times outputs `begin` to `end` - 1.
    void multiply(int64_t begin, int64_t end, const Target<T>& target, int thread) const {
        switch (way_) {
            case Way::kIntegers: {
                const IntegerRows rows = {own_tokens(), own_codes(), stride_of(weight_), weight_.inputs};
                return multiply_integers(rows, tokens_, weight_, begin, end, target);
            }
            case Way::kFloats: {
                const FloatRows rows = {reinterpret_cast<const float*>(memory_), tokens_};
                auto* panel = static_cast<float*>(scratch(thread, 3, panel_bytes(Layout(weight_))));
                if (weight_.bits == 8) return multiply_floats<8>(rows, weight_, begin, end, panel, target);
                return multiply_floats<4>(rows, weight_, begin, end, panel, target);
            }
#if defined(__AMX_INT8__)
            case Way::kIntegerTiles:
                return multiply_codes(packed(), own_tokens(), weight_, begin, end, thread, target);
            case Way::kDecodedTiles:
                if constexpr (kTiled<T>) return multiply_decoded(pairs(), weight_, begin, end, thread, target);
#endif
            default: return;
        }
    }

private:
    static int64_t heads(int64_t tokens) { return rounded_up(tokens * sizeof(IntegerRows::Token), 64); }
    static int64_t stride_of(const zif_cpu_quantized& weight) { return rounded_up(weight.inputs, 64); }

    IntegerRows::Token* own_tokens() const { return reinterpret_cast<IntegerRows::Token*>(memory_); }
    Integers::Held* own_codes() const { return reinterpret_cast<Integers::Held*>(memory_ + heads(tokens_)); }

#if defined(__AMX_INT8__)
    Packed packed() const {
        auto* data = reinterpret_cast<uint32_t*>(memory_ + heads(tokens_));
        return {data, tokens_, num_tiles(weight_.inputs, kTileCodes)};
    }
    PackedPairs pairs() const { return {weight_, tokens_, memory_}; }
#endif

    const T* x_;
    int64_t stride_;
    int64_t tokens_;
    zif_cpu_quantized weight_;
    char* memory_;
    Way way_;
};

constexpr int64_t kFewTokens = 32;

// Outputs of a task: many, so that memory is read in order for long, but so few that all threads have some.
constexpr int64_t kTaskBytes = 256 << 10;

inline int64_t chunk_rows(const zif_cpu_quantized& weight) {
    const int64_t row_bytes = weight.inputs * weight.bits / 8;
    const int64_t share = weight.outputs / (4 * num_threads());
    const int64_t rows = kTaskBytes / row_bytes < share ? kTaskBytes / row_bytes : share;
    return rows < kChunk ? kChunk : rows / kChunk * kChunk;
}

inline int64_t num_tasks(int64_t outputs, int64_t chunk) { return (outputs + chunk - 1) / chunk; }

// Tokens that pass at once, so that the second cache holds them.
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t kLeastTokens = 128;

template <class T>
inline int64_t tokens_at_once(const zif_cpu_quantized& weight, int64_t tokens) {
    const int64_t bytes = Activations<T>::bytes(weight, tokens);
    if (tokens <= kLeastTokens || bytes <= kBlockBytes) return tokens;
    const int64_t some = tokens * kBlockBytes / bytes / kLeastTokens * kLeastTokens;
    return some < kLeastTokens ? kLeastTokens : some;
}

template <class T>
inline void multiply(const zif_cpu_quantized_product& call) {
    const int64_t most = tokens_at_once<T>(call.weight, call.tokens);
    for (int64_t first = 0; first < call.tokens; first += most) {
        const int64_t tokens = call.tokens - first < most ? call.tokens - first : most;
        void* const memory = scratch(0, 0, Activations<T>::bytes(call.weight, tokens));
        const T* x = static_cast<const T*>(call.x) + first * call.x_stride;
        const Activations<T> activations(x, call.x_stride, tokens, call.weight, memory);
        const int64_t outputs = call.weight.outputs;
        const Target<T> target = {static_cast<T*>(call.y) + first * outputs, outputs, static_cast<const T*>(call.bias)};
        parallel_for(activations.num_parts(), [&](int64_t part, int thread) { activations.prepare(part, thread); });
        const int64_t chunk = tokens <= kFewTokens ? few_chunk(outputs) : chunk_rows(call.weight);
        parallel_for(num_tasks(outputs, chunk), [&](int64_t task, int thread) {
            const int64_t begin = task * chunk, end = begin + chunk < outputs ? begin + chunk : outputs;
            activations.multiply(begin, end, target, thread);
        });
    }
}

}  // namespace quantized

void quantized_linear(const zif_cpu_quantized_product* call) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return quantized::multiply<float>(*call);
        case ZIF_BFLOAT16: return quantized::multiply<BFloat16>(*call);
        case ZIF_FLOAT16: return quantized::multiply<Float16>(*call);
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
