// Products of many tokens by AMX: weights and sums in blocks that the second cache holds.
//
// A block is some inputs of some outputs' weights, copied tile after tile. All tokens pass by it, two tiles of tokens by
// two of outputs at once, before the next block's turn; sums wait in float32. While one block is multiplied the next
// one is fetched and copied, a line or two at each step: reading weights takes no time of its own. An element's sum is
// made in the order of inputs, as in tiles.h, so both give the same bits.
#pragma once

#include <utility>

#include "pool.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kBlockTokens = 32;  // tiles: 512 tokens
constexpr int64_t kBlockPairs = 128;  // pairs of tiles of a block of weights, 256 KiB
constexpr int64_t kShortInputs = 32;  // tiles of inputs that make one block, so that no sums wait
constexpr int64_t kBlockInputs = 16;  // else as many
constexpr int64_t kBlockWords = kBlockPairs * kPairWords;
constexpr int64_t kBlockSums = kBlockTokens * kBlockPairs / kBlockInputs * kPairWords;

// Some inputs of some rows of weights.
struct WeightBlock {
    const BFloat16* rows;  // the first row, at the first of the inputs
    int64_t inputs;        // of a whole row
    int64_t left;          // inputs from the first of these to the end of the row
    int64_t num_rows;
    int64_t num_tiles;  // of inputs

    int64_t pairs() const { return (num_rows + kPairRows - 1) / kPairRows; }

    // Whether every tile is full.
    bool whole() const { return num_rows % kPairRows == 0 && num_tiles * kTileInputs <= left; }
};

// Copy a block to [pairs of tiles][tiles of inputs][2][16 outputs][32 inputs], zeros where there is nothing.
inline void copy_block(const WeightBlock& block, uint32_t* to) {
    for (int64_t row = 0; row < block.pairs() * kPairRows; ++row) {
        const int64_t pair = row / kPairRows, within = row % kPairRows;
        uint32_t* line = to + pair * block.num_tiles * kPairWords + within * kTile;
        const BFloat16* from = block.rows + row * block.inputs;
        for (int64_t tile = 0; tile < block.num_tiles; ++tile, line += kPairWords) {
            const int64_t left = block.left - tile * kTileInputs;
            const __mmask32 valid = row >= block.num_rows ? 0 : left >= kTileInputs ? ~0u : (1u << left) - 1;
            _mm512_store_si512(line, _mm512_maskz_loadu_epi16(valid, from + tile * kTileInputs));
        }
    }
    stored();
}

// The copying of a whole block in parts, of some rows each, while other things are multiplied.
class Copying {
public:
    // parts: in how many parts the block is to be copied.
    Copying(const WeightBlock& block, uint32_t* to, int64_t parts)
        : block_(block), to_(to), rows_((block.num_rows + parts - 1) / parts) {}

    // Lines of a step, a tile of inputs, of part `part`; those of the next part are asked for.
    void step(int64_t part, int64_t tile) const {
        if (tile >= block_.num_tiles) return;
        const int64_t first = part * rows_;
        const int64_t end = first + rows_ < block_.num_rows ? first + rows_ : block_.num_rows;
        const BFloat16* from = block_.rows + first * block_.inputs + tile * kTileInputs;
        for (int64_t row = first; row < end; ++row, from += block_.inputs) {
            const int64_t pair = row / kPairRows, within = row % kPairRows;
            uint32_t* line = to_ + (pair * block_.num_tiles + tile) * kPairWords + within * kTile;
            _mm512_store_si512(line, _mm512_loadu_si512(from));
        }
        for (int64_t row = end; row < end + rows_ && row < block_.num_rows; ++row, from += block_.inputs) {
            __builtin_prefetch(from, 0, 2);
        }
    }

private:
    const WeightBlock& block_;
    uint32_t* to_;
    int64_t rows_;
};

