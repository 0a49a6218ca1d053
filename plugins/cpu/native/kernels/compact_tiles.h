// Products by AMX with compact weights: unpacked to tiles, of few tokens while those before are multiplied, of many
// once for all of them.
#pragma once

#include "compact.h"
#include "pool.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kPieceTiles = kPieceInputs / kTileInputs;

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// 16 rows after 16 rows, piece by piece, each as kPieceTiles tiles beside those that are multiplied.
class TileUnpacker {
public:
    // begin, end: rows; what remains of them after whole 16 is not unpacked.
    TileUnpacker(const CompactWeight& weight, int64_t begin, int64_t end)
        : weight_(weight), uppers_(weight.uppers()), row_(begin), end_(end) {}

    bool done() const { return row_ + kTile > end_; }

    // A quarter of the rows of the piece at hand; the fourth is followed by the next piece.
    __attribute__((always_inline)) void unpack(int quarter) {
        constexpr int64_t kRows = kTile / 4;
        const int64_t bytes = weight_.row_bytes();
        const uint8_t* from = weight_.piece(row_ + quarter * kRows, piece_);
        uint16_t* to = tiles_[at_] + quarter * kRows * kTileInputs;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kRows; ++i, from += bytes, to += kTileInputs) {
            __m512i words[kPieceVectors];
            unpack_piece(from, uppers_, words);
            for (int tile = 0; tile < kPieceTiles; ++tile) _mm512_store_si512(to + tile * kTileWords * 2, words[tile]);
            // What follows these rows by as many as are unpacked at once: memory is asked for it in small portions.
            const uint8_t* ahead = from + kTile * bytes;
            for (int64_t line = 0; line < kPieceBytes; line += 64) fetch(ahead + line);
        }
        if (quarter == 3) finish_piece();
    }

    // The piece that was finished last, until the next one is.
    const uint16_t* tile(int64_t index) const { return tiles_[1 - at_] + index * kTileWords * 2; }

private:
    void finish_piece() {
        weight_.exceptions(row_, kTile, piece_, [&](int64_t row, int64_t input, uint16_t number) {
            tiles_[at_][(input / kTileInputs * kTile + row) * kTileInputs + input % kTileInputs] = number;
        });
        stored();
        at_ = 1 - at_;
        if (++piece_ == weight_.num_pieces()) {
            piece_ = 0;
            row_ += kTile;
        }
    }

    const CompactWeight& weight_;
    const __m512i uppers_;
    int64_t row_;
    int64_t end_;
    int64_t piece_ = 0;
    int at_ = 0;
    alignas(64) uint16_t tiles_[2][kPieceTiles * kTileWords * 2];
};

// Many tokens: some inputs of 32 outputs, a panel, are unpacked into the first cache and stay while all tokens pass by
// from the second one, with their sums.
class CompactPanels {
public:
    static int64_t bytes(int64_t pairs) { return kPanelBytes + pairs * kSumBytes; }

    // tile, last_tile: the tokens, in tiles. memory: as much as `bytes` says.
    CompactPanels(const PackedRows& x, int64_t tile, int64_t last_tile, const CompactWeight& weight,
                  const Range& outputs, const Target<BFloat16>& target, void* memory)
        : x_(x), tile_(tile), last_tile_(last_tile), pairs_(num_tiles(last_tile - tile, 2)), weight_(weight),
          uppers_(weight.uppers()), outputs_(outputs), target_(target), panel_(static_cast<char*>(memory)),
          sums_(reinterpret_cast<float*>(panel_ + kPanelBytes)) {}

    void run() {
        for (Panel panel = panel_at(outputs_.first, 0); panel.output < outputs_.last;) {
            const bool last = panel.piece + panel.pieces == weight_.num_pieces();
            const Panel next = last ? panel_at(panel.output + kPairRows, 0)
                                    : panel_at(panel.output, panel.piece + panel.pieces);
            unpack(panel);
            for (int64_t pair = 0; pair < pairs_; ++pair) {
                multiply(panel, next, pair, last);
                if (!last) continue;
                put_rest();
                waiting_ = {panel.output, pair};
                if (pairs_ == 1) put_rest();  // else the next sums go elsewhere
            }
            panel = next;
        }
        put_rest();
    }

private:
    static constexpr int64_t kPanelPieces = 4;
    static constexpr int64_t kPanelBytes = kPanelPieces * kPieceTiles * 2 * kTileWords * 4;
    static constexpr int64_t kSumBytes = 2 * kPairWords * sizeof(float);

