// Products by AMX: 16 rows of weights by 32 inputs are one tile, loaded as they lie, so weights are not packed.
//
// A tile of the result holds 16 outputs by 16 tokens. Activations are packed once per call, pairs of inputs of 16
// tokens side by side (Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS).
#pragma once

#include "target.h"
#include "words.h"

#if defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kTile = 16;        // rows of a tile
constexpr int64_t kTileInputs = 32;  // bfloat16 elements of a row of a tile
constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kPairRows = 2 * kTile;  // of two tiles side by side
constexpr int64_t kPairWords = 2 * kTileWords;

// Tiles are loaded by instructions of which GCC 12 does not know that they read memory: what was stored must be there.
inline void stored() { asm volatile("" ::: "memory"); }

// Bring a line to the second cache. GCC 12 takes functions that do nothing but __builtin_prefetch for needless.
inline void fetch(const void* line) { asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(line))); }

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
    const int64_t first = tile * kTile;
    const int64_t count = packed.tokens - first < kTile ? packed.tokens - first : kTile;
    for (int64_t input_tile = 0; input_tile < packed.input_tiles(); ++input_tile) {
        auto* words = const_cast<uint32_t*>(packed.tile(tile, input_tile));
        const int64_t left = packed.inputs - input_tile * kTileInputs;
        const __mmask32 valid = left >= kTileInputs ? ~0u : (1u << left) - 1;
        __m512i rows[kTile] = {};
        for (int64_t token = 0; token < count; ++token) {
            rows[token] = _mm512_maskz_loadu_epi16(valid, x + (first + token) * stride + input_tile * kTileInputs);
        }
        transpose_words(rows);
        for (int64_t pair = 0; pair < kTile; ++pair) _mm512_store_si512(words + pair * kTile, rows[pair]);
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
        const __mmask32 own = row + i < end ? valid : 0;
        const __m512i words = _mm512_maskz_loadu_epi16(own, from + i * inputs);
        _mm512_storeu_si512(copy + i * kTileInputs, words);
    }
    stored();
    return {copy, kTileInputs * 2};
}

// Write sums, [32 outputs][16 tokens], as they are.
inline void put_wide(const float* sums, const float* bias, int64_t token, int64_t output, __mmask32 valid,
                     int64_t tokens, const Target<BFloat16>& target) {
    for (int64_t half = 0; half < kPairRows; half += kTile) {
        __m512i rows[kTile];
        for (int64_t i = 0; i < kTile; ++i) {
            const __m512 some = _mm512_load_ps(sums + (half + i) * kTile);
            rows[i] = bits_as<__m512i>(_mm512_add_ps(some, _mm512_set1_ps(bias[half + i])));
        }
        transpose_words(rows);
        float* to = target.wide + token * target.stride + output + half;
        for (int64_t i = 0; i < kTile && token + i < tokens; ++i) {
            _mm512_mask_storeu_epi32(to + i * target.stride, static_cast<__mmask16>(valid >> half), rows[i]);
        }
    }
}

// Write sums, [32 outputs][16 tokens], to their tokens' rows.
inline void put_pair(const float* sums, int64_t token, int64_t output, int64_t end, int64_t tokens,
                     const Target<BFloat16>& target) {
    const int64_t count = end - output < kPairRows ? end - output : kPairRows;
    const __mmask32 valid = count == kPairRows ? ~0u : (1u << count) - 1;
    alignas(64) float bias[kPairRows] = {};
    if (target.bias != nullptr) {
        for (int64_t i = 0; i < count; ++i) bias[i] = to_float(target.bias[output + i]);
    }
    if (target.wide != nullptr) return put_wide(sums, bias, token, output, valid, tokens, target);
    // Two outputs of a token are one word.
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i rows[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
        const __m512 even = _mm512_add_ps(_mm512_load_ps(sums + 2 * i * kTile), _mm512_set1_ps(bias[2 * i]));
        const __m512 odd = _mm512_add_ps(_mm512_load_ps(sums + (2 * i + 1) * kTile), _mm512_set1_ps(bias[2 * i + 1]));
        rows[i] = _mm512_permutexvar_epi16(places, bits_as<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
    }
    transpose_words(rows);
    BFloat16* to = target.y + token * target.stride + output;
    if (tokens - token >= kTile && valid == ~0u) {
        for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * target.stride, rows[i]);
        return;
    }
    for (int64_t i = 0; i < kTile && token + i < tokens; ++i) {
        _mm512_mask_storeu_epi16(to + i * target.stride, valid, rows[i]);
    }
}

