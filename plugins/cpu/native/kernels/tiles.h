// Products by AMX: 16 rows of weights by 32 inputs are one tile, loaded as they lie, so weights are not packed.
//
// A tile of the result holds 16 outputs by 16 tokens. Activations are packed once per call, pairs of inputs of 16
// tokens side by side (Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS).
#pragma once

#include "dots.h"

#if defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kTile = 16;        // rows of a tile
constexpr int64_t kTileInputs = 32;  // bfloat16 elements of a row of a tile
constexpr int64_t kTileWords = kTile * kTile;

// Tiles are loaded by instructions of which GCC 12 does not know that they read memory: what was stored must be there.
inline void stored() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The registers of a thread for the time of one task: kept longer, they would slow every switch of threads.
class TileRegisters {
public:
    TileRegisters() {
        const TileConfig config;
        stored();
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
};

inline int64_t num_tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Packed activations: [tiles of tokens][tiles of inputs][16 pairs of inputs][16 tokens], zeros where there are none.
struct PackedRows {
    const uint32_t* data;
    int64_t tokens;
    int64_t inputs;

    int64_t input_tiles() const { return num_tiles(inputs, kTileInputs); }
    const uint32_t* tile(int64_t token_tile, int64_t input_tile) const {
        return data + (token_tile * input_tiles() + input_tile) * kTileWords;
    }
};

inline int64_t packed_bytes(int64_t tokens, int64_t inputs) {
    return num_tiles(tokens, kTile) * num_tiles(inputs, kTileInputs) * kTileWords * 4;
}

// Pack 16 tokens from `tile` * 16 on. x: first axis strided.
inline void pack_tile(const BFloat16* x, int64_t stride, const PackedRows& packed, int64_t tile) {
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kTile));
    const int64_t first = tile * kTile;
    const int64_t count = packed.tokens - first < kTile ? packed.tokens - first : kTile;
    for (int64_t input_tile = 0; input_tile < packed.input_tiles(); ++input_tile) {
        auto* words = const_cast<uint32_t*>(packed.tile(tile, input_tile));
        const int64_t left = packed.inputs - input_tile * kTileInputs;
        const __mmask32 valid = left >= kTileInputs ? ~0u : (1u << left) - 1;
        for (int64_t token = 0; token < kTile; ++token) {
            const BFloat16* row = x + (first + token) * stride + input_tile * kTileInputs;
            const __m512i pairs = token < count ? _mm512_maskz_loadu_epi16(valid, row) : _mm512_setzero_si512();
            _mm512_i32scatter_epi32(words + token, places, pairs, 4);
        }
    }
}

// 16 rows of weights at one tile of inputs; where rows or inputs end within it, a padded copy.
struct WeightTile {
    const void* data;
    int64_t stride_bytes;
};

inline WeightTile weight_tile(const BFloat16* weight, int64_t inputs, int64_t row, int64_t end, int64_t input_tile,
                              uint16_t* copy) {
    const int64_t k = input_tile * kTileInputs;
    const BFloat16* from = weight + row * inputs + k;
    if (row + kTile <= end && k + kTileInputs <= inputs) return {from, inputs * 2};
    const int64_t left = inputs - k;
    const __mmask32 valid = left >= kTileInputs ? ~0u : (1u << left) - 1;
    for (int64_t i = 0; i < kTile; ++i) {
        const __m512i words = row + i < end ? _mm512_maskz_loadu_epi16(valid, from + i * inputs) : _mm512_setzero_si512();
        _mm512_storeu_si512(copy + i * kTileInputs, words);
    }
    stored();
    return {copy, kTileInputs * 2};
}

// Write a tile of sums, [16 outputs][16 tokens], to its tokens' rows.
inline void put_tile(const float* sums, int64_t token, int64_t output, int64_t end, int64_t tokens,
                     const Target<BFloat16>& target) {
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kTile));
    const int64_t count = end - output < kTile ? end - output : kTile;
    const __mmask16 valid = (1u << count) - 1;
    __m512 bias = _mm512_setzero_ps();
    if (target.bias != nullptr) {
        const __m256i words = _mm256_maskz_loadu_epi16(valid, target.bias + output);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    const int64_t last = tokens - token < kTile ? tokens - token : kTile;
    for (int64_t i = 0; i < last; ++i) {
        const __m512 column = _mm512_add_ps(_mm512_i32gather_ps(places, sums + i, 4), bias);
        const __m256i words = bits_as<__m256i>(_mm512_cvtneps_pbh(column));
        _mm256_mask_storeu_epi16(target.y + (token + i) * target.stride + output, valid, words);
    }
}

// Two tiles of outputs by two of tokens.
inline void multiply_block(const PackedRows& x, const BFloat16* weight, int64_t output, int64_t end, int64_t tile,
                           const Target<BFloat16>& target) {
    alignas(64) uint16_t copies[2][kTileWords * 2];
    alignas(64) float sums[kTileWords];
    const bool second_tokens = (tile + 1) * kTile < x.tokens;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < x.input_tiles(); ++k) {
        const WeightTile first = weight_tile(weight, x.inputs, output, end, k, copies[0]);
        _tile_loadd(4, first.data, first.stride_bytes);
        const WeightTile second = weight_tile(weight, x.inputs, output + kTile, end, k, copies[1]);
        _tile_loadd(5, second.data, second.stride_bytes);
        _tile_loadd(6, x.tile(tile, k), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (second_tokens) {
            _tile_loadd(7, x.tile(tile + 1, k), 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    const int64_t token = tile * kTile;
    _tile_stored(0, sums, 64);
    put_tile(sums, token, output, end, x.tokens, target);
    if (output + kTile < end) {
        _tile_stored(1, sums, 64);
        put_tile(sums, token, output + kTile, end, x.tokens, target);
    }
    if (!second_tokens) return;
    _tile_stored(2, sums, 64);
    put_tile(sums, token + kTile, output, end, x.tokens, target);
    if (output + kTile < end) {
        _tile_stored(3, sums, 64);
        put_tile(sums, token + kTile, output + kTile, end, x.tokens, target);
    }
}

// All tokens times outputs `begin` to `end` - 1.
inline void multiply_by_tiles(const PackedRows& x, const BFloat16* weight, int64_t begin, int64_t end,
                              const Target<BFloat16>& target) {
    const TileRegisters registers;
    for (int64_t output = begin; output < end; output += 2 * kTile) {
        const int64_t stop = output + 2 * kTile < end ? output + 2 * kTile : end;
        for (int64_t tile = 0; tile < num_tiles(x.tokens, kTile); tile += 2) {
            multiply_block(x, weight, output, stop, tile, target);
        }
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