    // Some pieces of the 32 outputs from `output` on, those of them that there are.
    struct Panel {
        int64_t output;
        int64_t piece;
        int64_t pieces;
    };

    // Sums of two tiles of tokens that are not put yet.
    struct Waiting {
        int64_t output;
        int64_t pair;
        int64_t tiles = 2;
    };

    // As equal parts of a row as can be.
    Panel panel_at(int64_t output, int64_t piece) const {
        const int64_t all = weight_.num_pieces(), panels = num_tiles(all, kPanelPieces), left = all - piece;
        const int64_t size = num_tiles(all, panels);
        return {output, piece, left < size ? left : size};
    }

    int64_t rows_of(const Panel& panel) const {
        const int64_t left = outputs_.last - panel.output;
        return left < kPairRows ? left : kPairRows;
    }

    // To tiles side by side: [tiles of inputs][32 rows][32 inputs].
    void unpack(const Panel& panel) const {
        const int64_t rows = rows_of(panel);
        for (int64_t row = 0; row < rows; ++row) {
            char* to = panel_ + row * 64;
            for (int64_t i = 0; i < panel.pieces; ++i) {
                __m512i words[kPieceVectors];
                unpack_piece(weight_.piece(panel.output + row, panel.piece + i), uppers_, words);
                for (const __m512i& some : words) {
                    _mm512_store_si512(to, some);
                    to += kPairRows * 64;
                }
            }
        }
        for (int64_t i = 0; i < panel.pieces; ++i) {
            char* const to = panel_ + i * kPieceTiles * kPairRows * 64;
            weight_.exceptions(panel.output, rows, panel.piece + i, [&](int64_t row, int64_t input, uint16_t number) {
                const int64_t tile = input / kTileInputs;
                std::memcpy(to + (tile * kPairRows + row) * 64 + input % kTileInputs * 2, &number, 2);
            });
        }
        stored();
    }

    // Two tiles of tokens by the panel.
    void multiply(const Panel& panel, const Panel& next, int64_t pair, bool last) {
        const int64_t tile = tile_ + 2 * pair, first = panel.piece * kPieceTiles, steps = panel.pieces * kPieceTiles;
        const uint32_t* x = x_.tile(tile, first);
        const uint32_t* second = tile + 1 < last_tile_ ? x_.tile(tile + 1, first) : x;
        float* const sums = sums_ + pair * 2 * kPairWords;
        if (panel.piece == 0) zero_sums();
        else load_sums(sums);
        const int64_t rows = next.output < outputs_.last ? rows_of(next) : 0, share = num_tiles(kPairRows, pairs_);
        const int64_t row = pair * share, end = row + share < rows ? row + share : rows;
        const int64_t tokens = x_.tokens - tile * kTile;
        for (int64_t k = 0; k < steps; ++k) {
            const char* weights = panel_ + k * kPairRows * 64;
            _tile_loadd(4, weights, 64);
            _tile_stream_loadd(6, x + k * kTileWords, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights + kTile * 64, 64);
            _tile_dpbf16ps(1, 5, 6);
            _tile_stream_loadd(7, second + k * kTileWords, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            // Ask for this pair's share of the next panel: of four steps, three have lines.
            if (k % kPieceTiles < 3 && k / kPieceTiles < next.pieces) {
                for (int64_t i = row; i < end; ++i) {
                    fetch(weight_.piece(next.output + i, next.piece + k / kPieceTiles) + k % kPieceTiles * 64);
                }
            }
            if (last) {
                for (int64_t token = 2 * k; token < 2 * k + 2 && token < kPairRows && token < tokens; ++token) {
                    fetch(target_.place(tile * kTile + token, panel.output));
                }
            }
            if (k % 4 == 2) put_one();
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + kTileWords, 64);
        _tile_stored(2, sums + 2 * kTileWords, 64);
        _tile_stored(3, sums + 3 * kTileWords, 64);
        stored();
    }

    static void load_sums(const float* sums) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + kTileWords, 64);
        _tile_loadd(2, sums + 2 * kTileWords, 64);
        _tile_loadd(3, sums + 3 * kTileWords, 64);
    }

    // One of the tiles of tokens that wait.
    void put_one() {
        if (waiting_.tiles == 0) return;
        const int64_t index = --waiting_.tiles, tile = tile_ + 2 * waiting_.pair + index;
        if (tile >= last_tile_) return;
        const float* sums = sums_ + (2 * waiting_.pair + index) * kPairWords;
        put_pair(sums, tile * kTile, waiting_.output, outputs_.last, x_.tokens, target_);
    }

    void put_rest() {
        while (waiting_.tiles > 0) put_one();
    }

    const PackedRows& x_;
    int64_t tile_;
    int64_t last_tile_;
    int64_t pairs_;
    const CompactWeight& weight_;
    const __m512i uppers_;
    const Range outputs_;
    const Target<BFloat16>& target_;
    char* panel_;
    float* sums_;  // [pairs][2 tiles of tokens][32 outputs][16 tokens]
    Waiting waiting_ = {0, 0, 0};
};

