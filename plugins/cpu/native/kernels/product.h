// One product of activations with rows of weights, by the way that suits their number: what `linear` and `experts` share.
#pragma once

#include "dot_blocks.h"
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
    return share > kMaxFewChunk ? kMaxFewChunk : (share + kChunk - 1) / kChunk * kChunk;
}

// Outputs of a task where each of `groups` groups of many tokens is multiplied with all `outputs`.
inline int64_t large_chunk(int64_t outputs, int64_t groups) {
    const int64_t share = outputs * groups / (kTasksPerThread * num_threads()) / kChunk * kChunk;
    return share < kChunk ? kChunk : share > kMaxChunk ? kMaxChunk : share;
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
    // Whether tokens are so many that weights are copied for them. Sums are the same either way.
    static bool many(int64_t tokens) {
        return tokens > (kHeldAsIs<T> ? kLeastTokens : kLeastWidened);
    }

    // The memory that `tokens` rows need; 0 where they are used as they are.
    static int64_t bytes(int64_t tokens, int64_t inputs) {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) return packed_bytes(tokens, inputs);
#endif
        return kHeldAsIs<T> && !many(tokens) ? 0 : tokens * stride(inputs) * int64_t(sizeof(Held));
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
        hold(part);
    }

    // Parts of the tokens that may be multiplied apart.
    int64_t num_blocks() const { return tokens_ > 0 ? (tokens_ + block_tokens() - 1) / block_tokens() : 1; }

    // One part of the tokens times outputs `begin` to `end` - 1 of weight, [outputs, inputs].
    void multiply(int64_t block, const T* weight, int64_t begin, int64_t end, const Target<T>& target,
                  int thread) const {
        const int64_t first = block * block_tokens();
        const int64_t last = first + block_tokens() < tokens_ ? first + block_tokens() : tokens_;
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) {
            return TileProduct(packed(), first / kTile, num_tiles(last, kTile), weight, begin, end, target).run();
        }
#endif
        if (!many(tokens_)) return multiply_by_dots(rows(), weight, begin, end, target);
        DotBlocks<T>(rows(), first, last, weight, begin, end, target).run(thread);
    }

private:
    typedef typename Multiplier<T>::Held Held;

    static constexpr int64_t kLeastTokens = 48;
    static constexpr int64_t kLeastWidened = 12;
    static constexpr int64_t kCachedBytes = 3 << 18;  // of packed tokens, which the second cache holds

#if defined(__AMX_BF16__)
    PackedRows packed() const { return {static_cast<const uint32_t*>(memory_), tokens_, inputs_}; }
#endif

    int64_t block_tokens() const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled<T>) {  // as equal as can be
            const int64_t blocks = (packed_bytes(tokens_, inputs_) + kCachedBytes - 1) / kCachedBytes;
            return num_tiles((tokens_ + blocks - 1) / blocks, 2 * kTile) * 2 * kTile;
        }
#endif
        return many(tokens_) ? kPassTokens : tokens_;
    }

    // Elements from one held row to the next: whole vectors, and one more, so that rows do not fall on the same lines
    // of a cache.
    static int64_t stride(int64_t inputs) {
        return (inputs + Multiplier<T>::kStep - 1) / Multiplier<T>::kStep * Multiplier<T>::kStep + Multiplier<T>::kStep;
    }

    Rows<T> rows() const {
        if (bytes(tokens_, inputs_) == 0) return {reinterpret_cast<const Held*>(x_), stride_, tokens_, inputs_};
        return {static_cast<const Held*>(memory_), stride(inputs_), tokens_, inputs_};
    }

    // Rows of a part, widened where they are to be, with zeros behind them.
    void hold(int64_t part) const {
        typedef Multiplier<T> Mul;
        const int64_t end = (part + 1) * kPartRows < tokens_ ? (part + 1) * kPartRows : tokens_;
        for (int64_t token = part * kPartRows; token < end; ++token) {
            const T* from = x_ + token * stride_;
            Held* to = static_cast<Held*>(memory_) + token * stride(inputs_);
            for (int64_t k = 0; k < inputs_; k += Mul::kStep) {
                const int64_t left = inputs_ - k;
                const auto words = left >= Mul::kStep ? Mul::words(from + k) : Mul::some_words(from + k, left);
                std::memcpy(to + k, &words, sizeof(words));
            }
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
