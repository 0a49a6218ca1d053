// One product of activations with rows of weights, by the way that suits their number: `linear` and `experts` share it.
#pragma once

#include <type_traits>

#include "compact_rows.h"
#include "compact_tiles.h"
#include "panels.h"
#include "target.h"
#include "tiles.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kChunk = 32;     // outputs of a task are a multiple of it
constexpr int64_t kMaxChunk = 1024;
constexpr int64_t kMaxFewChunk = 4096;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kPartRows = 16;  // rows that are made ready at once

// Outputs of a task of few tokens: weights are read once, and fastest by a thread that goes on where it was.
inline int64_t few_chunk(int64_t outputs) {
    const int64_t share = (outputs + num_threads() - 1) / num_threads();
    return share > kMaxFewChunk ? kMaxFewChunk : share < kChunk ? kChunk : (share + kChunk - 1) / kChunk * kChunk;
}

// Outputs of a task where each of `groups` groups of many tokens is multiplied with all `outputs`.
inline int64_t large_chunk(int64_t outputs, int64_t groups) {
    const int64_t share = outputs * groups / (kTasksPerThread * num_threads()) / kChunk * kChunk;
    return share < kChunk ? kChunk : share > kMaxChunk ? kMaxChunk : share;
}

// Whether products of T are made by tiles: from one token on, as reading the weights limits even that.
#if defined(__AMX_BF16__)
template <class T>
constexpr bool kTiled = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kTiled = false;
#endif

// A weight as it lies in a checkpoint. data: [outputs, inputs].
template <class T>
struct PlainWeight {
    typedef T Element;

    const T* data;
    int64_t outputs;
    int64_t inputs;
};

// Activations x, [tokens, inputs], as a product with a weight wants them: in words, or packed for tiles.
// WeightOf: PlainWeight or CompactWeight.
template <class WeightOf>
class RowProduct {
public:
    typedef typename WeightOf::Element T;
    typedef T Element;
    typedef WeightOf Weight;

    // One weight of a stack.
    static Weight entry(const Weight& stack, int64_t index) {
        return {stack.data + index * stack.outputs * stack.inputs, stack.outputs, stack.inputs};
    }

    // The memory that `tokens` rows need.
    static int64_t bytes(const Weight& weight, int64_t tokens) {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return packed_bytes(tokens, weight.inputs);
#endif
        return tokens * num_words(weight.inputs) * 4;
    }

    // Tokens of a call that are made ready at once: memory is bounded, and reading the weights is cheap.
    static int64_t at_once(const Weight& weight, [[maybe_unused]] int64_t tokens) {
        const int64_t most = kBytesAtOnce / (4 * weight.inputs);
        return most < 512 ? 512 : most / 512 * 512;
    }

    // memory: 64-byte aligned, as much as `bytes` says; filled by `prepare`.
    RowProduct(const T* x, int64_t stride, int64_t tokens, const Weight& weight, void* memory)
        : x_(x), stride_(stride), tokens_(tokens), inputs_(weight.inputs), weight_(weight), memory_(memory) {}

    // Outputs of a task.
    int64_t chunk(int64_t outputs) const {
        return tokens_ > kLeastTokens ? large_chunk(outputs, num_blocks()) : few_chunk(outputs);
    }

    // Parts to be prepared, each once, in any order.
    int64_t num_parts() const {
        return kTiled<T> ? (tokens_ + kPartRows - 1) / kPartRows : words().num_groups();
    }

    void prepare(int64_t part, int) const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return pack_tile(x_, stride_, packed(), part);
        else
#endif
        return hold_words(x_, stride_, inputs_, words(), part);
    }

    // Parts of the tokens that may be multiplied apart.
    int64_t num_blocks() const { return tokens_ > 0 ? (tokens_ + block_tokens() - 1) / block_tokens() : 1; }

    Range tokens_of(int64_t block) const {
        const int64_t first = block * block_tokens();
        return {first, first + block_tokens() < tokens_ ? first + block_tokens() : tokens_};
    }

    // One part of the tokens times some outputs.
    void multiply(int64_t block, const Range& outputs, const Target<T>& target, int thread) const {
        const Range tokens = tokens_of(block);
        [[maybe_unused]] const int64_t begin = outputs.first, end = outputs.last;
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) {
            const int64_t tile = tokens.first / kTile, last = num_tiles(tokens.last, kTile);
            return multiply_tiles(weight_, tile, last, outputs, target, thread);
        } else
#endif
        return multiply_rows(rows_of(weight_), words(), tokens.first, tokens.last, begin, end, FloatSums<T>(target),
                             thread);
    }

private:
    typedef Multiplier<T> Mul;

    static constexpr bool kCompact = !std::is_same_v<Weight, PlainWeight<T>>;

    // More take longer than reading the weights.
    static constexpr int64_t kLeastTokens = !kTiled<T> ? kFewTokens : kCompact ? 64 : 48;
    static constexpr int64_t kBytesAtOnce = 64 << 20;
    static constexpr int64_t kCachedBytes = kCompact ? 5 << 18 : 3 << 18;  // of packed tokens, which the second cache holds

    static PlainRows<T> rows_of(const PlainWeight<T>& weight) { return {weight.data, weight.inputs}; }

#if defined(__AMX_BF16__)
    PackedRows packed() const { return {static_cast<const uint32_t*>(memory_), tokens_, inputs_}; }

    void multiply_tiles(const PlainWeight<BFloat16>& weight, int64_t tile, int64_t last, const Range& outputs,
                        const Target<BFloat16>& target, int) const {
        TileProduct(packed(), tile, last, weight.data, outputs.first, outputs.last, target).run();
    }

    void multiply_tiles(const CompactWeight& weight, int64_t tile, int64_t last, const Range& outputs,
                        const Target<BFloat16>& target, int thread) const {
        CompactTileProduct(packed(), tile, last, weight, outputs.first, outputs.last, target).run(thread);
    }
#elif defined(ZIF_COMPACTS)
    static CompactRows rows_of(const CompactWeight& weight) { return CompactRows(weight); }
#endif

    int64_t block_tokens() const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) {  // as equal as can be
            const int64_t blocks = (packed_bytes(tokens_, inputs_) + kCachedBytes - 1) / kCachedBytes;
            return num_tiles((tokens_ + blocks - 1) / blocks, 2 * kTile) * 2 * kTile;
        }
#endif
        return words().pass_tokens();
    }

    static int64_t num_words(int64_t inputs) {
        return (inputs + Mul::kElements - 1) / Mul::kElements * kLanes * Mul::kParts;
    }

    Words words() const { return {static_cast<float*>(memory_), tokens_, num_words(inputs_)}; }

    const T* x_;
    int64_t stride_;
    int64_t tokens_;
    int64_t inputs_;
    const Weight weight_;
    void* memory_;
};

template <class T>
using PlainProduct = RowProduct<PlainWeight<T>>;

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
