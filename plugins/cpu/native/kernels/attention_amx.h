// Products of attention by AMX: query rows times panels of keys, and weights times pairs of values.
//
// Query rows and weights are the left operands, as they lie. Panels are right operands, as they are packed; of values,
// pairs of keys lie side by side (Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS).
#pragma once

#include "attention_tile.h"

#if defined(__AMX_BF16__)

#include "tiles.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

// The registers of a thread for the time of one split; tiles of query rows have as many as there are, up to 16.
class RowTiles {
public:
    explicit RowTiles(int64_t rows) {
        TileConfig config;
        if (rows < kTile) {
            for (int tile = 0; tile < 6; ++tile) config.rows[tile] = tile == 5 ? kTile : rows;
        }
        stored();
        _tile_loadconfig(&config);
    }
    ~RowTiles() { _tile_release(); }
};

constexpr int64_t kBlockRows = 2 * kTile;  // that are multiplied together

// Where operands and sums of a block lie, strides in bytes.
struct TileOperands {
    const char* rows;        // [row tiles of 16][steps of 64 bytes]
    int64_t row_stride;
    const char* columns;     // tiles of 1024 bytes
    int64_t column_step;     // from a step to the next
    int64_t column_stride;   // from a tile of 16 columns to the next
    int64_t steps;
    char* sums;              // [rows][columns], float32
    int64_t sum_stride;
    bool more;  // sums are added to; of one tile of rows
};