// Two tiles of outputs by two of tokens, in all inputs. Tiles 0 to 3 sum. kSecond: whether there is a second tile of
// tokens. weights(k) loads tiles 4 and 5; meanwhile(k) is called at each step. Tokens are loaded as what is not used
// again soon: the first cache is for the weights.
template <bool kSecond, class Weights, class Meanwhile>
inline void sum_pairs(const uint32_t* x, int64_t steps, const Weights& weights, const Meanwhile& meanwhile) {
    const uint32_t* second = x + steps * kTileWords;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k) {
        weights(k);
        _tile_stream_loadd(6, x + k * kTileWords, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (kSecond) {
            _tile_stream_loadd(7, second + k * kTileWords, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        meanwhile(k);
    }
}

// The product of some tokens with a range of outputs. Weights are read as they lie, the next rows being fetched into
// the second cache while these are multiplied; tokens pass by from the second cache, where they fit.
class TileProduct {
public:
    // tile, last_tile: the tokens, in tiles; begin, end: the outputs.
    TileProduct(const PackedRows& x, int64_t tile, int64_t last_tile, const BFloat16* weight, int64_t begin,
                int64_t end, const Target<BFloat16>& target)
        : x_(x), tile_(tile), last_tile_(last_tile), weight_(weight), begin_(begin), end_(end), target_(target) {}

    void run() const {
        const TileRegisters registers;
        const int64_t tiles = last_tile_ - tile_;
        const bool whole = x_.inputs % kTileInputs == 0;
        int64_t output = begin_;
        if (whole && tiles <= 2) output = tiles == 2 ? multiply_few<true>() : multiply_few<false>();
        for (; output < end_; output += kPairRows) {
            if (whole && output + kPairRows <= end_) multiply_whole(output);
            else multiply_part(output, output + kPairRows < end_ ? output + kPairRows : end_);
        }
    }

private:
    // 32 outputs whose inputs are whole tiles, of more tokens than two tiles.
    void multiply_whole(int64_t output) const {
        const int64_t bytes = x_.inputs * 2, pairs = num_tiles(last_tile_ - tile_, 2), end = output + kPairRows;
        const char* rows = reinterpret_cast<const char*>(weight_ + output * x_.inputs);
        const char* others = rows + kTile * bytes;
        const auto weights = [&](int64_t k) {
            _tile_loadd(4, rows + k * 64, bytes);
            _tile_loadd(5, others + k * 64, bytes);
        };
        // Each pair of tokens' tiles asks for its share of the next rows.
        const int64_t next = end_ - end < kPairRows ? end_ - end : kPairRows, share = (next + pairs - 1) / pairs;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t first = pair * share, last = first + share < next ? first + share : next;
            const int64_t tile = tile_ + 2 * pair, tokens = x_.tokens - tile * kTile;
            const char* ahead = rows + (kPairRows + first) * bytes;
            multiply(tile, output, end, weights, [&](int64_t k) {
                const char* line = ahead + k * 64;
                for (int64_t row = first; row < last; ++row, line += bytes) fetch(line);
                if (k < kPairRows && k < tokens) fetch(target_.place(tile * kTile + k, output));
            });
        }
    }

    // The same of one tile of tokens, or two, for all outputs, 32 by 32. Memory is the limit: it gives more where few rows
    // are read side by side, the rows that follow them are asked for meanwhile, and sums are put while the next ones are
    // made, so that it does not rest. Returns the first output that is left.
    template <bool kSecond>
    int64_t multiply_few() const {
        constexpr int kTiles = kSecond ? 2 : 1;
        alignas(64) float sums[kTiles][kPairWords];
        int64_t output = begin_;
        int waiting = 0;  // tiles of the last outputs that are not put
        const auto put = [&](int64_t last) {
            const int64_t tile = --waiting;
            put_pair(sums[tile], (tile_ + tile) * kTile, last, last + kPairRows, x_.tokens, target_);
        };
        for (; output + kPairRows <= end_; output += kPairRows) {
            for (int64_t half = 0; half < 2; ++half) {
                sum_few<kSecond>(output + half * kTile, [&](int64_t k) {
                    if (k % 4 == 2 && waiting > 0) put(output - kPairRows);
                });
                while (waiting > 0) put(output - kPairRows);
                _tile_stored(0, sums[0] + half * kTileWords, 64);
                if (kSecond) _tile_stored(1, sums[kTiles - 1] + half * kTileWords, 64);
                stored();
            }
            waiting = kTiles;
        }
        while (waiting > 0) put(output - kPairRows);
        return output;
    }

    // 16 outputs from `row` on, into tiles 0 and 1.
    template <bool kSecond, class Meanwhile>
    void sum_few(int64_t row, const Meanwhile& meanwhile) const {
        const int64_t bytes = x_.inputs * 2, steps = x_.input_tiles();
        const uint32_t* x = x_.tile(tile_, 0);
        const char* rows = reinterpret_cast<const char*>(weight_ + row * x_.inputs);
        const char* ahead = rows + kTile * bytes;
        const int64_t to_ask = row + 2 * kTile <= end_ ? kTile : 0;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < steps; ++k) {
            _tile_loadd(4, rows + k * 64, bytes);
            _tile_loadd(5, x + k * kTileWords, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (kSecond) {
                _tile_loadd(6, x + (steps + k) * kTileWords, 64);
                _tile_dpbf16ps(1, 4, 6);
            }
            for (int64_t i = 0; i < to_ask; ++i) fetch(ahead + i * bytes + k * 64);
            meanwhile(k);
        }
    }

    // Outputs up to 32, inputs of any number.
    void multiply_part(int64_t output, int64_t end) const {
        alignas(64) uint16_t copies[2][kTileWords * 2];
        for (int64_t tile = tile_; tile < last_tile_; tile += 2) {
            multiply(
                tile, output, end,
                [&](int64_t k) {
                    const WeightTile first = weight_tile(weight_, x_.inputs, output, end, k, copies[0]);
                    _tile_loadd(4, first.data, first.stride_bytes);
                    const WeightTile second = weight_tile(weight_, x_.inputs, output + kTile, end, k, copies[1]);
                    _tile_loadd(5, second.data, second.stride_bytes);
                },
                [](int64_t) {});
        }
    }

    template <class Weights, class Meanwhile>
    void multiply(int64_t tile, int64_t output, int64_t end, const Weights& weights, const Meanwhile& meanwhile) const {
        alignas(64) float sums[2][kPairWords];
        const bool second = tile + 1 < last_tile_;
        if (second) sum_pairs<true>(x_.tile(tile, 0), x_.input_tiles(), weights, meanwhile);
        else sum_pairs<false>(x_.tile(tile, 0), x_.input_tiles(), weights, meanwhile);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[0] + kTileWords, 64);
        if (second) {
            _tile_stored(2, sums[1], 64);
            _tile_stored(3, sums[1] + kTileWords, 64);
        }
        stored();
        put_pair(sums[0], tile * kTile, output, end, x_.tokens, target_);
        if (second) put_pair(sums[1], (tile + 1) * kTile, output, end, x_.tokens, target_);
    }

    const PackedRows& x_;
    int64_t tile_;
    int64_t last_tile_;
    const BFloat16* weight_;
    int64_t begin_;
    int64_t end_;
    const Target<BFloat16>& target_;
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
