// Activations of bfloat16 packed for tiles of decoded weights: the order of their inputs is that in which codes decode.
#pragma once

#include "quantized_tiles.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

// How codes become tiles of 32 inputs, and so which inputs each step multiplies.
enum class Order {
    kBytes,    // 8 bits: 16 inputs, and the 16 that follow, as pairs
    kHalves,   // 4 bits: 16 bytes, their lower and their upper halves as pairs
    kQuarters  // 4 bits: 64 bytes make four steps: lower and upper halves of even bytes, then of odd ones
};

inline Order order_of(const zif_cpu_quantized& weight) {
    if (weight.bits == 8) return Order::kBytes;
    return weight.group % (4 * kTileInputs) == 0 ? Order::kQuarters : Order::kHalves;
}

inline __m512i joined(__m256i first, __m256i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// The 32 elements of a row, as pairs, that step `step` multiplies. x: the row.
inline __m512i pairs_of(const BFloat16* x, const zif_cpu_quantized& weight, Order order, int64_t step) {
    const int64_t steps = weight.group / kTileInputs, place = step % steps;
    const BFloat16* group = x + step / steps * weight.group;
    if (order == Order::kQuarters) {
        const BFloat16* from = group + place % 2 * (weight.group / 2) + place / 4 * (2 * kTileInputs);
        const int shift = place % 4 / 2 * 16;
        const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(from), shift);
        const __m512i high = _mm512_srli_epi32(_mm512_loadu_si512(from + kTileInputs), shift);
        return joined(_mm512_cvtepi32_epi16(low), _mm512_cvtepi32_epi16(high));
    }
    const bool bytes = order == Order::kBytes;
    const BFloat16* first = group + place * (bytes ? kTileInputs : kTile);
    const BFloat16* second = first + (bytes ? kTile : weight.group / 2);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The registers of a thread, those of tokens (0 to 3, 6 and 7) with rows of `row_bytes`.
class NarrowTiles {
public:
    explicit NarrowTiles(uint16_t row_bytes) {
        TileConfig config;
        for (const int tile : {0, 1, 2, 3, 6, 7}) config.row_bytes[tile] = row_bytes;
        stored();
        _tile_loadconfig(&config);
    }
    ~NarrowTiles() { _tile_release(); }
};

// Activations packed for one token, [steps][16 pairs], or for tiles of them, and the sums of each group's inputs:
// [tiles of tokens][groups][width].
struct PackedPairs {
    uint32_t* words;
    float* sums;
    int64_t tokens;
    int64_t steps;
    int64_t groups;

    static int64_t width_of(int64_t tokens) { return tokens == 1 ? 1 : kTile; }
    static int64_t word_bytes(int64_t tokens, int64_t steps) {
        return num_tiles(tokens, kTile) * steps * kTile * width_of(tokens) * 4;
    }
    static int64_t bytes(const zif_cpu_quantized& weight, int64_t tokens) {
        const int64_t groups = weight.inputs / weight.group;
        return word_bytes(tokens, weight.inputs / kTileInputs) +
               rounded_up(num_tiles(tokens, kTile) * groups * width_of(tokens) * 4, 64);
    }

    PackedPairs(const zif_cpu_quantized& weight, int64_t tokens, void* memory)
        : words(static_cast<uint32_t*>(memory)), tokens(tokens), steps(weight.inputs / kTileInputs),
          groups(weight.inputs / weight.group) {
        sums = reinterpret_cast<float*>(words) + word_bytes(tokens, steps) / 4;
    }

    int64_t tiles() const { return num_tiles(tokens, kTile); }
    int64_t width() const { return width_of(tokens); }
    uint32_t* tile(int64_t token_tile, int64_t step) const {
        return words + (token_tile * steps + step) * kTile * width();
    }
    float* group_sums(int64_t token_tile, int64_t group) const {
        return sums + (token_tile * groups + group) * width();
    }
};

inline float sum_of(const BFloat16* x, int64_t count) {
    Float total = {};
    for (int64_t k = 0; k < count; k += kLanes) total += load(x + k);
    return sum(total);
}

// Pack 16 tokens from `tile` * 16 on.
inline void pack_pairs(const BFloat16* x, int64_t stride, const zif_cpu_quantized& weight, const PackedPairs& packed,
                       int64_t tile) {
    const int64_t first = tile * kTile;
    const int64_t count = packed.tokens - first < kTile ? packed.tokens - first : kTile;
    const Order order = order_of(weight);
    for (int64_t group = 0; group < packed.groups; ++group) {
        float* sums = packed.group_sums(tile, group);
        for (int64_t i = 0; i < packed.width(); ++i) {
            sums[i] = i < count ? sum_of(x + (first + i) * stride + group * weight.group, weight.group) : 0.0f;
        }
    }
    for (int64_t step = 0; step < packed.steps; ++step) {
        if (packed.tokens == 1) {
            _mm512_storeu_si512(packed.tile(0, step), pairs_of(x, weight, order, step));
            continue;
        }
        __m512i rows[16];
        for (int64_t i = 0; i < kTile; ++i) {
            rows[i] = i < count ? pairs_of(x + (first + i) * stride, weight, order, step) : _mm512_setzero_si512();
        }
        put_transposed(rows, packed.tile(tile, step));
    }
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