// One tile of rows by kCount of columns. Tiles 0 to 3 sum, 4 has rows, 5 to 7 columns.
template <int kCount>
inline void multiply_row_tile(const TileOperands& of, Ahead& ahead) {
    if (of.more) {
        _tile_loadd(0, of.sums, of.sum_stride);
        if constexpr (kCount > 1) _tile_loadd(1, of.sums + 64, of.sum_stride);
        if constexpr (kCount > 2) _tile_loadd(2, of.sums + 128, of.sum_stride);
        if constexpr (kCount > 2) _tile_loadd(3, of.sums + 192, of.sum_stride);
    } else {
        _tile_zero(0);
        if constexpr (kCount > 1) _tile_zero(1);
        if constexpr (kCount > 2) _tile_zero(2);
        if constexpr (kCount > 2) _tile_zero(3);
    }
    const char* columns = of.columns;
    for (int64_t step = 0; step < of.steps; ++step, columns += of.column_step) {
        _tile_loadd(4, of.rows + step * 64, of.row_stride);
        _tile_loadd(5, columns, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (kCount > 1) {
            _tile_loadd(6, columns + of.column_stride, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (kCount > 2) {
            _tile_loadd(7, columns + 2 * of.column_stride, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, columns + 3 * of.column_stride, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        ahead.step();
    }
    _tile_stored(0, of.sums, of.sum_stride);
    if constexpr (kCount > 1) _tile_stored(1, of.sums + 64, of.sum_stride);
    if constexpr (kCount > 2) _tile_stored(2, of.sums + 128, of.sum_stride);
    if constexpr (kCount > 2) _tile_stored(3, of.sums + 192, of.sum_stride);
}

// Two tiles of rows by two of columns. Tiles 0 to 3 sum, 4 and 5 have rows, 6 and 7 columns.
inline void multiply_square(const TileOperands& of, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const char* columns = of.columns;
    for (int64_t step = 0; step < of.steps; ++step, columns += of.column_step) {
        _tile_loadd(4, of.rows + step * 64, of.row_stride);
        _tile_loadd(6, columns, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + of.column_stride, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, of.rows + kTile * of.row_stride + step * 64, of.row_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        ahead.step();
    }
    _tile_stored(0, of.sums, of.sum_stride);
    _tile_stored(1, of.sums + 64, of.sum_stride);
    _tile_stored(2, of.sums + kTile * of.sum_stride, of.sum_stride);
    _tile_stored(3, of.sums + kTile * of.sum_stride + 64, of.sum_stride);
}

// All rows by `columns`, a multiple of 32.
inline void multiply_tiles(const TileOperands& all, int64_t rows, int64_t columns, Ahead& ahead) {
    stored();
    for (int64_t row = 0; row < rows; row += kBlockRows) {
        const bool square = rows - row > kTile;
        int64_t at = 0;
        while (at < columns) {
            TileOperands of = all;
            of.rows += row * of.row_stride;
            of.columns += at / kTile * of.column_stride;
            of.sums += row * of.sum_stride + at * 4;
            const int64_t count = square ? 2 : columns - at >= 4 * kTile ? 4 : columns - at >= 2 * kTile ? 2 : 1;
            if (square) multiply_square(of, ahead);
            else if (count == 4) multiply_row_tile<4>(of, ahead);
            else if (count == 2) multiply_row_tile<2>(of, ahead);
            else multiply_row_tile<1>(of, ahead);
            at += count * kTile;
        }
    }
    stored();
}

// Scores of up to 16 rows with 64 keys as they lie, which are left operands here: the same products in the same order,
// so the same scores. packed: the rows, a panel. copies: [64 keys], for those that do not lie together.
inline void multiply_keys(const char* const* keys, int64_t bytes, const float* packed, int64_t steps, char* copies,
                          float* scores, int64_t rows) {
    const char* tiles[4];
    for (int i = 0; i < 4; ++i, copies += kTile * bytes) {
        const char* const* some = keys + i * kTile;
        tiles[i] = some[0];
        bool together = true;
        for (int64_t key = 1; key < kTile; ++key) together &= some[key] == some[0] + key * bytes;
        if (together) continue;
        for (int64_t key = 0; key < kTile; ++key) std::memcpy(copies + key * bytes, some[key], bytes);
        tiles[i] = copies;
    }
    stored();
    const auto ask_tile = [&](int64_t key, int64_t at) {
        for (int64_t i = key; i < key + kTile; ++i) __builtin_prefetch(keys[i + kTileAhead] + at, 0, 2);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = step * 64;
        _tile_loadd(6, packed + step * kTileWords, 64);
        _tile_loadd(4, tiles[0] + at, bytes);
        _tile_dpbf16ps(0, 4, 6);
        ask_tile(0, at);
        _tile_loadd(5, tiles[1] + at, bytes);
        _tile_dpbf16ps(1, 5, 6);
        ask_tile(kTile, at);
        _tile_loadd(4, tiles[2] + at, bytes);
        _tile_dpbf16ps(2, 4, 6);
        ask_tile(2 * kTile, at);
        _tile_loadd(5, tiles[3] + at, bytes);
        _tile_dpbf16ps(3, 5, 6);
        ask_tile(3 * kTile, at);
    }
    alignas(64) float sums[4][kTileWords];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    stored();
    for (int i = 0; i < 4; ++i) {
        Float words[kTile];
        for (int key = 0; key < kTile; ++key) words[key] = load(sums[i] + key * kTile);
        transpose(words);
        for (int64_t row = 0; row < rows; ++row) store(scores + row * kScoreStride + i * kTile, words[row]);
    }
}

// Put the values of 32 keys into tiles: [width / 16][16 pairs of keys][16 pairs of elements]. Only keys from - to - 1
// are read, zeros stand for the others. Of 32 elements the first tile has 0-3, 8-11, 16-19, 24-27: see `in_order`.
template <class C, bool kAsk>
inline void pair_values(const char* const* rows, int64_t from, int64_t to, int64_t head_dim, int64_t width, char* tiles,
                        Ahead& ahead) {
    for (int64_t pair = 0; pair < kTile; ++pair) {
        const int64_t key = 2 * pair;
        const bool even = key >= from && key < to, odd = key + 1 >= from && key + 1 < to;
        char* place = tiles + pair * 64;
        for (int64_t at = 0; at < width; at += 32, place += 2048) {
            const auto* first = reinterpret_cast<const C*>(rows[key]) + at;
            const auto* second = reinterpret_cast<const C*>(rows[key + 1]) + at;
            if constexpr (kAsk) {
                ask<32 * sizeof(C)>(rows[key + kFewAhead], at * sizeof(C));
                ask<32 * sizeof(C)>(rows[key + 1 + kFewAhead], at * sizeof(C));
            }
            const __m512i a = even ? as_pairs(first, head_dim - at) : _mm512_setzero_si512();
            const __m512i b = odd ? as_pairs(second, head_dim - at) : _mm512_setzero_si512();
            _mm512_store_si512(place, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(place + 1024, _mm512_unpackhi_epi16(a, b));
        }
        if (!kAsk && pair % 2 == 0) ahead.step();
    }
}

// Elements 16 * half - 16 * half + 15 of 32 whose sums lie as `pair_values` leaves them.
inline Float in_order(const float* sums, int half) {
    const __m512i places = half == 0
        ? _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0)
        : _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    return bits_as<Float>(_mm512_permutex2var_ps(_mm512_loadu_ps(sums), places, _mm512_loadu_ps(sums + 16)));
}

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