// As TileProduct.
class CompactTileProduct {
public:
    CompactTileProduct(const PackedRows& x, int64_t tile, int64_t last_tile, const CompactWeight& weight,
                       int64_t begin, int64_t end, const Target<BFloat16>& target)
        : x_(x), tile_(tile), last_tile_(last_tile), weight_(weight), begin_(begin), end_(end), target_(target) {}

    void run(int thread) const {
        const TileRegisters registers;
        const int64_t tiles = last_tile_ - tile_;
        int64_t output = begin_;
        if (tiles <= 4) output = tiles > 2 ? tiles > 3 ? multiply_few<4>() : multiply_few<3>()
                               : tiles > 1 ? multiply_few<2>() : multiply_few<1>();
        if (output >= end_) return;
        void* const memory = scratch(thread, 6, CompactPanels::bytes(num_tiles(tiles, 2)));
        CompactPanels(x_, tile_, last_tile_, weight_, {output, end_}, target_, memory).run();
    }

private:
    // Up to four tiles of tokens for all whole 32 outputs, which are put while the next ones are made. Returns the first
    // output that is left.
    template <int kTiles>
    int64_t multiply_few() const {
        alignas(64) float sums[kTiles][kPairWords];
        const int64_t end = begin_ + (end_ - begin_) / kPairRows * kPairRows;
        TileUnpacker unpacker(weight_, begin_, end);
        if (!unpacker.done()) {
            for (int quarter = 0; quarter < 4; ++quarter) unpacker.unpack(quarter);
        }
        int waiting = 0;  // tiles of the last outputs that are not put
        const auto put = [&](int64_t output) {
            const int64_t tile = --waiting;
            put_pair(sums[tile], (tile_ + tile) * kTile, output, output + kPairRows, x_.tokens, target_);
        };
        for (int64_t output = begin_; output < end; output += kPairRows) {
            for (int64_t half = 0; half < 2; ++half) {
                zero_sums();
                for (int64_t piece = 0; piece < weight_.num_pieces(); ++piece) {
                    multiply_piece<kTiles>(unpacker, piece);
                    if (waiting > 0) put(output - kPairRows);
                }
                while (waiting > 0) put(output - kPairRows);
                _tile_stored(0, sums[0] + half * kTileWords, 64);
                if constexpr (kTiles > 1) _tile_stored(1, sums[1] + half * kTileWords, 64);
                if constexpr (kTiles > 2) _tile_stored(2, sums[2] + half * kTileWords, 64);
                if constexpr (kTiles > 3) _tile_stored(3, sums[3] + half * kTileWords, 64);
                stored();
            }
            waiting = kTiles;
        }
        while (waiting > 0) put(end - kPairRows);
        return end;
    }

    // Into tiles 0 to 3, what was unpacked last, while the next piece is.
    template <int kTiles>
    __attribute__((always_inline)) void multiply_piece(TileUnpacker& unpacker, int64_t piece) const {
        const uint32_t* x = x_.tile(tile_, piece * kPieceTiles);
        const int64_t next = x_.input_tiles() * kTileWords;
        const uint16_t* weights = unpacker.tile(0);
        const bool more = !unpacker.done();
#pragma GCC unroll 4
        for (int i = 0; i < kPieceTiles; ++i, x += kTileWords) {
            if (more) unpacker.unpack(i);
            _tile_loadd(4, weights + i * kTileWords * 2, 64);
            _tile_loadd(5, x, 64);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (kTiles > 1) {
                _tile_loadd(6, x + next, 64);
                _tile_dpbf16ps(1, 4, 6);
            }
            if constexpr (kTiles > 2) {
                _tile_loadd(7, x + 2 * next, 64);
                _tile_dpbf16ps(2, 4, 7);
            }
            if constexpr (kTiles > 3) {
                _tile_loadd(5, x + 3 * next, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        stored();  // what is unpacked next must not be stored before these were loaded
    }

    const PackedRows& x_;
    int64_t tile_;
    int64_t last_tile_;
    const CompactWeight weight_;
    int64_t begin_;
    int64_t end_;
    const Target<BFloat16>& target_;
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
