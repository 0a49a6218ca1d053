// Dot products of queries and keys by AMX: 16 keys by 32 elements are one tile, loaded as they lie in a block.
//
// A tile of the result holds 16 keys by 16 query rows. Queries are packed once per task, pairs of elements of 16 rows
// side by side (Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS).
#pragma once

#include "attention_tile.h"
#include "pool.h"

#if defined(__AMX_BF16__)

#include "tiles.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kTilesAtOnce = 4;  // one product of tiles takes 52 cycles, but a next one may start after 16
constexpr int64_t kTileAhead = kTile * kTilesAtOnce;

// Query rows against 64 keys at a time. 16 query rows cost as much as one.
class TileScores {
public:
    static bool serves(int64_t head_dim) { return head_dim % kTileInputs == 0; }

    TileScores(const BFloat16* query, int64_t rows, int64_t head_dim, int thread)
        : rows_(rows), head_dim_(head_dim), steps_(head_dim / kTileInputs) {
        const int64_t words = rounded_up(rows, kTile) * head_dim / 2;
        const int64_t copied = kTilesAtOnce * kTile * head_dim;
        sums_ = static_cast<float*>(scratch(thread, 3, kTilesAtOnce * kTileWords * 4 + words * 4 + copied * 2));
        packed_ = reinterpret_cast<uint32_t*>(sums_ + kTilesAtOnce * kTileWords);
        copies_ = reinterpret_cast<BFloat16*>(packed_ + words);
        std::memset(packed_, 0, words * 4);
        for (int64_t row = 0; row < rows; ++row) {
            uint32_t* to = packed_ + row / kTile * kTile * head_dim / 2 + row % kTile;
            for (int64_t i = 0; i < head_dim / 2; ++i) std::memcpy(to + i * kTile, query + row * head_dim + 2 * i, 4);
        }
        stored();
    }

    // Put the dot products with kTiles * 16 keys into scores[row][key].
    template <int kTiles>
    void put(const BFloat16* keys, const int64_t* offsets, bool adjacent, float* scores) {
        const BFloat16* tiles[kTiles];
        for (int i = 0; i < kTiles; ++i) {
            tiles[i] = place(keys, offsets + i * kTile, adjacent, copies_ + i * kTile * head_dim_);
        }
        for (int64_t row = 0; row < rows_; row += kTile) {
            const uint32_t* packed = packed_ + row * head_dim_ / 2;
            if (row == 0) multiply<kTiles, true>(packed, tiles, keys, offsets + kTileAhead);
            else multiply<kTiles, false>(packed, tiles, keys, offsets + kTileAhead);
            for (int i = 0; i < kTiles; ++i) {
                for (int64_t each = row; each < row + kTile && each < rows_; ++each) {
                    const float* from = sums_ + i * kTileWords + each - row;
                    _mm512_storeu_ps(scores + each * kScoreStride + i * kTile, _mm512_i32gather_ps(places(), from, 4));
                }
            }
        }
    }

private:
    static __m512i places() {
        return _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    }

    // 16 keys as they lie where they lie together, else a copy.
    const BFloat16* place(const BFloat16* keys, const int64_t* offsets, bool adjacent, BFloat16* copy) const {
        if (adjacent && offsets[kTile - 1] - offsets[0] == (kTile - 1) * head_dim_) return keys + offsets[0];
        for (int64_t i = 0; i < kTile; ++i) {
            std::memcpy(copy + i * head_dim_, keys + offsets[i], head_dim_ * sizeof(BFloat16));
        }
        stored();
        return copy;
    }

    template <bool kAsk>
    static void ask(const BFloat16* keys, const int64_t* offsets) {
        if constexpr (!kAsk) return;
        for (int64_t i = 0; i < kTile; ++i) __builtin_prefetch(keys + offsets[i], 0, 2);
    }

    template <int kTiles, bool kAsk>
    void multiply(const uint32_t* packed, const BFloat16* const* tiles, const BFloat16* keys, const int64_t* ahead) {
        const int64_t stride = head_dim_ * sizeof(BFloat16);
        _tile_zero(0);
        if constexpr (kTiles > 1) {
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < steps_; ++step) {
            const int64_t at = step * kTileInputs;
            _tile_loadd(6, packed + step * kTileWords, kTile * 4);
            _tile_loadd(4, tiles[0] + at, stride);
            _tile_dpbf16ps(0, 4, 6);
            ask<kAsk>(keys + at, ahead);
            if constexpr (kTiles > 1) {
                _tile_loadd(5, tiles[1] + at, stride);
                _tile_dpbf16ps(1, 5, 6);
                ask<kAsk>(keys + at, ahead + kTile);
                _tile_loadd(4, tiles[2] + at, stride);
                _tile_dpbf16ps(2, 4, 6);
                ask<kAsk>(keys + at, ahead + 2 * kTile);
                _tile_loadd(5, tiles[3] + at, stride);
                _tile_dpbf16ps(3, 5, 6);
                ask<kAsk>(keys + at, ahead + 3 * kTile);
            }
        }
        _tile_stored(0, sums_, kTile * 4);
        if constexpr (kTiles > 1) {
            _tile_stored(1, sums_ + kTileWords, kTile * 4);
            _tile_stored(2, sums_ + 2 * kTileWords, kTile * 4);
            _tile_stored(3, sums_ + 3 * kTileWords, kTile * 4);
        }
    }

    int64_t rows_;
    int64_t head_dim_;
    int64_t steps_;
    float* sums_;       // [kTilesAtOnce, 16 keys, 16 rows]
    uint32_t* packed_;  // [groups of 16 rows][steps][16 pairs][16 rows]
    BFloat16* copies_;  // [kTilesAtOnce, 16 keys, head_dim]
};

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