// Two tiles of outputs by two of tokens; sums: [2 tiles of tokens][32 outputs][16 tokens]. meanwhile: called with each
// tile of inputs.
template <bool kSecond, class Meanwhile>
inline void multiply_pair(const uint32_t* weight, const uint32_t* first, const uint32_t* second, int64_t num_inputs,
                          bool go_on, float* sums, const Meanwhile& meanwhile) {
    if (go_on) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + kTileWords, 64);
        _tile_loadd(2, sums + 2 * kTileWords, 64);
        _tile_loadd(3, sums + 3 * kTileWords, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < num_inputs; ++k) {
        _tile_loadd(4, weight, 64);
        _tile_loadd(6, first, 64);
        _tile_loadd(5, weight + kTileWords, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (kSecond) {
            _tile_loadd(7, second, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            second += kTileWords;
        }
        meanwhile(k);
        weight += kPairWords;
        first += kTileWords;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileWords, 64);
    if (kSecond) {
        _tile_stored(2, sums + 2 * kTileWords, 64);
        _tile_stored(3, sums + 3 * kTileWords, 64);
    }
    stored();
}

// Tokens of tiles `tile` to `last_tile` - 1, at most kBlockTokens tiles, times outputs `begin` to `end` - 1.
class TileBlocks {
public:
    TileBlocks(const PackedRows& x, int64_t tile, int64_t last_tile, const BFloat16* weight, int64_t begin, int64_t end,
               const Target<BFloat16>& target)
        : x_(x), tile_(tile), last_tile_(last_tile), weight_(weight), begin_(begin), end_(end), target_(target),
          block_inputs_(x.input_tiles() <= kShortInputs ? kShortInputs : kBlockInputs),
          block_rows_(kBlockPairs / block_inputs_ * kPairRows), parts_(num_tiles(x.input_tiles(), block_inputs_)) {}

    void run(int thread) const {
        auto* current = static_cast<uint32_t*>(scratch(thread, 4, (2 * kBlockWords + kBlockSums) * 4));
        uint32_t* next = current + kBlockWords;
        float* sums = reinterpret_cast<float*>(next + kBlockWords);
        const TileRegisters registers;
        const int64_t steps = num_tiles(end_ - begin_, block_rows_) * parts_;
        copy_block(block(0), current);
        for (int64_t step = 0; step + 1 < steps; ++step) {
            const WeightBlock own = block(step), following = block(step + 1);
            if (following.whole() && following.num_tiles <= own.num_tiles) {
                const Copying copying(following, next, num_tiles(last_tile_ - tile_, 2) * own.pairs());
                multiply(step, current, sums, [&](int64_t part, int64_t k) { copying.step(part, k); });
                stored();
            } else {
                multiply(step, current, sums, [](int64_t, int64_t) {});
                copy_block(following, next);
            }
            std::swap(current, next);
        }
        multiply(steps - 1, current, sums, [](int64_t, int64_t) {});
    }

private:
    // Steps take some rows of weights from the first inputs to the last, then the next rows.
    int64_t first_output(int64_t step) const { return begin_ + step / parts_ * block_rows_; }
    int64_t first_input(int64_t step) const { return step % parts_ * block_inputs_; }

    WeightBlock block(int64_t step) const {
        const int64_t output = first_output(step), k = first_input(step), input = k * kTileInputs;
        const int64_t rows = end_ - output < block_rows_ ? end_ - output : block_rows_;
        const int64_t tiles = x_.input_tiles() - k < block_inputs_ ? x_.input_tiles() - k : block_inputs_;
        return {weight_ + output * x_.inputs + input, x_.inputs, x_.inputs - input, rows, tiles};
    }

    // meanwhile: called with the number of the pair and of its tile of inputs.
    template <class Meanwhile>
    void multiply(int64_t step, const uint32_t* panel, float* sums, const Meanwhile& meanwhile) const {
        const WeightBlock own = block(step);
        const int64_t k = first_input(step);
        const bool go_on = k > 0, last = step % parts_ == parts_ - 1;
        int64_t part = 0;
        for (int64_t tile = tile_; tile < last_tile_; tile += 2) {
            for (int64_t pair = 0; pair < own.pairs(); ++pair, ++part) {
                const int64_t output = first_output(step) + pair * kPairRows;
                const BFloat16* to = target_.y + tile * kTile * target_.stride + output;
                const auto work = [&](int64_t i) {
                    meanwhile(part, i);
                    // Lines of the result are fetched before they are written.
                    if (last && i < kTile) ask(to + 2 * i * target_.stride);
                };
                const uint32_t* weight = panel + pair * own.num_tiles * kPairWords;
                const bool second = tile + 1 < last_tile_;
                const uint32_t *tokens = x_.tile(tile, k), *others = x_.tile(tile + 1, k);
                if (second) multiply_pair<true>(weight, tokens, others, own.num_tiles, go_on, sums, work);
                else multiply_pair<false>(weight, tokens, others, own.num_tiles, go_on, sums, work);
                if (last) {
                    put_pair(sums, tile * kTile, output, end_, x_.tokens, target_);
                    if (second) put_pair(sums + kPairWords, (tile + 1) * kTile, output, end_, x_.tokens, target_);
                }
                if (parts_ > 1) sums += 2 * kPairWords;
            }
        }
    }

    // Two lines of the result, of adjacent tokens.
    void ask(const BFloat16* to) const {
        __builtin_prefetch(to, 1);
        __builtin_prefetch(to + target_.stride, 1);
    }

    const PackedRows& x_;
    int64_t tile_;
    int64_t last_tile_;
    const BFloat16* weight_;
    int64_t begin_;
    int64_t end_;
    const Target<BFloat16>& target_;
    int64_t block_inputs_;  // tiles
    int64_t block_rows_;
    int64_t parts_;  // blocks of a row
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
