// Products with weights held as integers, as they lie in a checkpoint.
#pragma once

#include "linear.h"
#include "pool.h"
#include "product.h"
#include "quantized_decoded.h"
#include "quantized_floats.h"
#include "quantized_rows.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

enum class Way { kIntegers, kFloats, kIntegerTiles, kDecodedTiles };

// How a product is made. That of integers is exact, so there the number of tokens may choose; it must not elsewhere.
template <class T>
inline Way way_of(const zif_cpu_quantized& weight, [[maybe_unused]] int64_t tokens) {
#if defined(__AMX_INT8__)
    if (weight.dynamic_activations && tokens > kFewestTokens) return Way::kIntegerTiles;
    if (!weight.dynamic_activations && kTiled<T> && weight.group % kTileInputs == 0) return Way::kDecodedTiles;
#endif
    return weight.dynamic_activations ? Way::kIntegers : Way::kFloats;
}

constexpr int64_t kOrderedTokens = 32;  // up to as many read a weight best in few long parts

// Outputs of a task: many, so that memory is read in order for long, but so few that all threads have some.
constexpr int64_t kTaskBytes = 256 << 10;

inline int64_t chunk_rows(const zif_cpu_quantized& weight, int64_t outputs) {
    const int64_t row_bytes = weight.inputs * weight.bits / 8;
    const int64_t share = outputs / (4 * num_threads());
    const int64_t rows = kTaskBytes / row_bytes < share ? kTaskBytes / row_bytes : share;
    return rows < kChunk ? kChunk : rows / kChunk * kChunk;
}

// Tokens that are made ready at once: as the second cache holds by tiles; by vectors they pass in parts anyway, and
// memory is bounded.
constexpr int64_t kTiledBytes = 1 << 20;
constexpr int64_t kTiledTokens = 128;
constexpr int64_t kVectorBytes = 64 << 20;

// Activations x, [tokens, inputs], as a product with a weight wants them.
template <class T>
class Product {
public:
    typedef T Element;
    typedef zif_cpu_quantized Weight;

    // One weight of a stack.
    static Weight entry(Weight stack, int64_t index) {
        const int64_t rows = index * stack.outputs, groups = stack.inputs / stack.group;
        stack.codes = static_cast<const uint8_t*>(stack.codes) + rows * (stack.inputs * stack.bits / 8);
        stack.scales += rows * groups;
        if (stack.zeros != nullptr) stack.zeros += rows * groups;
        return stack;
    }

    static int64_t bytes(const zif_cpu_quantized& weight, int64_t tokens) {
        switch (way_of<T>(weight, tokens)) {
            case Way::kIntegers: return heads(tokens) + tokens * integer_words(weight) * 4;
            case Way::kFloats: return tokens * float_words(weight) * 4;
#if defined(__AMX_INT8__)
            case Way::kIntegerTiles: return heads(tokens) + packed_bytes(tokens, weight.inputs, kTileCodes);
            case Way::kDecodedTiles: return PackedPairs::bytes(weight, tokens);
#endif
            default: return 0;
        }
    }

    // Tokens of a call that are made ready at once.
    static int64_t at_once(const zif_cpu_quantized& weight, int64_t tokens) {
        const int64_t needed = bytes(weight, tokens);
        const bool vectors = by_vectors(weight, tokens);
        const int64_t most = vectors ? kVectorBytes : kTiledBytes, step = vectors ? kPassTokens : kTiledTokens;
        if (tokens <= step || needed <= most) return tokens;
        const int64_t some = tokens * most / needed / step * step;
        return some < step ? step : some;
    }

    static bool by_vectors(const zif_cpu_quantized& weight, int64_t tokens) {
        const Way way = way_of<T>(weight, tokens);
        return way == Way::kIntegers || way == Way::kFloats;
    }

    // memory: 64-byte aligned, as much as `bytes` says; filled by `prepare`.
    Product(const T* x, int64_t stride, int64_t tokens, const zif_cpu_quantized& weight, void* memory)
        : x_(x), stride_(stride), tokens_(tokens), weight_(weight), memory_(static_cast<char*>(memory)),
          way_(way_of<T>(weight, tokens)) {}

    // Parts to be prepared, each once, in any order.
    int64_t num_parts() const {
        return by_vectors(weight_, tokens_) ? words().num_groups() : (tokens_ + kPartRows - 1) / kPartRows;
    }

