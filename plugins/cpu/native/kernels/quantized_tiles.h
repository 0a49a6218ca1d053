// Products of 8-bit codes by AMX, in exact integers: 16 rows of weights by 64 inputs are one tile as they lie.
#pragma once

#include "pool.h"
#include "quantized_rows.h"
#include "tiles.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

constexpr int64_t kTileCodes = 64;   // 8-bit codes of a row of a tile
constexpr int64_t kBlockRows = 2 * kTile;
constexpr int64_t kCopiedTokens = 64;  // from more tokens on, rows of codes are copied tile by tile

// Packed activations: [tiles of tokens][steps of inputs][16 words of inputs][16 tokens], zeros where there are none.
struct Packed {
    uint32_t* data;
    int64_t tokens;
    int64_t steps;

    uint32_t* tile(int64_t token_tile, int64_t step) const { return data + (token_tile * steps + step) * kTileWords; }
};

inline int64_t packed_bytes(int64_t tokens, int64_t inputs, int64_t step_inputs) {
    return num_tiles(tokens, kTile) * num_tiles(inputs, step_inputs) * kTileWords * 4;
}

// Write 16 words of each of 16 tokens as a tile of 16 words by 16 tokens; the same back.
inline void put_transposed(__m512i (&rows)[16], void* tile) {
    transpose_words(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<uint32_t*>(tile) + i * kTile, rows[i]);
}

// Round 16 tokens from `tile` * 16 on and pack them. codes: memory for their rows.
template <class T>
inline void pack_codes(const T* x, int64_t stride, const Packed& packed, int64_t tile, RoundedToken* tokens,
                       int8_t* codes, int64_t inputs) {
    const int64_t first = tile * kTile, width = packed.steps * kTileCodes;
    const int64_t count = packed.tokens - first < kTile ? packed.tokens - first : kTile;
    for (int64_t i = 0; i < count; ++i) {
        tokens[first + i] = round_row(x + (first + i) * stride, inputs, codes + i * width, width);
    }
    for (int64_t step = 0; step < packed.steps; ++step) {
        __m512i rows[16];
        for (int64_t i = 0; i < kTile; ++i) {
            rows[i] = i < count ? _mm512_loadu_si512(codes + i * width + step * kTileCodes) : _mm512_setzero_si512();
        }
        put_transposed(rows, packed.tile(tile, step));
    }
}

// Where the tiles of 32 rows of codes are: a step further, a row further, 16 rows further.
struct CodeTiles {
    const int8_t* data;
    int64_t step;
    int64_t row;
    int64_t second;
};

// Rows of codes copied tile by tile, zeros where rows or inputs end.
inline CodeTiles copied(const int8_t* codes, int64_t inputs, int64_t rows, int64_t steps, int8_t* copy) {
    for (int64_t i = 0; i < kBlockRows; ++i) {
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t left = inputs - step * kTileCodes;
            const __mmask64 valid = i >= rows ? 0 : left >= kTileCodes ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
            const __m512i words = _mm512_maskz_loadu_epi8(valid, codes + i * inputs + step * kTileCodes);
            _mm512_storeu_si512(copy + (step * kBlockRows + i) * kTileCodes, words);
        }
    }
    stored();
    return {copy, kBlockRows * kTileCodes, kTileCodes, kTile * kTileCodes};
}

inline void load_transposed(const void* tile, __m512i (&rows)[16]) {
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(static_cast<const uint32_t*>(tile) + i * kTile);
    transpose_words(rows);
}

// Scales and bias at the end of a tile of sums: the same arithmetic as that of `IntegerSums`.
template <class T>
inline void put_sums(const int32_t* sums, const RoundedToken* tokens, int64_t count, const float* scales,
                     int64_t token, int64_t output, int64_t end, const Target<T>& target) {
    __m512i rows[16];
    load_transposed(sums, rows);
    const int64_t left = end - output < kTile ? end - output : kTile;
    const Float scale = left == kTile ? load(scales + output) : load_some(scales + output, left);
    const Float bias = target.bias_of(output, left);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        if (i >= count) continue;
        const Float product = __builtin_convertvector(bits_as<Int>(rows[i]), Float) * tokens[token + i].scale;
        target.put_biased(token + i, output, fused(product, scale, bias), left);
    }
}

// A product of 32 outputs and two tiles of tokens, whose sums are put when those of the next one are made: vectors work
// beside tiles.
template <class T>
class CodeProduct {
public:
    CodeProduct(const Packed& x, const RoundedToken* tokens, const float* scales, int64_t end,
                const Target<T>& target)
        : x_(x), tokens_(tokens), scales_(scales), end_(end), target_(target) {}

    // ahead: codes that will be read next, or null.
    void multiply(const CodeTiles& w, int64_t output, int64_t tile, const int8_t* ahead) {
        for (int64_t i = tile * kTile; i < (tile + 2) * kTile && i < x_.tokens; ++i) {
            target_.ask(i, output);
        }
        if (tile + 1 < num_tiles(x_.tokens, kTile)) {
            sums_of<true>(w, tile, ahead);
        } else {
            sums_of<false>(w, tile, ahead);
        }
        put_rest();
        current_ ^= 1;
        output_ = output;
        tile_ = tile;
        left_ = 4;
    }