    void prepare(int64_t part, [[maybe_unused]] int thread) const {
        if (way_ == Way::kIntegers) {
            const int64_t token = part * words().group_tokens();
            void* const codes = scratch(thread, 3, words().group_tokens() * rounded_up(weight_.inputs, kLanes));
            return round_group(x_ + token * stride_, stride_, weight_.inputs, words(), part, own_tokens() + token,
                               static_cast<int8_t*>(codes));
        }
        if (way_ == Way::kFloats) {
            void* const rows = scratch(thread, 3, words().group_tokens() * words().words * sizeof(float));
            const T* x = x_ + part * words().group_tokens() * stride_;
            return widen_group(x, stride_, weight_, words(), part, static_cast<float*>(rows));
        }
#if defined(__AMX_INT8__)
        if (way_ == Way::kIntegerTiles) {
            void* const rows = scratch(thread, 3, kTile * num_tiles(weight_.inputs, kTileCodes) * kTileCodes);
            return pack_codes(x_, stride_, packed(), part, own_tokens(), static_cast<int8_t*>(rows), weight_.inputs);
        }
        if constexpr (kTiled<T>) {
            if (way_ == Way::kDecodedTiles) return pack_pairs(x_, stride_, weight_, pairs(), part);
        }
#endif
    }

    // Parts of the tokens that may be multiplied apart: by tiles all are multiplied together.
    int64_t num_blocks() const { return tokens_ > 0 ? (tokens_ + block_tokens() - 1) / block_tokens() : 1; }

    Range tokens_of(int64_t block) const {
        const int64_t first = block * block_tokens();
        return {first, first + block_tokens() < tokens_ ? first + block_tokens() : tokens_};
    }

    // Outputs of a task.
    int64_t chunk(int64_t outputs) const {
        if (tokens_ <= kOrderedTokens) return few_chunk(outputs);
        return way_ == Way::kIntegers ? large_chunk(outputs, num_blocks()) : chunk_rows(weight_, outputs);
    }

    // One part of the tokens times some outputs.
    void multiply(int64_t block, const Range& outputs, const Target<T>& target, int thread) const {
        const Range tokens = tokens_of(block);
        const int64_t begin = outputs.first, end = outputs.last;
        switch (way_) {
            case Way::kIntegers: {
                const IntegerSums<T> sums(own_tokens(), weight_.scales, target);
                if (tokens_ <= kFewestTokens) return multiply_fewest(code_rows(weight_), words(), begin, end, sums);
                return multiply_words(code_rows(weight_), sums, tokens, outputs, thread);
            }
            case Way::kFloats: {
                const FloatSums<T> sums(target);
                const bool whole_words = weight_.group * weight_.bits % 32 == 0;
                if (!whole_words) return multiply_words(AnyRows{weight_}, sums, tokens, outputs, thread);
                if (weight_.bits == 8) return multiply_words(CodeRows<8>(weight_), sums, tokens, outputs, thread);
                return multiply_words(CodeRows<4>(weight_), sums, tokens, outputs, thread);
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
    static PlainRows<int8_t> code_rows(const zif_cpu_quantized& weight) {
        return {static_cast<const int8_t*>(weight.codes), weight.inputs};
    }

    static int64_t integer_words(const zif_cpu_quantized& weight) {
        return code_rows(weight).num_blocks() * kLanes * Integers::kParts;
    }

    template <class Rows>
    void multiply_words(const Rows& rows, const Sums<typename Rows::Mul::Sum>& sink, const Range& tokens,
                        const Range& outputs, int thread) const {
        multiply_rows(rows, words(), tokens.first, tokens.last, outputs.first, outputs.last, sink, thread);
    }

    int64_t block_tokens() const { return by_vectors(weight_, tokens_) ? words().pass_tokens() : tokens_; }

    static int64_t heads(int64_t tokens) { return rounded_up(tokens * sizeof(RoundedToken), 64); }

    RoundedToken* own_tokens() const { return reinterpret_cast<RoundedToken*>(memory_); }
    Words words() const {
        if (way_ == Way::kFloats) return {reinterpret_cast<float*>(memory_), tokens_, float_words(weight_)};
        return {reinterpret_cast<float*>(memory_ + heads(tokens_)), tokens_, integer_words(weight_)};
    }

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

}  // namespace quantized

void quantized_linear(const zif_cpu_quantized_product* call) {
    const auto multiply = [&](auto element) {
        linear_of<quantized::Product<decltype(element)>>(*call, call->weight, call->wide != 0);
    };
    switch (call->dtype) {
        case ZIF_FLOAT32: return multiply(float());
        case ZIF_BFLOAT16: return multiply(BFloat16());
        case ZIF_FLOAT16: return multiply(Float16());
    }
}

void gated_quantized_linear(const zif_cpu_gated_quantized_product* call) {
    const auto multiply = [&](auto element) {
        gated_linear_of<quantized::Product<decltype(element)>>(call->product, call->product.weight, call->activation);
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