    void put_rest() {
        while (left_ > 0) put_part();
    }

private:
    template <bool kTwo>
    void sums_of(const CodeTiles& w, int64_t tile, const int8_t* ahead) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTwo) {
            _tile_zero(2);
            _tile_zero(3);
        }
        const int8_t* codes = w.data;
        for (int64_t step = 0; step < x_.steps; ++step, codes += w.step) {
            if (ahead != nullptr) {
                for (int64_t i = 0; i < kBlockRows; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            }
            _tile_loadd(4, codes, w.row);
            _tile_loadd(6, x_.tile(tile, step), 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(5, codes + w.second, w.row);
            _tile_dpbssd(1, 5, 6);
            if constexpr (kTwo) {
                _tile_loadd(7, x_.tile(tile + 1, step), 64);
                _tile_dpbssd(2, 4, 7);
                _tile_dpbssd(3, 5, 7);
            }
            if (step % 2 == 1 && left_ > 0) put_part();
        }
        auto& sums = sums_[current_];
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        if constexpr (kTwo) {
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
        }
        stored();
    }

    // One of the four tiles of the last product: [2 tiles of tokens][2 of outputs].
    void put_part() {
        const int64_t part = 4 - left_--, token = (tile_ + part / 2) * kTile, output = output_ + part % 2 * kTile;
        if (token >= x_.tokens || output >= end_) return;
        put_sums(sums_[current_ ^ 1][part], tokens_, x_.tokens - token, scales_, token, output, end_, target_);
    }

    const Packed& x_;
    const RoundedToken* tokens_;
    const float* scales_;
    int64_t end_;
    const Target<T>& target_;
    int64_t output_ = 0;  // of the last product
    int64_t tile_ = 0;
    int64_t left_ = 0;  // its tiles that are not put yet
    int current_ = 0;   // where the sums of the next product go
    alignas(64) int32_t sums_[2][4][kTileWords];  // [16 outputs][16 tokens]
};

// One tile of tokens, or two, times 16 outputs at a time: memory is the limit, see `TileProduct::multiply_few`. Sums
// are put while the next 16 outputs are multiplied, so that memory does not rest. Inputs are whole tiles. Returns the
// first output that is left.
template <bool kSecond, class T>
int64_t multiply_few_codes(const Packed& x, const RoundedToken* tokens, const zif_cpu_quantized& weight, int64_t begin,
                           int64_t end, const Target<T>& target) {
    constexpr int kTiles = kSecond ? 2 : 1;
    alignas(64) int32_t sums[kTiles][kTileWords];
    const int64_t inputs = weight.inputs;
    int64_t output = begin;
    int waiting = 0;  // tiles of the last outputs that are not put
    const auto put = [&](int64_t last) {
        const int64_t tile = --waiting, token = tile * kTile;
        put_sums(sums[tile], tokens, x.tokens - token, weight.scales, token, last, end, target);
    };
    for (; output + kTile <= end; output += kTile) {
        const auto* codes = static_cast<const int8_t*>(weight.codes) + output * inputs;
        const int8_t* ahead = codes + kTile * inputs;
        const int64_t to_ask = end - output - kTile < kTile ? end - output - kTile : kTile;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t step = 0; step < x.steps; ++step) {
            _tile_loadd(4, codes + step * kTileCodes, inputs);
            _tile_loadd(5, x.tile(0, step), 64);
            _tile_dpbssd(0, 4, 5);
            if (kSecond) {
                _tile_loadd(6, x.tile(1, step), 64);
                _tile_dpbssd(1, 4, 6);
            }
            for (int64_t i = 0; i < to_ask; ++i) fetch(ahead + i * inputs + step * kTileCodes);
            if (step % 4 == 2 && waiting > 0) put(output - kTile);
        }
        while (waiting > 0) put(output - kTile);
        _tile_stored(0, sums[0], 64);
        if (kSecond) _tile_stored(1, sums[kTiles - 1], 64);
        stored();
        waiting = kTiles;
    }
    while (waiting > 0) put(output - kTile);
    return output;
}

// All tokens times outputs `begin` to `end` - 1.
template <class T>
void multiply_codes(const Packed& x, const RoundedToken* tokens, const zif_cpu_quantized& weight, int64_t begin,
                    int64_t end, int thread, const Target<T>& target) {
    const TileRegisters registers;
    const auto* codes = static_cast<const int8_t*>(weight.codes);
    const int64_t inputs = weight.inputs, tiles = num_tiles(x.tokens, kTile);
    auto* copy = static_cast<int8_t*>(scratch(thread, 3, x.steps * kBlockRows * kTileCodes));
    if (tiles <= 2 && inputs % kTileCodes == 0) {
        const auto few = tiles == 1 ? multiply_few_codes<false, T> : multiply_few_codes<true, T>;
        begin = few(x, tokens, weight, begin, end, target);
    }
    CodeProduct<T> product(x, tokens, weight.scales, end, target);
    for (int64_t output = begin; output < end; output += kBlockRows) {
        const int64_t count = end - output < kBlockRows ? end - output : kBlockRows;
        const int8_t* own = codes + output * inputs;
        const bool whole = count == kBlockRows && inputs % kTileCodes == 0 && x.tokens <= kCopiedTokens;
        const CodeTiles w = whole ? CodeTiles{own, kTileCodes, inputs, kTile * inputs}
                                  : copied(own, inputs, count, x.steps, copy);
        const int8_t* ahead = output + 2 * kBlockRows <= end ? own + kBlockRows * inputs : nullptr;
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            product.multiply(w, output, tile, tile == 0 ? ahead : nullptr);
        }
    }
    product.put_rest();
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
